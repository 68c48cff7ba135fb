"""The pool of parallel_map on a Ray cluster, whose machines share no disk with this one."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from joblib import cpu_count

from attribution.config import Config
from attribution.errors import InputError, reason
from attribution.runtime.pool import LostWorker, Pool, call, prepare_worker, threads_per_task
from attribution.runtime.safe_files import Files, read_folder, write_folder

# Workers search this copy of our packages first, whichever version their machine has.
PROJECT = {
    "working_dir": str(Path(__file__).resolve().parents[2]),
    "excludes": ["/*", "!/.", "!/attribution", "!/scripts", "__pycache__"],  # as in .gitignore
}
ANSWER_SECONDS = 20  # for a cluster to accept a driver


class RayPool(Pool):
    """Run each task as one Ray task.

    ray.util.joblib is not used: it submits all tasks at once, reserves no GPU per task, and cannot
    tell a task that ran out of memory from one whose machine was lost. Ray's own retries are off,
    because they repeat a task that ran out of memory unchanged. Ray ends a worker after each GPU
    task, which frees the GPU's memory.

    Args:
        jobs: from resolve_jobs; decides the threads of a task. How many tasks run at a time is
            config.jobs, or as many as the cluster has room for.
    """

    def __init__(self, function: Callable, shared: tuple, jobs: int, config: Config) -> None:
        if config.device.startswith("cuda:"):
            raise InputError(f"device={config.device}: Ray chooses the GPU; use device=cuda")
        self.ray = connect(config.ray_address)
        self.config, self.threads = config, threads_per_task(jobs)
        self.gpus = config.gpus_per_task if config.device == "cuda" else 0
        room = self._room()
        if not room:
            raise InputError(self._no_room())
        # More threads than cores are slower, but compute the same bits.
        self.cpus = min(self.threads, max(room))
        self.remote = self.ray.remote(_run).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0
        )
        # Ray copies one object once to each machine, into memory that all workers there share.
        super().__init__(function, self.ray.put(tuple(_pack(value) for value in shared)))

    def _room(self) -> list[int]:
        """Number of cores of each living machine that has the GPUs for a task."""
        living = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        cores = [int(found.get("CPU", 0)) for found in living if found.get("GPU", 0) >= self.gpus]
        return [count for count in cores if count]

    def _no_room(self) -> str:
        if self.gpus:
            return (
                f"gpus_per_task={self.gpus:g}: no machine of the cluster has a core and that many "
                "GPUs; lower it, or use device=cpu"
            )
        return f"ray_address={self.config.ray_address}: no machine of the cluster has a core"

    @property
    def window(self) -> int:  # type: ignore[override]
        """config.jobs, or twice the number of tasks that the cores of the cluster can run now."""
        return self.config.jobs or max(1, 2 * (sum(self._room()) // self.cpus))

    def submit(self, arguments: tuple) -> Future:
        """Start function(*shared, *arguments) on a machine that Ray chooses."""
        packed = [_pack(value) for value in arguments]
        return self.remote.remote(self.function, self.threads, self.shared, *packed).future()

    def result(self, future: Future) -> Any:
        """The result of a finished task; its arrays are read-only, in Ray's shared memory."""
        e = self.ray.exceptions
        try:
            return future.result()
        except e.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
        except (e.OutOfMemoryError, e.WorkerCrashedError):
            cause = LostWorker("its worker process was killed (often because memory ran out)")
        except (e.NodeDiedError, e.ObjectLostError) as error:
            cause = LostWorker(f"its machine was lost ({type(error).__name__})", moved=True)
        raise cause

    def close(self, running: Collection[Future]) -> None:
        """Cancel the running tasks, for at most 10 s."""
        references = [future.object_ref for future in running]  # type: ignore[attr-defined]
        deadline = time.monotonic() + 10
        while references and time.monotonic() < deadline:
            for reference in references:
                self.ray.cancel(reference, force=True)
            # Repeatedly, because Ray forgets a cancellation while the worker is starting.
            _, references = self.ray.wait(references, num_returns=len(references), timeout=0.5)
        self.shared = ()


def connect(address: str) -> ModuleType:
    """Connect this process to a cluster, or start one on this machine; return the `ray` package.

    An existing connection is used. Ray disconnects, and ends a cluster that it started here, when
    the process ends.

    Raises:
        InputError: Ray is not installed, or no cluster answers at the address within 30 s.
    """
    try:
        import ray
    except ImportError:
        raise InputError("backend=ray: Ray is not installed; pip install -e '.[ray]'") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS", "")
    # Workers print nothing here: their errors are raised in this process.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address in ("", "local"):
        address = "local"
        options |= {"num_cpus": cpu_count(), "include_dashboard": False}
    else:
        _check_answer(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, runtime_env=PROJECT, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, reason(error)) from None
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:  # Ray's handler would exit at once
            signal.signal(signal.SIGTERM, before)
    return ray


def _check_answer(address: str) -> None:
    """Connect in a child process first: with a dead address ray.init takes 80 s and then exits."""
    if "://" in address:
        raise InputError(f"ray_address={address}: Ray Client is not supported; give host:port")
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError, OverflowError) as error:
            raise _no_cluster(address, reason(error)) from None
    code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
    command = [sys.executable, "-c", code, address]
    try:
        done = subprocess.run(command, timeout=ANSWER_SECONDS, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, f"no answer in {ANSWER_SECONDS} s") from None
    if done.returncode:
        last_lines = done.stderr.strip().splitlines()[-1:]
        raise _no_cluster(address, " ".join(last_lines)[:200])


def _no_cluster(address: str, why: str) -> InputError:
    return InputError(
        f"ray_address={address}: no Ray cluster answers there ({why}); start one with "
        "`ray start --head` and give its host:port, or leave it empty"
    )


@dataclass(frozen=True)
class _Packed:
    """A folder of the driver's disk as bytes; `config` is the Config whose model it is, if any."""

    files: Files
    config: Config | None = None

    def unpack(self, folder: Path) -> Path | Config:
        """Write the files to a new folder, and return what names it."""
        write_folder(folder, self.files)
        return replace(self.config, model=str(folder)) if self.config else folder


def _pack(value: Any) -> Any:
    """Replace a value that names files of this machine by one that contains them.

    A value of another type does so in its method `portable()`, if it has one.
    """
    if hasattr(value, "portable"):
        return value.portable()
    if isinstance(value, Path):
        return _Packed(read_folder(value))
    if isinstance(value, Config) and Path(value.model).is_dir():
        return _Packed(read_folder(Path(value.model)), value)
    return value


def _run(function: Callable, threads: int, shared: tuple, *arguments: Any) -> Any:
    """Run one task, on the machine that Ray chose."""
    prepare_worker(threads)
    with tempfile.TemporaryDirectory() as scratch:
        values = [
            value.unpack(Path(scratch) / str(i)) if isinstance(value, _Packed) else value
            for i, value in enumerate((*shared, *arguments))
        ]
        return call(function, *values)
