"""Messages and progress bars on stderr; results go to stdout."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from attribution.errors import redact
from attribution.runtime.pace import Pace, duration

LONG_SECONDS = 10.0  # a task that takes longer says how far it is
LINE_SECONDS = 60.0  # between the lines that replace the bar where there is no terminal
TICK_SECONDS = 1.0
# Without tqdm's own estimate of the time left, which knows nothing of tasks that are half done.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


_pace = Pace()


def follow(pace: Pace) -> None:
    """Let progress bars tell how long the whole command still takes."""
    global _pace
    _pace = pace


@contextmanager
def progress(
    name: str, total: int, done: int = 0, notes: str = ""
) -> Iterator[Callable[..., None]]:
    """Show a progress bar, or a line each minute where there is no terminal.

    Args:
        notes: the folder of the files that tasks write with `noting`.

    Yields:
        The function that advances the bar, by 1 or by its argument.
    """
    shown = {"file": sys.stderr, "disable": None, "leave": False}  # None: on a terminal only
    form = BAR if total else None
    with tqdm(desc=name, total=total, initial=done, bar_format=form, **shown) as bar:
        count, ended = done, threading.Event()

        def advance(by: int = 1) -> None:
            nonlocal count
            count += by
            bar.update(by)

        def tick() -> None:  # tasks may take minutes: the clock shows that they run
            start = told = time.monotonic()
            while not ended.wait(TICK_SECONDS):
                words, elapsed = _read(notes), time.monotonic() - start
                epochs = re.findall(r"epoch (\d+)/(\d+)", words)
                made = count - done + sum(int(a) / int(b) for a, b in epochs)
                left = _left(name, made, total - done - made, elapsed)
                if not bar.disable:
                    bar.set_postfix_str(", ".join(filter(None, [left, words])))
                elif time.monotonic() - told > LINE_SECONDS:
                    told = time.monotonic()
                    say(", ".join(filter(None, [f"{name} {count}/{total}", left, words])))

        threading.Thread(target=tick, daemon=True).start()
        try:
            yield advance
        finally:
            ended.set()


def _left(name: str, made: float, left: float, elapsed: float) -> str:
    """How long a bar, and then the command, still takes, in words; empty before a twentieth is made."""
    if not 0 < left < 20 * made:
        return ""
    own, whole = map(duration, _pace.left(name, made, left, elapsed))
    return f"about {own} left" + (f", {whole} in all" if whole != own else "")


@contextmanager
def noting(file: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that notes how far a task is, for the progress of the process that waits.

    It does nothing in a task's first seconds, nor on another machine, which lacks the folder.
    """
    start = time.monotonic()

    def note(text: str) -> None:
        if time.monotonic() - start > LONG_SECONDS:
            with suppress(OSError):
                Path(file).write_text(text, encoding="utf-8")

    try:
        yield note
    finally:
        with suppress(OSError):
            Path(file).unlink()


def _read(notes: str) -> str:
    """The notes of the tasks that are running."""
    texts = []
    for file in sorted(Path(notes).iterdir()) if notes else []:
        with suppress(OSError):  # its task has just ended
            texts.append(file.read_text(encoding="utf-8"))
    return ", ".join(filter(None, texts))


def say(message: str) -> None:
    """Write a line to stderr, without credentials."""
    print(redact(message), file=sys.stderr, flush=True)
