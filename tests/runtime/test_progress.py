"""What a person sees of tasks that run: on a terminal, and in a log."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from attribution.runtime import progress as module
from attribution.runtime.pace import Pace
from attribution.runtime.progress import noting, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is written to a terminal; every clock runs a hundred times faster."""
    for name in ("LONG_SECONDS", "LINE_SECONDS", "TICK_SECONDS"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)
    terminal = Terminal()
    # pytest puts its own sys.stderr back between a fixture and its test.
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=terminal))
    return terminal


def wait_for(text: str, heard: Terminal) -> None:
    end = time.monotonic() + 20
    while text not in heard.getvalue():
        assert time.monotonic() < end, heard.getvalue()
        time.sleep(0.01)


def test_a_bar_ticks_and_shows_how_far_each_long_task_is(heard, tmp_path: Path) -> None:
    with (
        progress("finetune: checkpoints", 10, 1, str(tmp_path)) as advance,
        noting(str(tmp_path / "a")) as one,
        noting(str(tmp_path / "b")) as two,
    ):
        one("too early")
        wait_for("1/10", heard)
        assert "too early" not in heard.getvalue()
        time.sleep(2 * module.LONG_SECONDS)
        one("a: epoch 3/20"), two("b: epoch 2/20")
        wait_for("a: epoch 3/20, b: epoch 2/20", heard)
        advance(2)
        wait_for("3/10", heard)
    assert not list(tmp_path.iterdir())  # a finished task says nothing


def test_a_log_has_a_line_a_minute_and_no_bar(heard, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    start = time.monotonic()
    with progress("trak: shards", 4) as advance:
        advance()
        wait_for("trak: shards 1/4, about 10 s left\n", heard)
        advance()
        wait_for("trak: shards 2/4, about 10 s left\n", heard)
    lines = heard.getvalue().splitlines()
    assert len(lines) <= (time.monotonic() - start) / module.LINE_SECONDS
    assert set(lines) <= {f"trak: shards {done}/4, about 10 s left" for done in (1, 2)}


def test_a_bar_also_tells_how_long_the_whole_command_takes(heard) -> None:
    module.follow(Pace({"ablation": 60.0, "evaluate": 300.0}))
    with progress("ablation: retrainings", 10) as advance:
        advance()
        wait_for("about 10 s left, ", heard)
        wait_for(" in all", heard)
    module.follow(Pace())


def test_a_note_without_its_folder_is_not_made(heard, tmp_path: Path) -> None:
    """As on another machine of a cluster."""
    with noting(str(tmp_path / "gone" / "a")) as note:
        time.sleep(2 * module.LONG_SECONDS)
        note("epoch 1/2")
    assert not (tmp_path / "gone").exists()
