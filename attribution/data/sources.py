"""Undecoded images with labels: what every reader of data returns, and the embedded digits."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import numpy as np
from joblib import cpu_count
from PIL import Image

from attribution.data.decoding import FORMATS, open_image
from attribution.runtime.forked import on_all_cores
from attribution.runtime.progress import progress

Result = TypeVar("Result")
Row = tuple[str, str | None, str]
Cells = list[dict[str, Any]]

MOST_BYTES = 1 << 30  # a larger file is not read as an image
MANY = 1000  # images, for which forks save more time than they take to start
# Images that a fork or thread takes at a time: to take one costs as much as to hash one. As many
# are in memory at once on any number of cores, since a data set may hold the files' contents.
PART = max(32, 512 // cpu_count())


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
        notes: lines for the user: what was chosen, and what is not used.
    """

    class_names: list[str]
    labels: np.ndarray
    parts: np.ndarray
    cells: Callable[[np.ndarray], Cells]
    open: Callable[[io.BytesIO], Image.Image] = open_image
    root: Path | None = None
    column: Callable[[str], list[Any] | None] = lambda name: None
    notes: tuple[str, ...] = ()

    def name(self, cell: dict[str, Any]) -> str:
        """The file name of a cell, empty if it has none."""
        path, inside = cell["path"] or "", f"{self.root}{os.sep}"
        if self.root and path.startswith(inside):
            return path[len(inside) :]  # as relpath, which takes as long as to hash a small file
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


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that are decoded; HEIC files are listed even if they cannot be."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in FORMATS) | {".heic", ".heif"}


def from_files(root: Path, rows: list[Row], names: list[str], notes: list[str]) -> Source:
    """Images in files.

    Args:
        rows: path, class name (None where unknown) and part of each.
        names: class names in order.
    """
    ids = {name: label for label, name in enumerate(names)}
    paths = [path for path, _, _ in rows]
    return Source(
        names,
        np.array([-1 if name is None else ids[name] for _, name, _ in rows], np.int64),
        np.array([part for _, _, part in rows], object),
        lambda rows: [{"bytes": None, "path": paths[row]} for row in rows],
        root=root,
        notes=tuple(notes),
    )


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, and how many there are if there are more."""
    more = f", … ({len(names):,} in total)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def map_cells(
    source: Source, rows: np.ndarray, function: Callable[[int, Cells], Iterable[Result]], doing: str
) -> Iterator[Result]:
    """Yield a result for each row in order, computed on all cores.

    Args:
        function: gets the cells of some rows that follow one another, and the position of the first
            in `rows`; returns a result for each. It runs in a fork if there are MANY rows, and cannot
            change this process then.
        doing: what the progress bar says.
    """

    def run(start: int) -> list[Result]:
        return list(function(start, source.cells(rows[start : start + PART])))

    with on_all_cores(run, fork=len(rows) >= MANY) as submit:
        parts = map(submit, range(0, len(rows), PART))
        ahead = deque(islice(parts, cpu_count() + 2))
        with progress(doing, len(rows)) as advance:
            while ahead:
                results = ahead.popleft().result()
                ahead.extend(islice(parts, 1))
                yield from results
                advance(len(results))


def content(cell: dict[str, Any]) -> bytes:
    """The content of an image file; empty (undecodable) if it cannot be read."""
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        # Twice as fast as open, which matters for small files. Non-blocking: a pipe may never end.
        file = os.open(cell["path"], os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(file)
            readable = S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES
            return os.read(file, found.st_size) if readable else b""
        finally:
            os.close(file)
    except (OSError, TypeError, ValueError):
        return b""


def as_file(source: Source, cell: dict[str, Any]) -> bytes:
    """A cell as the content of an image file: what Pillow does not open by itself becomes PNG."""
    held = content(cell)
    if source.open is open_image:
        return held
    stream = io.BytesIO()
    source.open(io.BytesIO(held)).save(stream, "PNG")
    return stream.getvalue()


def digest(content: bytes) -> str:
    """The hash that stands for an image's content in ids, splits and cache keys."""
    return blake2b(content, digest_size=16).hexdigest()


def short_hash(*items: str) -> str:
    """One hash of several texts."""
    return digest("\n".join(items).encode())
