"""Write files so that they are never half there; read files of unknown origin without running code from them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

# Content of files as uint8, (size,), by path relative to their folder.
Files = dict[str, np.ndarray]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to `path` when the block succeeds.

    The temporary path has the same file name, in a new hidden folder next to `path`, which
    cache_folder.discard_unfinished removes if the process was killed. A file that is already there is replaced.

    Raises:
        OSError: the block's, or `path` is a folder that is not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        os.replace(unfinished, path)


def link_or_copy(source: Path | str, file: Path) -> None:
    """Give a file a second name; copy it where the file system has no links, or is another one.

    Raises:
        OSError: neither is possible.
    """
    try:
        os.link(source, file)
    except OSError:
        shutil.copyfile(source, file)


def read_folder(folder: Path) -> Files:
    """The content of all files under a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): np.fromfile(p, np.uint8) for p in paths}


def write_folder(folder: Path, files: Files) -> None:
    """Make a folder with these files, whole or not at all; a folder that is already there stays.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with atomic(folder) as unfinished:
            unfinished.mkdir()
            for name, content in files.items():
                path = unfinished / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.data)  # numpy's tofile does not notice a full disk
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process was first, with the same result.


class ResultStore:
    """Small results by key, one .npz file each, which a restarted command finds again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays stored under a key, or None if there are none or the file is damaged."""
        try:
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as file:
                return dict(file) or None
        except Exception:  # zipfile and numpy raise many types for a damaged file
            return None

    def put(self, key: str, arrays: dict[str, np.ndarray]) -> None:
        """Store arrays under a key, whole or not at all."""
        with atomic(self.folder / f"{key}.npz") as unfinished:
            np.savez(unfinished, allow_pickle=False, **arrays)


def regular(file: Path) -> Path:
    """Return the path of a regular file: reading anything else may never end.

    Raises:
        OSError: it is missing, or is a folder, a pipe or a device.
    """
    if not S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return file


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with regular(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_hash(file: Path, promised: str) -> None:
    """Refuse a file with another content than metadata.json promises.

    Raises:
        ValueError: its SHA-256 is another one.
        OSError: it cannot be read.
    """
    if sha256(file) != promised:
        raise ValueError(f"{'/'.join(file.parts[-2:])} does not have the hash in metadata.json")


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(regular(file).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays of an archive made by numpy.savez, without unpickling.

    Compressed members are refused: numpy.load would unpack them to any size.

    Raises:
        Exception: of many types, if the file is not such an archive.
    """
    with zipfile.ZipFile(regular(file)) as archive:
        return [_member(archive, f"{name}.npy") for name in names]


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which numpy.savez never does")
    with archive.open(name) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def is_bool(array: np.ndarray) -> bool:
    """Whether an array holds booleans; a damaged file may hold bytes other than 0 and 1."""
    return array.dtype == bool and bool((array.view(np.uint8) <= 1).all())
