"""Files that a person asked for outside MLflow: never half-written, never replaced unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from attribution.config import Config
from attribution.errors import InputError
from attribution.runtime.safe_files import atomic


def refuse_existing(files: Iterable[Path], config: Config) -> None:
    """Refuse files that exist and may not be replaced, or that cannot be made.

    Raises:
        InputError: with the file, and what to do.
    """
    for file in files:
        if file.exists() and config.overwrite == "no":
            raise InputError(f"output={file}: exists; name another folder, or add --overwrite")
        nearest = next(folder for folder in file.absolute().parents if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"output={config.output}: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK):
            raise InputError(f"output={config.output}: {nearest} cannot be written to")


def save(content: bytes, file: Path) -> None:
    """Write a file where a person wants it.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with atomic(file) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise InputError(f"output={file}: cannot be written ({error.strerror})") from None
