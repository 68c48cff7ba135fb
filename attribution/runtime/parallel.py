"""The same map over tasks, here, in worker processes or on a Ray cluster, with finished results kept on disk."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from attribution.errors import InputError
from attribution.runtime.signals import held_for_children

if TYPE_CHECKING:
    from attribution.config import Config

Result = TypeVar("Result")
Files = dict[str, np.ndarray]  # content, uint8 (size,), by path relative to their folder

ATTEMPTS = 3  # as asked, the same again, and with a smaller batch where the task has one
MOVES = 10  # a task whose machine goes away is as good as new, but not for ever
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LostWorker(Exception):
    """A task's worker ended before the task did; `moved` if its whole machine went away."""

    def __init__(self, reason: str, moved: bool = False) -> None:
        super().__init__(reason, moved)
        self.reason, self.moved = reason, moved


def resolve_jobs(jobs: int, device_type: str, tasks: int) -> int:
    """Worker processes for so many tasks: 0 means one a core, or a single one on a GPU.

    Count finished tasks too: the number of workers decides their threads, and so the last bit of
    what they compute, which is not to depend on where an earlier run was killed.
    """
    from joblib import cpu_count  # knows of affinity and of a container's share

    wanted = jobs or (1 if device_type == "cuda" else cpu_count())
    return max(1, min(wanted, tasks))


