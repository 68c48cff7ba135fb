"""A signal ends a command within seconds: as an exception first, and by force where that takes too long."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GRACE_SECONDS = 4.0  # to end workers and to tell the tracking store
# Ctrl-C; what `kill`, batch systems and `mlflow run` send; a terminal that is closed.
STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Stopped(KeyboardInterrupt):
    """This process was asked to end by the signal with this number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise Stopped in the block on the first signal; later ones do not disturb the clearing up.

    Where the clearing up takes more than GRACE_SECONDS (a tracking server that does not answer), the
    process ends without it: worker processes notice, and end too. What is ignored (`nohup`) stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # Python lets no other one
        yield
        return

    def stop(number: int, _: object) -> None:
        for each in known:
            signal.signal(each, signal.SIG_IGN)
        timer = threading.Timer(GRACE_SECONDS, os._exit, [128 + number])
        timer.daemon = True
        timer.start()
        raise Stopped(number)

    known = {each: signal.getsignal(each) for each in STOPPING}
    known = {each: handler for each, handler in known.items() if handler != signal.SIG_IGN}
    for each in known:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in known.items():
            signal.signal(each, handler)


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
