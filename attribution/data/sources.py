"""Undecoded images with labels, and two places they come from: the embedded digits, class folders."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from attribution.config import Config
from attribution.data.decoding import open_image
from attribution.errors import InputError
from attribution.runtime.progress import progress

Result = TypeVar("Result")

VALIDATION_NAMES = ("validation", "valid", "val")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif",
)  # fmt: skip
MOST_BYTES = 1 << 30  # a larger file is not read as an image
CHUNK = 256  # images read at a time, which bounds memory
PART = 32  # of them, images that a thread takes: to take one costs as much as to hash a small one


@dataclass(frozen=True)
class Source:
    """Undecoded images with labels.

    Attributes:
        class_names: position is the label.
        labels: (n,) int64, -1 where unknown.
        parts: (n,) name of the part that each image belongs to, such as 'train'.
        cells: maps row numbers to {"bytes", "path"}; "bytes" is None for an image in a file.
        open: opens the bytes of an image.
        root: file names are relative to this folder.
        column: returns the values of another column for all rows, None if there is no such column.
    """

    class_names: list[str]
    labels: np.ndarray
    parts: np.ndarray
    cells: Callable[[np.ndarray], list[dict[str, Any]]]
    open: Callable[[io.BytesIO], Image.Image] = open_image
    root: Path | None = None
    column: Callable[[str], list[Any] | None] = lambda name: None

    def name(self, cell: dict[str, Any]) -> str:
        """The file name of a cell, empty if it has none."""
        path = cell["path"] or ""
        return os.path.relpath(path, self.root) if path and self.root else os.path.basename(path)


def digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn carries."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Source(
        [str(name) for name in digits.target_names],
        digits.target.astype(np.int64),
        np.full(len(images), "train", object),
        lambda rows: [{"bytes": image.tobytes(), "path": None} for image in images[rows]],
        lambda file: Image.frombytes("L", images.shape[1:], file.read()),
    )


def class_folders(root: Path, config: Config) -> Source | None:
    """Images in class subfolders, with or without official parts; None if there are none.

    Raises:
        InputError: a file's name is not UTF-8.
    """
    official = {
        part: _classes(root / part, config) for part in ("train", "test", *VALIDATION_NAMES)
    }
    parts = {part: classes for part, classes in official.items() if any(classes.values())}
    # A class may be called "train": that folder is a part only if its subfolders hold images.
    if "train" not in parts:
        parts = {"train": _classes(root, config)}
    names = sorted({name for classes in parts.values() for name in classes})
    ids = {name: label for label, name in enumerate(names)}
    rows = [
        (ids[name], part, path)
        for part, classes in parts.items()
        for name, files in classes.items()
        for path in files
    ]
    if not rows:
        return None
    labels, row_parts, paths = zip(*rows, strict=True)
    return Source(
        names,
        np.array(labels, np.int64),
        np.array(row_parts, object),
        lambda rows: [{"bytes": None, "path": paths[row]} for row in rows],
        root=root,
    )


def _classes(folder: Path, config: Config) -> dict[str, list[str]]:
    """The image files in each visible subfolder; an empty list where there is none."""
    found: dict[str, list[str]] = {}
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        if child.is_dir() and not child.name.startswith("."):
            shown = (entry for entry in os.scandir(child) if not entry.name.startswith("."))
            images = (entry for entry in shown if entry.name.lower().endswith(SUFFIXES))
            # A broken link is listed too: it is then reported as undecodable.
            files = [e.path for e in images if os.path.isfile(e) or not os.path.exists(e)]
            _check_names(files, config)
            found[child.name] = sorted(files)
    return found


def _check_names(files: list[str], config: Config) -> None:
    for file in files:
        if file.encode(errors="replace") != os.fsencode(file):
            raise InputError(
                f"dataset={config.dataset}: {file} has a name that is not UTF-8; rename it"
            )


def map_cells(
    source: Source, rows: np.ndarray, function: Callable[[int, dict[str, Any]], Result], doing: str
) -> Iterator[Result]:
    """Yield function(position in rows, cell) for each row in order, computed by threads.

    Args:
        doing: what the progress bar says.
    """
    with ThreadPoolExecutor() as pool, progress(doing, len(rows)) as advance:
        for start in range(0, len(rows), CHUNK):
            cells = list(enumerate(source.cells(rows[start : start + CHUNK]), start))
            parts = [cells[i : i + PART] for i in range(0, len(cells), PART)]
            for results in pool.map(lambda part: [function(*cell) for cell in part], parts):
                yield from results
            advance(len(cells))


def content(cell: dict[str, Any]) -> bytes:
    """The content of an image file; empty (undecodable) if it cannot be read."""
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        # Twice as fast as pathlib, which matters for small files. Non-blocking: a pipe may never end.
        file = os.open(cell["path"], os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(file)
            readable = S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES
            return os.read(file, found.st_size) if readable else b""
        finally:
            os.close(file)
    except (OSError, TypeError, ValueError):
        return b""


def digest(content: bytes) -> str:
    """The hash that stands for an image's content in ids, splits and cache keys."""
    return blake2b(content, digest_size=16).hexdigest()


def short_hash(*items: str) -> str:
    """One hash of several texts."""
    return digest("\n".join(items).encode())
