"""The pixel cache: the images of a data set, decoded once into a file that is memory-mapped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.decoding import read_image
from attribution.data.planted import paint_patch
from attribution.data.sources import Source, content, digest, map_cells, short_hash
from attribution.errors import InputError
from attribution.runtime.cache_folder import alone, discard, writing
from attribution.runtime.safe_files import atomic

RECIPE = "2"  # raise when the same file would be decoded to other pixels


def cached_pixels(
    source: Source, table: pd.DataFrame, config: Config
) -> tuple[Path, dict[str, str]]:
    """The pixels file of the table's decodable images, in its order.

    Returns:
        The file, and why the other images cannot be decoded, by digest.

    Raises:
        InputError: an image cannot be decoded (with on_bad_image=stop), or changed meanwhile.
    """
    key = short_hash(RECIPE, str(config.image_size), *table["digest"])
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
    rows, names, digests = (table[column].to_numpy() for column in ("row", "name", "digest"))

    def decode(position: int, cell: dict[str, Any]) -> np.ndarray | InputError:
        held = content(cell)
        if digest(held) != digests[position]:
            raise InputError(
                f"dataset={config.dataset}: {names[position]} changed while it was read; try again"
            )
        try:
            return read_image(held, config.image_size, source.open)
        except InputError as error:
            return error

    bad, count = {}, 0
    images = map_cells(source, rows, decode, "data: decoding images")
    with file.open("wb") as out:
        _write_header(out, len(rows), config)
        for listed, image in zip(digests, images, strict=True):
            if isinstance(image, InputError):
                bad[listed] = str(image)
            else:
                out.write(image.data)
                count += 1
        out.seek(0)
        _write_header(out, count, config)  # of the same length
    return bad


def _write_header(out: BinaryIO, n: int, config: Config) -> None:
    """Write the header of a pixels file of n images."""
    shape = (n, config.image_size, config.image_size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
