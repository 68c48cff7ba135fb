"""The same map over tasks, in this process or in worker processes, with finished results kept on disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


def resolve_jobs(jobs: int, device_type: str, tasks: int) -> int:
    """Worker processes for so many tasks: 0 means one a core, or a single one on a GPU.

    Count finished tasks too: the number of workers decides their threads, and so the last bit of
    what they compute, which is not to depend on where an earlier run was killed.
    """
    from joblib import cpu_count  # knows of affinity and of a container's share

    wanted = jobs or (1 if device_type == "cuda" else cpu_count())
    return max(1, min(wanted, tasks))


def parallel_map(
    function: Callable[..., Result], tasks: Sequence[tuple], jobs: int
) -> Iterator[tuple[int, Result]]:
    """Yield (task index, function(*task)) as results arrive; an error in a task is raised here.

    Every worker gets an equal share of the cores as threads: workers that each take all of them
    slow one another down. With one job the tasks run in this process, in order.
    """
    cores = resolve_jobs(0, "cpu", 1 << 30)
    if jobs == 1:
        for index, task in enumerate(tasks):
            yield index, function(*task)
        return
    from joblib import Parallel, delayed, parallel_config

    threads = max(1, cores // jobs)
    with parallel_config(backend="loky", inner_max_num_threads=threads):
        workers = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        yield from workers(
            delayed(_call)(function, index, task, threads, os.getpid())
            for index, task in enumerate(tasks)
        )


def _call(
    function: Callable, index: int, task: tuple, threads: int, driver: int
) -> tuple[int, Any]:
    import warnings

    import torch

    _end_with(driver)
    warnings.filterwarnings("ignore")  # each worker would repeat what the driver has said
    torch.set_num_threads(threads)
    return index, function(*task)


@cache
def _end_with(driver: int) -> None:
    """End this worker when its driver has ended, however it did: no orphan goes on training."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class ResultStore:
    """Small results by key, one .npz file each: what a killed run had finished is not lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays kept under a key; None where there are none, or they cannot be read."""
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as file:
                return dict(file) or None
        except Exception:  # zipfile and numpy raise many kinds on a damaged file
            return None

    def put(self, key: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays under a key; the file appears whole or not at all."""
        temporary = self.folder / f".{key}.{os.getpid()}.npz"
        np.savez(temporary, **arrays)
        os.replace(temporary, self.folder / f"{key}.npz")
