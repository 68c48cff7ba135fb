"""The pixel cache: the images of a data set, decoded once into a file that is memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.decoding import read_image
from attribution.data.planted import paint_patch
from attribution.data.sources import Cells, Source, content, digest, map_cells, short_hash
from attribution.errors import InputError
from attribution.runtime.cache_folder import alone, discard, writing
from attribution.runtime.safe_files import atomic

RECIPE = "2"  # raise when the same file would be decoded to other pixels
BUFFER_BYTES = 1 << 20  # that a fork writes at a time: one small image alone would take long


def cached_pixels(
    source: Source, table: pd.DataFrame, config: Config
) -> tuple[Path, dict[str, str]]:
    """The pixels file of the table's decodable images, in its order.

    Returns:
        The file, and why the other images cannot be decoded, by digest.

    Raises:
        InputError: an image cannot be decoded (with on_bad_image=stop), or changed meanwhile.
    """
    key = short_hash(RECIPE, str(config.image_size), *table["digest"].tolist())
    file, bad = _cached(key, table, config, lambda file: _decode_all(file, source, table, config))
    if bad and config.on_bad_image == "stop":
        damaged = table[table["digest"].isin(bad)].reset_index()
        more = f" and {len(damaged) - 1} others" if len(damaged) > 1 else ""
        raise InputError(
            f"dataset={config.dataset}: {damaged['name'][0]}{more} cannot be decoded; repair or remove "
            f"the damaged files, or set on_bad_image=skip ({bad[damaged['digest'][0]]})"
        )
    return file, bad


def painted_pixels(
    original: Path, has_patch: np.ndarray, table: pd.DataFrame, config: Config
) -> Path:
    """A copy of a pixels file with a patch on some images.

    Args:
        has_patch: (n,) bool.
        table: describes the n images.
    """

    def paint(file: Path) -> dict[str, str]:
        shutil.copyfile(original, file)
        paint_patch(file, np.flatnonzero(has_patch))
        return {}

    key = short_hash(RECIPE, "patch", original.parent.name, has_patch.tobytes().hex())
    return _cached(key, table, config, paint)[0]


def _cached(
    key: str, table: pd.DataFrame, config: Config, fill: Callable[[Path], dict[str, str]]
) -> tuple[Path, dict[str, str]]:
    """The pixels file under a key, and the images that it lacks; `fill` makes a missing file.

    Processes that share a cache wait for the one that makes the file.
    """
    cache = Path(config.cache_dir)
    folder = cache / "pixels" / key
    bad = _read(folder, table, config.image_size)
    if bad is None:
        waiting = "data: another process is decoding the images; waiting"
        with writing(config), alone(cache, f"pixels-{key}", waiting):
            bad = _read(folder, table, config.image_size)
            if bad is None:
                discard(folder)  # broken, or left by a killed process
                with atomic(folder) as unfinished:
                    unfinished.mkdir()
                    bad = fill(unfinished / "pixels.npy")
                    (unfinished / "skipped.json").write_text(json.dumps(bad))
    return folder / "pixels.npy", bad


def _read(folder: Path, table: pd.DataFrame, size: int) -> dict[str, str] | None:
    """The images that a cached file lacks; None if the folder is missing or broken."""
    try:
        bad = dict(json.loads((folder / "skipped.json").read_text()))
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    except (OSError, TypeError, ValueError):
        return None
    n = int((~table["digest"].isin(bad)).sum())
    return bad if pixels.shape == (n, size, size, 3) and pixels.dtype == np.uint8 else None


def _decode_all(file: Path, source: Source, table: pd.DataFrame, config: Config) -> dict[str, str]:
    """Decode the table's images into a file, in order; return why the others cannot be decoded.

    The file is written and not mapped: mapped pages would count as this process's memory.

    Raises:
        InputError: an image is no longer the one that was listed.
    """
    # Bytes: a fork that looks at texts counts references to them, and so copies their memory.
    rows, digests = table["row"].to_numpy(), table["digest"].to_numpy("S")
    no_pixels = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    length = no_pixels.nbytes

    def decode(first: int, cells: Cells) -> Iterator[str | None]:
        # Here, in the fork or thread: to send pixels to this process would take longer.
        with file.open("r+b", BUFFER_BYTES) as out:
            out.seek(start + first * length)
            for position, cell in enumerate(cells, first):
                held, why = content(cell), None
                if digest(held).encode() != digests[position]:
                    raise InputError(
                        f"dataset={config.dataset}: {table['name'].iloc[position]} changed while it "
                        "was read; try again"
                    )
                try:
                    pixels = read_image(held, config.image_size, source.open)
                except InputError as error:
                    pixels, why = no_pixels, str(error)
                out.write(pixels.data)
                yield why

    with file.open("w+b", buffering=0) as out:
        start = _write_header(out, len(rows), config)
        found = list(map_cells(source, rows, decode, "data: decoding images"))
        good = [position for position, why in enumerate(found) if why is None]
        if len(good) < len(found):
            _close_gaps(out, good, start, length)
            _write_header(out, len(good), config)  # of the same length
    return {table["digest"].iloc[i]: why for i, why in enumerate(found) if why is not None}


def _close_gaps(out: FileIO, rows: list[int], start: int, length: int) -> None:
    """Keep these rows of a file, ascending, and go back to its beginning."""
    for new, old in enumerate(rows):
        row = os.pread(out.fileno(), length, start + old * length)
        os.pwrite(out.fileno(), row, start + new * length)
    out.truncate(start + len(rows) * length)
    out.seek(0)


def _write_header(out: FileIO, n: int, config: Config) -> int:
    """Write the header of a pixels file of n images, and return its length."""
    shape = (n, config.image_size, config.image_size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.tell()
