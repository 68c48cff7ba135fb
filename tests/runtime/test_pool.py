"""The pool that is this process, and what a task's errors become."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from attribution.runtime import pool
from attribution.runtime.pool import LostWorker, Pool, call, threads_per_task


def raising(error: BaseException) -> None:
    raise error


def test_a_task_runs_here_when_it_is_submitted_with_what_all_share() -> None:
    seen = []
    found = Pool(lambda *given: seen.append(given) or sum(given), (1, 2))
    future = found.submit((3,))
    assert seen == [(1, 2, 3)] and future.done() and found.result(future) == 6


def test_an_error_of_a_task_is_raised_where_its_result_is_asked_for() -> None:
    error = ValueError("mine")
    future = Pool(raising, ()).submit((error,))
    with pytest.raises(ValueError) as caught:
        Pool(raising, ()).result(future)
    assert caught.value is error


def test_ctrl_c_during_a_task_ends_the_command_and_not_only_the_task() -> None:
    with pytest.raises(KeyboardInterrupt):
        Pool(raising, ()).submit((KeyboardInterrupt(),))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "memory ran out (MemoryError)"),
        (torch.OutOfMemoryError("CUDA: 3 GiB\nmore lines"), "memory ran out (CUDA: 3 GiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 TB"), "memory ran out"),
    ],
)
def test_memory_that_ran_out_is_a_lost_worker_of_the_same_machine(error, reason) -> None:
    with pytest.raises(LostWorker) as caught:
        call(raising, error)
    assert (caught.value.reason, caught.value.moved) == (reason, False)


def test_another_runtime_error_is_raised_as_it_is() -> None:
    error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError) as caught:
        call(raising, error)
    assert caught.value is error


def test_a_lost_worker_does_not_keep_what_filled_the_memory() -> None:
    class Large:
        pass

    kept = []

    def fill() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        raise MemoryError

    with pytest.raises(LostWorker) as caught:
        call(fill)
    gc.collect()
    assert kept[0]() is None and caught.value.__context__ is None


def test_workers_share_the_cores_and_one_task_has_the_threads_of_this_process(monkeypatch) -> None:
    monkeypatch.setattr(pool, "cpu_count", lambda: 7)
    assert [threads_per_task(jobs) for jobs in (2, 3, 7, 20)] == [3, 2, 1, 1]
    assert threads_per_task(1) == torch.get_num_threads()
