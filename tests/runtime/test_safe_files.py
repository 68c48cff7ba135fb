"""Files that are written whole or not at all, and read without trusting them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from attribution.runtime.safe_files import atomic


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
