"""The cache folder: how it is made and emptied, and locks between the processes that share it."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from attribution.config import Config
from attribution.errors import InputError


@contextmanager
def writing(config: Config) -> Iterator[None]:
    """Raise an OSError of the block as an InputError about cache_dir."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cache_dir={config.cache_dir}: cannot be written ({error.strerror or error}); "
            "name a writable folder"
        ) from error


def cache_folder(config: Config, *parts: str) -> Path:
    """A folder under cache_dir, created if it is missing.

    Raises:
        InputError: it cannot be written.
    """
    folder = Path(config.cache_dir).joinpath(*parts)
    with writing(config):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, 0 if there is none; another process may be moving some away."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.stat(os.path.join(parent, name)).st_size
    return found


@contextmanager
def alone(cache: Path, name: str, waiting: str) -> Iterator[None]:
    """Hold the lock with this name among the processes that share a cache folder.

    The operating system releases the lock when its process ends, even if it is killed.

    Args:
        waiting: message if another process holds the lock.
    """
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
    """Delete a folder, and what killed processes left of it."""
    with suppress(OSError):  # renamed first: if this process is killed, half a folder has no name
        os.replace(folder, folder.with_name(f".{folder.name}.{os.getpid()}"))
    discard_unfinished(folder)


def discard_unfinished(path: Path) -> None:
    """Delete what killed processes left next to a file or folder that they were making."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
