"""Runs the tasks of parallel_map on a Ray cluster whose machines share no disk with this one."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.runtime.parallel import (
    Files,
    LostWorker,
    call_with_threads,
    read_folder,
    threads_per_task,
    write_folder,
)
from attribution.runtime.signals import sigterm_kept

ANSWER_SECONDS = 20  # for a cluster to let a driver in
ROOM_SECONDS = 60  # for a machine to come back once none is left that a task fits on


class RayPool:
    """Tasks on a cluster: one Ray task each.

    Plain Ray tasks, and not ray.util.joblib: that one submits everything at once, knows no GPUs a
    task, and cannot tell a task that ran out of memory from one whose machine went away. Ray's own
    retries are off (max_retries=0) for the same reason: it would repeat a task that ran out of
    memory as it is. Ray ends a worker that has used a GPU after each task, which frees its memory.

    Args:
        jobs: as resolve_jobs gave it, which decides the threads of a task; how many tasks run at a
            time is config.jobs, or as many as the cluster has room for.
    """

    alone = False

    def __init__(self, function: Callable, shared: tuple, jobs: int, config: Config) -> None:
        if config.device.startswith("cuda:"):
            raise InputError(f"device={config.device}: Ray says which GPU; use device=cuda")
        self.ray = connect(config.ray_address)
        self.function, self.config, self.threads = function, config, threads_per_task(jobs)
        self.gpus = config.gpus_per_task if config.device == "cuda" else 0
        room = self._room()
        if not room:
            raise InputError(self._no_room())
        # Threads that a machine does not have cores for still compute the same bits.
        self.cpus = min(self.threads, max(room))
        self.remote = self.ray.remote(_run).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0
        )
        # One object, which Ray copies once to every machine that runs a task, into shared memory
        # that all workers there read in place.
        self.shared = self.ray.put(tuple(_pack(value) for value in shared))

    def _room(self) -> list[int]:
        """Cores of every machine that is up and has the GPUs of a task, idle or not."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [
            int(resources["CPU"])
            for resources in nodes
            if resources.get("CPU", 0) >= 1 and resources.get("GPU", 0) >= self.gpus
        ]

    def _no_room(self) -> str:
        if self.gpus:
            what = f"gpus_per_task={self.gpus:g}: no machine of the cluster has so many GPUs"
            return f"{what} and a core; lower it, or use device=cpu"
        return f"ray_address={self.config.ray_address}: no machine of the cluster has a core"

    @property
    def window(self) -> int:
        """jobs, else twice what runs at a time now, so that no worker waits for this process."""
        if self.config.jobs:
            return self.config.jobs
        total = self.ray.cluster_resources()
        slots = total.get("CPU", 0) // self.cpus
        if self.gpus:
            slots = min(slots, total.get("GPU", 0) // self.gpus)
        return max(1, 2 * int(slots))

    def submit(self, arguments: tuple) -> Any:
        packed = [_pack(value) for value in arguments]
        return self.remote.remote(self.function, self.threads, self.shared, *packed)

    def wait(self, futures: list) -> Any:
        last_room = time.monotonic()
        while True:
            done, _ = self.ray.wait(futures, num_returns=1, timeout=5)
            if done:
                return done[0]
            if self._room():
                last_room = time.monotonic()
            elif time.monotonic() - last_room > ROOM_SECONDS:
                raise InputError(f"{self._no_room()} any more")

    def result(self, future: Any) -> Any:
        """A task's result; arrays in it are read-only, and lie in Ray's memory while in use."""
        e = self.ray.exceptions

        try:
            return self.ray.get(future)
        except e.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
        except (e.OutOfMemoryError, e.WorkerCrashedError) as error:
            monitor = isinstance(error, e.OutOfMemoryError)
            by = "by Ray's memory monitor" if monitor else "as happens where memory runs out"
            cause = LostWorker(f"its worker process was killed, {by}")
        except (e.NodeDiedError, e.ObjectLostError) as error:
            cause = LostWorker(f"its machine went away ({type(error).__name__})", moved=True)
        raise cause

    def close(self, futures: list) -> None:
        deadline = time.monotonic() + 10
        while futures and time.monotonic() < deadline:
            for future in futures:
                self.ray.cancel(future, force=True)
            # Again, since Ray forgets what is cancelled while its worker is only just starting.
            _, futures = self.ray.wait(futures, num_returns=len(futures), timeout=0.5)
        self.shared = None


def connect(address: str) -> ModuleType:
    """Connect this process to a cluster, or start one on this machine; once for all maps.

    A connection that the caller has made is used as it is. Ray closes its connection, and ends a
    cluster that was started here, when the process ends. Returns the package.

    Raises:
        InputError: Ray is not installed, or nothing answers under the address (within 30 s).
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "backend=ray: Ray is not installed; pip install -r requirements-ray.txt"
        ) from None
    if ray.is_initialized():
        return ray
    from joblib import cpu_count

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS", "")
    # Workers say nothing here: what matters of their errors is raised in this process.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address in ("", "local"):
        address, options["num_cpus"] = "local", cpu_count()
        options["include_dashboard"] = False
    else:
        _check_answer(address)
    with _project() as folder:
        options["runtime_env"] = {"working_dir": folder}
        with sigterm_kept():  # ray.init takes it over: the run would not be marked KILLED
            try:
                ray.init(address, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(_no_cluster(address, str(error))) from None
    return ray


@contextmanager
def _project() -> Iterator[str]:
    """A folder with this project's packages, which workers import wherever they were started.

    As `working_dir` it comes before all that lies on their machine; `py_modules` would come after.
    """
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("attribution", "scripts"):
            if (root / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(root / name, Path(folder) / name, ignore=ignored)
        yield folder


def _check_answer(address: str) -> None:
    """Let a child process connect first: ray.init takes 80 s over a dead address, then exits."""
    if "://" in address:
        raise InputError(f"ray_address={address}: not Ray's client; give the cluster's host:port")
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(_no_cluster(address, str(error))) from None
    code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            timeout=ANSWER_SECONDS,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise InputError(_no_cluster(address, f"no answer in {ANSWER_SECONDS} s")) from None
    if done.returncode:
        raise InputError(_no_cluster(address, (done.stderr.strip().splitlines() or ["?"])[-1]))


def _no_cluster(address: str, reason: str) -> str:
    reason = " ".join(reason.split())[:200]
    return (
        f"ray_address={address}: no Ray cluster answers there ({reason}); start one with "
        "`ray start --head` and give its host:port, or leave it empty"
    )


@dataclass(frozen=True)
class _Packed:
    """A folder of the driver's disk as content, and the config that names it (None: the folder)."""

    files: Files
    config: Config | None = None


def _pack(value: Any) -> Any:
    """What stands for a value on a machine that does not have the driver's disk."""
    if isinstance(value, ImageData):
        return value.with_pixels()
    if isinstance(value, Path):
        return _Packed(read_folder(value))
    if isinstance(value, Config) and Path(value.model).is_dir():
        return _Packed(read_folder(Path(value.model)), value)
    return value


def _unpack(value: Any, folder: Path) -> Any:
    """What _pack took apart, with its files under a new folder."""
    if not isinstance(value, _Packed):
        return value
    write_folder(folder, value.files)
    return replace(value.config, model=str(folder)) if value.config else folder


@contextmanager
def _unpacked(values: tuple) -> Iterator[list]:
    with tempfile.TemporaryDirectory() as scratch:
        yield [_unpack(value, Path(scratch) / str(i)) for i, value in enumerate(values)]


def _run(function: Callable, threads: int, shared: tuple, *arguments: Any) -> Any:
    """One task, on the machine that Ray chose for it."""
    with _unpacked((*shared, *arguments)) as values:
        return call_with_threads(function, threads, *values)
