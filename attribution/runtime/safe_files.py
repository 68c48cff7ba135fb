"""Files that somebody else may have written: read as data, in no more memory than they take on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np


def regular(file: Path) -> Path:
    """The same path, if reading it comes to an end.

    Raises:
        OSError: it is not there, or is a folder, a pipe or a device.
    """
    if not S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return file


def sha256(file: Path) -> str:
    """The hash of a file's content.

    Raises:
        OSError: it cannot be read to its end.
    """
    with regular(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or nested beyond reason.
    """
    try:
        return json.loads(regular(file).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names in an archive of numpy.savez, never unpickled.

    numpy.load would unpack what is compressed, however much larger that is than the file.

    Raises:
        Exception: of many kinds, where the file is anything else.
    """
    with zipfile.ZipFile(regular(file)) as archive:
        return [_member(archive, f"{name}.npy") for name in names]


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, and numpy.savez compresses nothing")
    with archive.open(name) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def is_bool(array: np.ndarray) -> bool:
    """Whether it is an array of truth values; a file may hold bytes that are neither."""
    return array.dtype == bool and bool((array.view(np.uint8) <= 1).all())
