"""Forks for short tasks: what they return, and that none outlives its driver or an error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attribution.errors import InputError
from attribution.runtime.forked import on_all_cores

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")


@pytest.mark.parametrize("fork", [True, False])
def test_a_closure_is_computed_and_its_error_is_raised_here(fork: bool) -> None:
    numbers = list(range(50))

    def function(i: int) -> int:
        if i == 7:
            raise InputError("i=7: not wanted")
        return numbers[i] ** 2

    with on_all_cores(function, fork) as submit:
        assert [submit(i).result() for i in range(5)] == [0, 1, 4, 9, 16]
    with (
        pytest.raises(InputError, match="^i=7: not wanted$"),
        on_all_cores(function, fork) as submit,
    ):
        submit(7).result()


@linux
def test_a_killed_fork_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="was killed"), on_all_cores(os._exit, True) as submit:
        submit(3).result()


@linux
def test_an_error_ends_forks_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), on_all_cores(time.sleep, True) as submit:
        submit(600)
        submit(600)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 60
    assert not [p for p in multiprocessing.active_children() if "ForkProcess" in type(p).__name__]


def _in_a_daemon(connection) -> None:
    with on_all_cores(lambda _: os.getpid(), True) as submit:
        connection.send(submit(0).result() == os.getpid())


@linux
def test_a_daemon_which_may_have_no_children_uses_threads() -> None:
    here, there = multiprocessing.Pipe()
    daemon = multiprocessing.get_context("fork").Process(
        target=_in_a_daemon, args=(there,), daemon=True
    )
    daemon.start()
    assert here.poll(60) and here.recv()
    daemon.join()


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_fork_outlives_a_driver_that_a_signal_ends(number: int) -> None:
    code = """if True:
        import time, os
        from attribution.runtime.forked import on_all_cores
        from attribution.runtime.signals import ended_by_signals
        def work(_):
            print(os.getpid(), flush=True)
            time.sleep(600)
        with ended_by_signals(), on_all_cores(work, True) as submit:
            submit(0).result()"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Whoever runs the tests in the background lets them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    fork = Path(f"/proc/{int(driver.stdout.readline())}")
    driver.send_signal(number)
    driver.wait(60)
    deadline = time.monotonic() + 30
    while fork.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not fork.exists()
