"""Run a function on all cores for tasks too short for worker processes: in forks, or in threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

from joblib import cpu_count

from attribution.errors import InputError
from attribution.runtime.signals import follow_driver

_function: Callable[[int], Any]  # of a fork


@contextmanager
def on_all_cores(function: Callable[[int], Any], fork: bool) -> Iterator[Callable[[int], Future]]:
    """Yield a function that submits function(argument); an error in the block ends what is running.

    A fork starts in milliseconds and has everything in memory that this process has, so nothing but
    the results is sent. It may run only what needs no lock that a thread of this process may hold,
    such as to read and decode files: PyTorch's DataLoader forks for the same work.

    Args:
        fork: whether forks are worthwhile. Threads do the same outside of Linux, where libraries
            may not survive a fork, and in a daemon, which may have no children.

    Raises:
        InputError: a fork was killed.
    """
    if not fork or sys.platform != "linux" or multiprocessing.current_process().daemon:
        with ThreadPoolExecutor(cpu_count()) as threads:
            yield lambda argument: threads.submit(function, argument)
        return
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    arguments = (function, os.getpid(), stop)
    with ProcessPoolExecutor(cpu_count(), context, _begin_fork, arguments) as forks:
        try:
            yield lambda argument: forks.submit(_run, argument)
        except BrokenProcessPool:
            raise InputError(
                "a process that reads images was killed (often because memory ran out); try again "
                "with more memory"
            ) from None
        except BaseException:
            stop.set()
            raise


def _begin_fork(function: Callable[[int], Any], driver: int, stop: Event) -> None:
    global _function
    _function = function
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    follow_driver(driver, stop)


def _run(argument: int) -> Any:
    return _function(argument)