def threads_per_task(jobs: int) -> int:
    """Threads of each of so many workers: an equal share of this machine's cores.

    Workers that each take all of them slow one another down. A Ray cluster's tasks get the same
    number, whatever machine they come to, so that both backends compute the same bits.
    """
    if jobs == 1:
        import torch

        return torch.get_num_threads()
    return max(1, resolve_jobs(0, "cpu", 1 << 30) // jobs)


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

    With backend=local one job runs in this process, in order, and several in worker processes.
    With backend=ray tasks run on the cluster (see ray_backend). Closing the generator, or an error,
    ends what is still running. A task whose worker process is killed is tried again.

    Args:
        jobs: as resolve_jobs gave it.
        shared: the first arguments of every call; a cluster receives them once a machine.
        config: of the execution options; None is backend=local.
        names: of the tasks, for error messages.
        smaller: the task with a smaller batch, for its last attempt.

    Raises:
        InputError: a task's worker was killed in every attempt, or the cluster cannot be used.
        Exception: whatever a task raises, as it is.
    """
    if not tasks:
        return
    pool: _Pool
    if config and config.backend == "ray":
        from attribution.runtime.ray_pool import RayPool

        pool = RayPool(function, shared, jobs, config)
    else:
        pool = _ThisProcess(function, shared) if jobs == 1 else _Workers(function, shared, jobs)
    names = names or [f"task {i}" for i in range(len(tasks))]
    queue = [_Task(i, task, name, smaller) for i, (task, name) in enumerate(zip(tasks, names))]
    yield from _drive(pool, deque(queue), jobs)


@dataclass
class _Task:
    index: int
    arguments: tuple
    name: str
    smaller: Callable[[tuple], tuple] | None
    deaths: int = 0
    moves: int = 0

    def lost(self, loss: LostWorker, jobs: int) -> None:
        """Prepare the next attempt.

        Raises:
            InputError: there have been enough.
        """
        self.moves += loss.moved
        self.deaths += not loss.moved
        if self.deaths == ATTEMPTS or self.moves == MOVES:
            raise InputError(
                f"jobs={jobs}: {self.name}: {loss.reason}, {self.deaths or self.moves} times in a "
                "row; use fewer jobs, a smaller batch_size or image_size, or more memory"
            )
        batch = ""
        if self.smaller and self.deaths == ATTEMPTS - 1 and not loss.moved:
            self.arguments, batch = self.smaller(self.arguments), " with a smaller batch"
        print(f"{self.name}: {loss.reason}; trying again{batch}", file=sys.stderr, flush=True)


class _Pool(Protocol):
    """Where tasks run; `window` is how many may be submitted at a time.

    `alone`: a killed worker takes the others with it, so what was running is retried one by one,
    which tells whose fault it is.
    """

    @property
    def window(self) -> int: ...
    @property
    def alone(self) -> bool: ...
    def submit(self, arguments: tuple) -> Any: ...
    def wait(self, futures: list) -> Any: ...  # one that is done
    def result(self, future: Any) -> Any: ...  # or raises LostWorker, or what the task raised
    def close(self, futures: list) -> None: ...  # ends what is still running


def _drive(pool: _Pool, waiting: deque[_Task], jobs: int) -> Iterator[tuple[int, Any]]:
    """Keep the pool's window full; only so many arguments and results exist at a time."""
    running: dict[Any, _Task] = {}
    try:
        while waiting or running:
            suspects = [*running.values(), *list(waiting)[:1]] if pool.alone else []
            window = 1 if any(task.deaths for task in suspects) else pool.window
            while waiting and len(running) < window:
                task = waiting.popleft()
                running[pool.submit(task.arguments)] = task
            future = pool.wait(list(running))
            task = running.pop(future)
            try:
                result = pool.result(future)
            except LostWorker as loss:
                task.lost(loss, jobs)
                waiting.appendleft(task)
                continue
            finally:
                del future  # it may hold the result
            yield task.index, result
            del result
    finally:
        pool.close(list(running))


class _ThisProcess:
    """One task at a time, when its result is waited for."""

    window, alone = 1, False

    def __init__(self, function: Callable, shared: tuple) -> None:
        self.function, self.shared = function, shared

    def submit(self, arguments: tuple) -> Callable[[], Any]:
        return lambda: call(self.function, *self.shared, *arguments)

    def wait(self, futures: list) -> Callable[[], Any]:
        return futures[0]

    def result(self, future: Callable[[], Any]) -> Any:
        return future()

    def close(self, futures: list) -> None:
        pass


class _Workers:
    """joblib's worker processes (loky), which stay for the next map.

    Its executor is used directly, since joblib's own map does not tell which task lost its worker.
    """

    alone = True
    executor: ClassVar[Any] = None  # of the last map

    def __init__(self, function: Callable, shared: tuple, jobs: int) -> None:
        self.function, self.shared = function, shared
        self.jobs, self.threads = jobs, threads_per_task(jobs)
        self.window = jobs + 1  # one more, so that no worker waits for this process
        self.environment = dict.fromkeys(_THREAD_VARIABLES, str(self.threads))

    def submit(self, arguments: tuple) -> Any:
        from joblib.externals.loky import get_reusable_executor

        # A new one where the last is broken.
        executor = get_reusable_executor(self.jobs, timeout=300, env=self.environment)
        _Workers.executor = executor
        arguments = (self.function, self.threads, os.getpid(), *self.shared, *arguments)
        with held_for_children():
            return executor.submit(_call_in_worker, *arguments)

    def wait(self, futures: list) -> Any:
        from concurrent.futures import FIRST_COMPLETED, wait

        return wait(futures, return_when=FIRST_COMPLETED).done.pop()

    def result(self, future: Any) -> Any:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        try:
            return future.result()
        except TerminatedWorkerError:
            reason = "its worker process was killed, as happens where memory runs out"
            raise LostWorker(reason) from None

    def close(self, futures: list) -> None:
        if futures:
            end_workers()


def start_workers(jobs: int, function: Callable[[], object]) -> None:
    """Have workers start and call a function while this process does something else on a core of its own.

    The first map adds the one that is missing then.

    Args:
        jobs: as that map will have them, more than one.
        function: imports what tasks will need. What becomes of it is not asked.
    """
    workers = _Workers(function, (), jobs)
    workers.jobs = max(1, min(jobs, resolve_jobs(0, "cpu", 1 << 30) - 1))
    for _ in range(workers.jobs):
        workers.submit(())


def ask(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), from a worker where there is one: it has imported what this process need not."""
    if _Workers.executor:
        given = function, 1, os.getpid(), *arguments
        with suppress(RuntimeError, LostWorker):  # a pool that is broken or ended is one, too
            return _Workers.executor.submit(_call_in_worker, *given).result()
    return function(*arguments)


def end_workers() -> None:
    """Kill this process's workers, idle ones too, which would take seconds to end by themselves."""
    if _Workers.executor:
        _Workers.executor.shutdown(wait=True, kill_workers=True)


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments); memory that runs out is a LostWorker."""
    import torch

    try:
        return function(*arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = f"memory ran out ({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words, on a processor
            raise
        reason = "memory ran out"
    # Outside of the handler: the error's traceback holds on to what fills the memory.
    raise LostWorker(reason)


def call_with_threads(function: Callable[..., Result], threads: int, *arguments: Any) -> Result:
    """The same in a worker process."""
    import warnings

    import torch

    warnings.filterwarnings("ignore")  # each worker would repeat what the driver has said
    torch.set_num_threads(threads)
    return call(function, *arguments)


def _call_in_worker(function: Callable, threads: int, driver: int, *arguments: Any) -> Any:
    _end_with(driver)
    return call_with_threads(function, threads, *arguments)


@cache
def _end_with(driver: int) -> None:
    """End this worker when its driver has ended, however it did: no orphan goes on training."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_folder(folder: Path) -> Files:
    """The content of all files under a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): np.fromfile(p, np.uint8) for p in paths}


def write_folder(folder: Path, files: Files) -> None:
    """Make a folder of these files; it appears whole or not at all, and one that is there stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.data)  # numpy's tofile does not notice a full disk
        with suppress(OSError):  # another process was first, with the same result
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        np.savez(temporary, allow_pickle=False, **arrays)
        os.replace(temporary, self.folder / f"{key}.npz")
