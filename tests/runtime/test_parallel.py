"""The map over tasks, in this process and in workers, and the store of finished results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import InputError
from attribution.runtime import parallel
from attribution.runtime.parallel import (
    ATTEMPTS,
    MOVES,
    end_workers,
    parallel_map,
    resolve_jobs,
)
from attribution.runtime.pool import LostWorker
from attribution.runtime.signals import ended_by_signals

ROOT = Path(__file__).resolve().parents[2]


# Two workers take ten seconds to start.
HERE_AND_IN_WORKERS = [1, pytest.param(2, marks=pytest.mark.slow)]


def difference(a: int, b: int) -> int:
    return a - b


def refuse(value: int) -> int:
    if value == 2:
        raise InputError(f"value={value}: not wanted")
    return value


def where_am_i(_: int) -> tuple[int, int]:
    import torch

    return os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("jobs", HERE_AND_IN_WORKERS)
def test_bad_input_in_a_task_is_raised_here_as_bad_input_and_the_next_map_works(jobs: int) -> None:
    with pytest.raises(InputError) as caught:
        list(parallel_map(refuse, [(i,) for i in range(4)], jobs))
    assert str(caught.value) == "value=2: not wanted"
    assert sorted(parallel_map(refuse, [(0,), (1,)], jobs)) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("jobs", HERE_AND_IN_WORKERS)
def test_every_result_comes_once_with_the_index_of_its_task(jobs: int) -> None:
    tasks = [(10 * i, i) for i in range(7)]
    found = list(parallel_map(difference, tasks, jobs))
    assert sorted(found) == [(i, 9 * i) for i in range(7)]


def test_with_one_job_tasks_run_here_in_order_and_only_when_asked_for() -> None:
    seen: list[int] = []
    results = parallel_map(seen.append, [(i,) for i in range(3)], 1)
    assert next(results)[0] == 0 and seen == [0]
    assert [index for index, _ in results] == [1, 2] and seen == [0, 1, 2]


@pytest.mark.slow
def test_workers_are_other_processes_with_an_equal_share_of_the_threads() -> None:
    results = [found for _, found in parallel_map(where_am_i, [(i,) for i in range(4)], 2)]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert os.getpid() not in {pid for pid, _ in results}
    assert {threads for _, threads in results} == {share}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_ctrl_c_does_not_reach_workers() -> None:
    before = worker_pids()
    for pid in before:
        os.kill(pid, signal.SIGINT)
    worker_pids()  # without those that a signal ended, new ones would do this
    assert all(is_running(pid) for pid in before)


def worker_pids() -> set[int]:
    return {pid for _, (pid, _) in parallel_map(where_am_i, [(i,) for i in range(6)], 2)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_workers_end_when_their_driver_is_killed() -> None:
    code = """if True:
        import os, time
        from attribution.runtime.parallel import parallel_map
        print(next(parallel_map(os.getpid, [(), ()], 2))[1], flush=True)
        time.sleep(600)"""
    command = [sys.executable, "-c", code]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(driver.stdout.readline())
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


@pytest.mark.parametrize("jobs", HERE_AND_IN_WORKERS)
def test_no_tasks_give_no_results(jobs: int) -> None:
    assert list(parallel_map(difference, [], jobs)) == []


@given(st.integers(0, 64), st.integers(0, 100))
def test_there_are_never_more_workers_than_tasks_or_than_asked_for(jobs: int, tasks: int) -> None:
    resolved = resolve_jobs(jobs, "cpu", tasks)
    assert 1 <= resolved <= max(1, tasks)
    assert not jobs or resolved <= jobs


def test_zero_jobs_are_one_a_core_on_a_processor_and_one_on_a_gpu() -> None:
    assert resolve_jobs(0, "cpu", 1000) == len(os.sched_getaffinity(0))
    assert resolve_jobs(0, "cuda", 1000) == 1
    assert resolve_jobs(3, "cuda", 1000) == 3


# A worker that is killed


def dies_once(folder: Path, index: int) -> int:
    """The third task is killed the first time."""
    marker = folder / "killed"
    if index == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return index


@pytest.mark.slow
def test_what_a_killed_worker_had_begun_is_done_again_and_named(tmp_path: Path, capfd) -> None:
    tasks = [(i,) for i in range(6)]
    found = parallel_map(
        dies_once, tasks, 2, (tmp_path,), names=[f"retraining {i}" for i in "abcdef"]
    )
    assert sorted(found) == [(i, i) for i in range(6)]
    shown = [line for line in capfd.readouterr().err.splitlines() if "trying again" in line]
    assert any(line.startswith("retraining c: its worker process was killed") for line in shown)
    assert len(shown) <= 3  # what the two workers had, and the one that was waiting for them


@pytest.mark.slow
def test_idle_workers_are_ended_at_once() -> None:
    before = worker_pids()
    end_workers()
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def losing(times: int, moved: bool = False, error: type[Exception] = LostWorker):
    """A task of this process that loses its worker so many times, and every batch it was given."""
    batches: list[int] = []

    def function(batch: int) -> int:
        batches.append(batch)
        if len(batches) <= times:
            raise LostWorker("its machine went away", moved) if error is LostWorker else error()
        return batch

    return function, batches


def smaller(task: tuple) -> tuple:
    return (task[0] // 4,)


@pytest.mark.parametrize("error", [LostWorker, MemoryError])
def test_the_last_attempt_has_a_smaller_batch(error: type[Exception]) -> None:
    function, batches = losing(ATTEMPTS - 1, error=error)
    assert list(parallel_map(function, [(64,)], 1, smaller=smaller)) == [(0, 16)]
    assert batches == [64] * (ATTEMPTS - 1) + [16]


def test_a_task_that_loses_every_worker_is_named_in_one_line() -> None:
    function, batches = losing(99, error=MemoryError)
    with pytest.raises(InputError, match="jobs=1: checkpoint 007: memory ran out .*, 3 times"):
        list(parallel_map(function, [(64,)], 1, names=["checkpoint 007"]))
    assert len(batches) == ATTEMPTS


def test_a_machine_that_goes_away_changes_no_batch() -> None:
    function, batches = losing(MOVES - 1, moved=True)
    assert list(parallel_map(function, [(64,)], 1, smaller=smaller)) == [(0, 64)]
    assert batches == [64] * MOVES
    function, batches = losing(MOVES, moved=True)
    with pytest.raises(InputError, match="task 0: its machine went away, 10 times"):
        list(parallel_map(function, [(64,)], 1, smaller=smaller))


def test_a_command_that_is_stopping_does_not_wait_for_slow_workers(monkeypatch) -> None:
    for_ever = threading.Event()

    class Slow:
        def shutdown(self, **_: bool) -> None:
            for_ever.wait()

    monkeypatch.setattr(parallel.reusable_executor, "_executor", Slow())
    monkeypatch.setattr(parallel, "GRACE_SECONDS", 0.02)
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for_ever.wait(60)  # the signal ends this
        finally:
            end_workers()
    for_ever.set()
