"""End a command within seconds of a signal: first by an exception, by force if that takes too long."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

GRACE_SECONDS = 4.0  # to end workers and to mark the runs
AGAIN_SECONDS = 0.05  # until an exception that Python dropped is raised once more
# Ctrl-C; `kill`, batch systems and `mlflow run`; a closed terminal.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Handler:
    """Raise KeyboardInterrupt on the first signal, and ignore later ones.

    Attributes:
        asked: the number of the signal, or empty.
        waits: whether stop_after raises the exception.
        timers: that end the process, or raise the exception once more.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.waits = False
        self.timers: list[threading.Timer] = []

    def __call__(self, number: int, _: object) -> None:
        if self.asked:
            return
        self.asked.append(number)
        self._later(GRACE_SECONDS, os._exit, 128 + number)
        if not self.waits:
            raise KeyboardInterrupt(signal.Signals(number).name)

    def raise_again(self, dropped: Any) -> None:
        """Handle an exception that Python dropped, as it does in destructors and weakref callbacks."""
        if self.asked and dropped.exc_type is KeyboardInterrupt:
            self._later(AGAIN_SECONDS, os.kill, os.getpid(), self.asked.pop())
        else:
            sys.__unraisablehook__(dropped)

    def _later(self, seconds: float, function: Callable, *arguments: Any) -> None:
        timer = threading.Timer(seconds, function, arguments)
        timer.daemon = True
        timer.start()
        self.timers.append(timer)


_handler = _Handler()  # of the block in progress; signals belong to the whole process


def is_stopping() -> bool:
    """Whether a signal has arrived; some libraries replace the KeyboardInterrupt by their own error."""
    return bool(_handler.asked)


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Turn the first signal in the block into a KeyboardInterrupt; yield a list that gets its number.

    If the block has not ended GRACE_SECONDS later, for instance because a tracking server does not
    answer, the process exits. A signal that is ignored, as under `nohup`, stays ignored.
    """
    global _handler
    own = _handler = _Handler()
    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, own) for number in handled]
    hook, sys.unraisablehook = sys.unraisablehook, own.raise_again
    try:
        yield own.asked
    finally:
        for number, handler in zip(handled, before):
            signal.signal(number, handler)
        sys.unraisablehook = hook
        for timer in own.timers:
            timer.cancel()
        _handler = _Handler()


@contextmanager
def stop_after() -> Iterator[None]:
    """Delay the KeyboardInterrupt of a signal to the end of the block, which is never half done."""
    handler, stopping = _handler, is_stopping()
    handler.waits = True
    try:
        yield
    finally:
        handler.waits = False
    if handler.asked and not stopping:
        raise KeyboardInterrupt


def follow_driver(driver: int, told: Event | None = None) -> None:
    """In a worker: leave Ctrl-C to the driver, and end once told to, or when the driver is gone.

    Args:
        driver: its process id. If it was killed, it could tell nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting = told or threading.Event()

    def watch() -> None:
        while not waiting.wait(1) and os.getppid() == driver:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end(code: int) -> NoReturn:
    """Exit now, without the seconds that Python needs to tear PyTorch down; atexit functions run.

    Unwritten output is a failure, as in a normal exit.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe or a full disk
            code = code or 1
    os._exit(code)
