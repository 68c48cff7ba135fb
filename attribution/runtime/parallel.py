"""Map a function over tasks: in this process, in worker processes or on a Ray cluster."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from joblib import cpu_count
from joblib.externals.loky import get_reusable_executor, reusable_executor

from attribution.config import Config
from attribution.errors import InputError
from attribution.runtime.pool import LostWorker, Pool, call, prepare_worker, threads_per_task
from attribution.runtime.progress import say
from attribution.runtime.ray_pool import RayPool
from attribution.runtime.signals import GRACE_SECONDS, follow_driver, is_stopping

Result = TypeVar("Result")

ATTEMPTS = 3  # twice as submitted, then with a smaller batch if the task has one
MOVES = 10  # attempts of a task whose machine goes away each time
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def resolve_jobs(jobs: int, device_type: str, tasks: int) -> int:
    """Number of worker processes: `jobs`, or if that is 0 one per core, or one on a GPU.

    Args:
        tasks: the most that are useful. Count finished tasks too: the number of workers decides
            their threads, and so the last bit of a result, which must not change after a restart.
    """
    wanted = jobs or (1 if device_type == "cuda" else cpu_count())
    return max(1, min(wanted, tasks))


def parallel_map(
    function: Callable[..., Result],
    tasks: Sequence[tuple],
    jobs: int,
    shared: tuple = (),
    config: Config | None = None,
    names: Sequence[str] = (),
    smaller: Callable[[tuple], tuple] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (task index, function(*shared, *task)) as results arrive.

    With one job, tasks run in this process, in order. A task whose worker dies is tried again.
    Closing the generator, or an error, ends the tasks that are still running. Only a few tasks and
    results are in memory at a time.

    Args:
        jobs: from resolve_jobs.
        shared: the first arguments of every call; Ray copies them once to each machine.
        config: says with `backend` where tasks run; None means on this machine.
        names: of the tasks, for messages.
        smaller: makes the same task with a smaller batch, for the last attempt.

    Raises:
        InputError: the worker of a task died in every attempt, or the cluster cannot be used.
        Exception: raised by a task.
    """
    if not tasks:
        return
    names = names or [f"task {i}" for i in range(len(tasks))]
    waiting = deque(_Task(i, name, task) for i, (name, task) in enumerate(zip(names, tasks)))
    running: dict[Future, _Task] = {}
    suspects: set[int] = set()  # tasks whose worker died, until they succeed
    pool = _choose_pool(function, shared, jobs, config)
    try:
        while waiting or running:
            # Where workers die together, retry one task at a time to find the guilty one.
            window = 1 if suspects and pool.shares_fate else pool.window
            while waiting and len(running) < window:
                task = waiting.popleft()
                running[pool.submit(task.arguments)] = task
            future = wait(running, return_when=FIRST_COMPLETED).done.pop()
            task = running.pop(future)
            try:
                result = pool.result(future)
            except LostWorker as loss:
                suspects.add(task.index)
                task.prepare_retry(loss, smaller, jobs)
                waiting.appendleft(task)
                continue
            finally:
                del future  # it holds the result
            suspects.discard(task.index)
            yield task.index, result
            del result
    finally:
        pool.close(running)


def _choose_pool(function: Callable, shared: tuple, jobs: int, config: Config | None) -> Pool:
    if config and config.backend == "ray":
        return RayPool(function, shared, jobs, config)
    return Pool(function, shared) if jobs == 1 else Workers(function, shared, jobs)


@dataclass
class _Task:
    index: int
    name: str
    arguments: tuple
    losses: Counter[bool] = field(default_factory=Counter)  # by whether its machine was lost

    def prepare_retry(
        self, loss: LostWorker, smaller: Callable[[tuple], tuple] | None, jobs: int
    ) -> None:
        """Count the loss, and make the batch smaller for the last attempt.

        Raises:
            InputError: that was the last attempt.
        """
        self.losses[loss.moved] += 1
        count = self.losses[loss.moved]
        if count == (MOVES if loss.moved else ATTEMPTS):
            raise InputError(
                f"jobs={jobs}: {self.name}: {loss.reason}, {count} times in a row; use fewer "
                "jobs, a smaller batch_size or image_size, or more memory"
            )
        batch = ""
        if smaller and count == ATTEMPTS - 1 and not loss.moved:
            self.arguments, batch = smaller(self.arguments), " with a smaller batch"
        say(f"{self.name}: {loss.reason}; trying again{batch}")


class Workers(Pool):
    """Worker processes of this machine (loky's, from joblib), which stay for the next map."""

    shares_fate = True

    def __init__(self, function: Callable, shared: tuple, jobs: int) -> None:
        super().__init__(function, shared)
        self.jobs = jobs
        self.window = jobs + 1  # one is ready when a worker becomes free

    def submit(self, arguments: tuple) -> Future:
        """Start function(*shared, *arguments) in a worker."""
        threads = threads_per_task(self.jobs)
        # New workers start if the last ones died or had another number of threads.
        executor = get_reusable_executor(
            self.jobs,
            timeout=300,
            initializer=_begin_worker,
            initargs=(threads, os.getpid()),
            env=dict.fromkeys(_THREAD_VARIABLES, str(threads)),
        )
        return executor.submit(call, self.function, *self.shared, *arguments)

    def result(self, future: Future) -> Any:
        """The result of a finished task."""
        try:
            return future.result()
        except BrokenProcessPool:
            reason = "its worker process was killed (often because memory ran out)"
            raise LostWorker(reason) from None

    def close(self, running: Collection[Future]) -> None:
        """End all workers if one of them is busy."""
        if running:
            end_workers()


def _begin_worker(threads: int, driver: int) -> None:
    follow_driver(driver)
    prepare_worker(threads)


def end_workers() -> None:
    """Kill the workers, also idle ones, which would take seconds to end by themselves.

    On a busy machine that takes seconds too, for loky looks for children of each worker. A command
    that is stopping waits only so long that it can still mark its runs; a worker without its driver
    ends by itself.
    """
    executor = reusable_executor._executor
    if executor:
        kill = partial(executor.shutdown, wait=True, kill_workers=True)
        ending = threading.Thread(target=kill, daemon=True)
        ending.start()
        ending.join(GRACE_SECONDS / 2 if is_stopping() else None)
