"""A signal ends a command within seconds: as an exception first, and by force where that takes too long."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

GRACE_SECONDS = 4.0  # to end workers and to tell the tracking store
AGAIN_SECONDS = 0.05  # until an exception that Python dropped is raised once more
HOLD_SECONDS = 1.5  # that an exception waits for what is to be done whole
# Ctrl-C; what `kill`, batch systems and `mlflow run` send; a terminal that is closed.
STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]

_asked: list[int] = []  # of the block under way
_held = False  # whether an exception has to wait
_pending: list[Callable[[], Any]] = []  # what calls off the raising of the one that waits


def is_stopping() -> bool:
    """Whether a signal has asked for the end: some libraries make another error of the interrupt."""
    return bool(_asked)


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the block on the first signal; later ones do not disturb the clearing up.

    Yields a list that then holds the signal's number: Ray replaces the exception by one of its own. Where
    the clearing up takes more than GRACE_SECONDS (a tracking server that does not answer), the process
    ends without it: worker processes notice, and end too. What is ignored (`nohup`) stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other one
        yield []
        return
    global _asked
    asked: list[int] = []
    _asked = asked

    def stop(number: int, _: object) -> None:
        for each in known:
            signal.signal(each, signal.SIG_IGN)
        if not asked:
            asked.append(number)
            _later(GRACE_SECONDS, os._exit, 128 + number)
        if _held and not _pending:
            signal.signal(number, stop)  # for what comes next, from the timer or a person
            timer = _later(HOLD_SECONDS, signal.pthread_kill, threading.get_ident(), number)
            _pending.extend([timer.cancel, lambda: signal.signal(number, signal.SIG_IGN)])
            return
        _pending.clear()
        raise KeyboardInterrupt(signal.Signals(number).name)

    def unraisable(what: Any) -> None:
        if not (asked and what.exc_type is KeyboardInterrupt):
            hook(what)
            return
        # It was raised in a destructor or a weak reference's callback, where Python drops it: once more.
        signal.signal(asked[0], stop)
        _later(AGAIN_SECONDS, signal.pthread_kill, threading.get_ident(), asked[0])

    known = {each: signal.getsignal(each) for each in STOPPING}
    known = {each: handler for each, handler in known.items() if handler != signal.SIG_IGN}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    for each in known:
        signal.signal(each, stop)
    try:
        yield asked
    finally:
        _asked = []
        sys.unraisablehook = hook
        for each, handler in known.items():
            signal.signal(each, handler)


@contextmanager
def stop_after() -> Iterator[None]:
    """Raise a KeyboardInterrupt that comes in the block at its end: it is done whole or not at all.

    But within HOLD_SECONDS: what does not answer is not waited for.
    """
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
        if _pending:
            for call_off in _pending:
                call_off()
            _pending.clear()
            raise KeyboardInterrupt


def _later(seconds: float, function: Callable, *arguments: Any) -> threading.Timer:
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()
    return timer


def end(code: int) -> NoReturn:
    """End with this exit code without taking Python's modules apart, which takes seconds with PyTorch.

    What is registered with atexit runs: Ray ends its cluster there. Output that cannot be written is
    a failure, as without this.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads on, or a disk is full
            code = code or 1
    os._exit(code)


@contextmanager
def held_for_children() -> Iterator[None]:
    """Start processes in the block that Ctrl-C does not reach: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Undo what the block does to the handling of SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
