"""Where the tasks of parallel_map run: the interface of a pool, and the pool that is this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

from joblib import cpu_count  # respects CPU affinity and a container's limit

Result = TypeVar("Result")


class LostWorker(Exception):
    """Raised when a worker process dies or runs out of memory. `moved`: its whole machine was lost."""

    def __init__(self, reason: str, moved: bool = False) -> None:
        super().__init__(reason, moved)
        self.reason, self.moved = reason, moved


class Pool:
    """Run tasks in this process, each when it is submitted.

    Attributes:
        window: how many tasks may be submitted at a time.
        shares_fate: whether the death of one worker ends the tasks of all workers.
    """

    window = 1
    shares_fate = False

    def __init__(self, function: Callable, shared: tuple) -> None:
        self.function, self.shared = function, shared

    def submit(self, arguments: tuple) -> Future:
        """Start function(*shared, *arguments)."""
        future: Future = Future()
        try:
            future.set_result(call(self.function, *self.shared, *arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def result(self, future: Future) -> Any:
        """The result of a finished task.

        Raises:
            LostWorker: its worker died.
            Exception: raised by the task.
        """
        return future.result()

    def close(self, running: Collection[Future]) -> None:
        """End the tasks that are still running."""


def threads_per_task(jobs: int) -> int:
    """Threads of each worker: an equal share of this machine's cores.

    A task on a Ray cluster gets the same number, so that both backends compute the same bits.
    """
    if jobs == 1:
        import torch  # slow to import, and the driver starts its workers first

        return torch.get_num_threads()
    return max(1, cpu_count() // jobs)


def prepare_worker(threads: int) -> None:
    """Set the threads of a worker process, and silence warnings that the driver shows already."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return function(*arguments).

    Raises:
        LostWorker: memory ran out.
        Exception: raised by the function.
    """
    import torch

    try:
        return function(*arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        first_line = str(error).split("\n")[0]
        reason = f"memory ran out ({first_line or 'MemoryError'})"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch on a CPU
            raise
        reason = "memory ran out"
    # Raised outside the handlers: the error's traceback keeps the large arrays alive.
    raise LostWorker(reason)
