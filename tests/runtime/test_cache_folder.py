"""The cache folder: made, locked, and emptied."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from pathlib import Path

import pytest
from toy import toy_config

from attribution.errors import InputError
from attribution.runtime.cache_folder import (
    alone,
    cache_folder,
    discard,
    discard_unfinished,
    size_of,
    writing,
)
from attribution.runtime.safe_files import atomic


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    config = toy_config(cache_dir=str(tmp_path / "new"))
    for _ in range(2):
        assert cache_folder(config, "a", "b") == tmp_path / "new" / "a" / "b"
    assert list((tmp_path / "new" / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^cache_dir={tmp_path / 'file'}: cannot be written"):
        cache_folder(toy_config(cache_dir=str(tmp_path / "file")), "a")
    with pytest.raises(InputError, match="cannot be written .No space left"), writing(toy_config()):
        raise OSError(28, "No space left on device")


def test_a_lock_is_waited_for_and_released_by_an_error(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with alone(tmp_path, "name", "another has it; waiting"):
            order.append("second")

    other = threading.Thread(target=second)
    # capsys would lose what is written while it is read.
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with pytest.raises(ValueError), alone(tmp_path, "name", "never said"):
            other.start()
            while not said.getvalue():
                assert other.is_alive()
                time.sleep(0.01)
            with alone(tmp_path, "another name", "never said"):
                order.append("first")
            raise ValueError
        other.join(30)
    assert order == ["first", "second"] and said.getvalue() == "another has it; waiting\n"


@pytest.mark.parametrize("name", ["work", "a[b]*"])
def test_a_folder_goes_with_what_killed_processes_left_of_it_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    for each in (
        folder,
        tmp_path / f"{name}2",
        tmp_path / f".{name}.123",
        tmp_path / f".{name}x.1",
    ):
        each.mkdir()
        (each / "file").write_text("x")
    discard(folder)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}2", f".{name}x.1"}
    discard(folder)  # there is nothing any more


def test_a_folder_that_another_process_is_deleting_is_left_to_it(tmp_path, monkeypatch) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(os, "replace", gone)
    discard(tmp_path / "work")


def test_what_a_killed_process_had_begun_goes_and_what_is_whole_stays(tmp_path: Path) -> None:
    whole = tmp_path / "store.db"
    with atomic(whole) as unfinished:
        unfinished.write_text("whole")
        left = unfinished.parent
        kept = left.with_name(f"{left.name}.killed")
        os.rename(left, kept)  # as if this process had ended here
        left.mkdir()
        unfinished.write_text("whole")
    discard_unfinished(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]
    assert whole.read_text() == "whole"


def test_the_size_of_a_folder_is_that_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(bytes(1000))
    (tmp_path / "a" / "other").write_bytes(bytes(23))
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "moved away")
    assert size_of(tmp_path / "a") == 1023 and size_of(tmp_path / "none") == 0
