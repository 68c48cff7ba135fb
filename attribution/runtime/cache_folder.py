"""The cache folder: unfinished work, which appears whole or not at all, and locks between processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attribution.config import Config
from attribution.errors import InputError


@contextmanager
def writing(config: Config) -> Iterator[None]:
    """Tell an OSError as an InputError about cache_dir."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cache_dir={config.cache_dir}: cannot be written ({error.strerror or error}); "
            "name a writable folder"
        ) from error


def cache_folder(config: Config, *parts: str) -> Path:
    """A folder under cache_dir, made if it is missing.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(config.cache_dir).joinpath(*parts)
    with writing(config):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextmanager
def alone(cache: Path, name: str, waiting: str) -> Iterator[None]:
    """Hold the lock of this name among the processes that share a cache folder.

    The lock is the operating system's: it goes with the process that holds it, however that ends.

    Args:
        waiting: what is said if another process holds it.
    """
    from filelock import FileLock, Timeout

    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def discard(folder: Path) -> None:
    """Delete a folder; a kill half-way leaves nothing under its name, and the next call the rest."""
    with suppress(OSError):
        os.replace(folder, folder.with_name(f".{folder.name}.{os.getpid()}"))
    for going in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(going, ignore_errors=True)
