"""Files that are written whole or not at all, and read without trusting them."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest

from attribution.runtime.safe_files import ResultStore, atomic, read_folder, write_folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_appears_under_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with atomic(tmp_path / "deep" / "a.npz") as unfinished:
        unfinished.write_text("new")
        assert not (tmp_path / "deep" / "a.npz").exists()
        assert unfinished.name == "a.npz"  # numpy adds a suffix to other names
    assert names(tmp_path) == ["deep", "deep/a.npz"]
    assert (tmp_path / "deep" / "a.npz").read_text() == "new"


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as unfinished:
        unfinished.mkdir()
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with atomic(tmp_path / "a") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic(tmp_path / "a") as unfinished:
        unfinished.write_text("half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_appears_with_its_files_and_replaces_no_other(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        (unfinished / "deep" / "file").touch()
    with pytest.raises(OSError), atomic(tmp_path / "a") as unfinished:
        unfinished.mkdir()
        (unfinished / "other").touch()
    assert names(tmp_path) == ["a", "a/deep", "a/deep/file"]


def test_the_temporary_path_is_on_the_same_disk_and_hidden(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as unfinished:
        unfinished.touch()
        [folder] = tmp_path.iterdir()
        assert folder.name.startswith(".") and unfinished.parent == folder
    assert os.listdir(tmp_path) == ["a"]


# -- folders that travel as bytes ------------------------------------------------------------------


def test_a_folder_is_what_it_was_after_it_has_travelled(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "file").write_bytes(b"\x00\xff")
    (tmp_path / "a" / "empty").touch()
    write_folder(tmp_path / "new" / "b", read_folder(tmp_path / "a"))
    write_folder(tmp_path / "new" / "b", {"late": np.zeros(1, np.uint8)})  # the first one stays
    found = {
        path.name: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    assert found == {"file": b"\x00\xff", "empty": b""}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_renamed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_folder(tmp_path / "a", {"file": np.zeros(1, np.uint8)})
    assert not os.listdir(tmp_path)


# -- results by key --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "deep" / "store")


def archive(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_what_is_put_is_what_another_store_on_the_folder_gets(store: ResultStore) -> None:
    arrays = {"a": np.arange(5), "b": np.float32([[1.5, np.nan]])}
    store.put("key", arrays)
    found = ResultStore(store.folder).get("key")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_an_unknown_key_gives_none(store: ResultStore) -> None:
    assert store.get("key") is None


def test_a_second_put_replaces_the_first(store: ResultStore) -> None:
    store.put("key", {"a": np.zeros(3)})
    store.put("key", {"a": np.ones(2)})
    np.testing.assert_array_equal(store.get("key")["a"], [1, 1])


def test_after_a_put_nothing_but_the_result_lies_in_the_folder(store: ResultStore) -> None:
    store.put("key", {"a": np.zeros(3)})
    assert [path.name for path in store.folder.iterdir()] == ["key.npz"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_put_that_is_cut_off_leaves_what_was_there_before(
    store: ResultStore, monkeypatch, earlier: bool
) -> None:
    if earlier:
        store.put("key", {"a": np.zeros(3)})

    def cut_off(file: Path, **arrays) -> None:
        Path(file).write_bytes(b"PK\x03\x04 and no more")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(KeyboardInterrupt):
        store.put("key", {"a": np.ones(3)})
    found = store.get("key")
    assert found["a"].tolist() == [0, 0, 0] if earlier else found is None


@pytest.mark.parametrize("length", [0, 1, 30, 100, -30, -1])
def test_a_truncated_result_counts_as_none(store: ResultStore, length: int) -> None:
    (store.folder / "key.npz").write_bytes(archive(a=np.arange(20))[:length])
    assert store.get("key") is None


def test_a_result_with_any_changed_byte_is_whole_or_counts_as_none(store: ResultStore) -> None:
    original = archive(a=np.arange(4))
    for position in range(len(original)):
        for value in {0, 9, 255} - {original[position]}:
            changed = bytearray(original)
            changed[position] = value
            (store.folder / "key.npz").write_bytes(changed)
            found = store.get("key")
            if found:  # a byte that carries nothing, or the member's name
                assert all(np.array_equal(array, np.arange(4)) for array in found.values())


@pytest.mark.parametrize("content", [b"not an archive", b"PK\x03\x04"])
def test_a_file_that_is_no_archive_counts_as_none(store: ResultStore, content: bytes) -> None:
    (store.folder / "key.npz").write_bytes(content)
    assert store.get("key") is None


def test_a_lone_array_in_place_of_an_archive_counts_as_none(store: ResultStore) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (store.folder / "key.npz").write_bytes(buffer.getvalue())
    assert store.get("key") is None


def test_a_pickled_result_counts_as_none(store: ResultStore) -> None:
    content = archive(a=np.array([{"an": "object"}], dtype=object))
    (store.folder / "key.npz").write_bytes(content)
    assert store.get("key") is None
