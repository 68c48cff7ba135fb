"""Signals end a command as an exception, and by force where clearing up takes too long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from places import Place

from attribution.runtime.signals import STOPPING, ended_by_signals

NewPlace = Callable[..., Place]

ROOT = Path(__file__).resolve().parents[2]


def living() -> list[threading.Thread]:
    """Threads that are not about to end."""
    time.sleep(0.2)
    return threading.enumerate()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_an_exception_and_the_next_one_is_not(number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)  # in a shell's background: ignored
    cleared_up = False
    with pytest.raises(KeyboardInterrupt), ended_by_signals() as asked:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)
            cleared_up = True
    assert asked == [number] and cleared_up
    assert not any(isinstance(thread, threading.Timer) for thread in living())  # none ends us later
    assert signal.signal(number, before) == signal.default_int_handler


def test_a_signal_is_not_lost_in_a_callback_whose_exceptions_python_drops() -> None:
    class Target:
        pass

    def callback(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    target = Target()
    kept = weakref.ref(target, callback)
    with pytest.raises(KeyboardInterrupt), ended_by_signals() as asked:
        del target
        time.sleep(2)
    assert kept() is None and asked == [signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("block", ["signals.ended_by_signals()", "signals.stop_after()"])
def test_a_block_that_takes_too_long_to_end_is_cut_short(block: str) -> None:
    code = f"""if True:
        import os, signal, time
        from attribution.runtime import signals
        signals.GRACE_SECONDS = 0.1
        with signals.ended_by_signals(), {block}:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                time.sleep(60)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM


def test_the_end_runs_what_is_registered_and_does_not_take_itself_apart() -> None:
    code = """if True:
        import atexit
        from attribution.runtime import signals
        class Slow:
            def __del__(self):
                print("taken apart")
        slow = Slow()
        atexit.register(print, "cluster ended")
        print("said", end=", ")
        signals.end(3)"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, timeout=50, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said, cluster ended\n", "")


@pytest.mark.parametrize("code, expected", [(0, 1), (2, 2)])
def test_a_command_whose_output_could_not_be_written_has_failed(code: int, expected: int) -> None:
    program = f"from attribution.runtime import signals\nprint('said')\nsignals.end({code})"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, timeout=50, stdout=full, env=buffered)
    assert done.returncode == expected
