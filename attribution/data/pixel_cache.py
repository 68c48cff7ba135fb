"""Pixels: images decoded once into a memory-mapped cache, and batches of them, augmented or not."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from attribution.config import Config
from attribution.data.sources import FORMATS, Source, chunks, content, digest, open_image
from attribution.errors import InputError, reason
from attribution.runtime.cache_folder import alone, writing
from attribution.runtime.npy_blocks import reserve

PATCH_COLOUR = (255, 0, 255)
LARGE = 1 << 24  # pixels; only one image of more is decoded at a time, which bounds the memory
_large = Lock()
RECIPE = "2"  # raise when the same file would be decoded to other pixels


@lru_cache(maxsize=8)
def open_pixels(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def short_hash(items: Iterable[str]) -> str:
    return blake2b("\n".join(items).encode(), digest_size=16).hexdigest()


def cached_pixels(
    source: Source, table: pd.DataFrame, config: Config, cache: Path
) -> tuple[Path, set[str]]:
    """The file of the table's decodable images, in its order, and the digests of the others."""
    key = short_hash([RECIPE, str(config.image_size), *table["digest"]])
    folder = cache / "pixels" / key
    bad = _read_cache(folder, table, config.image_size)
    if bad is None:
        with (
            writing(config),
            alone(cache, f"pixels-{key}", "data: another process decodes it; waiting"),
        ):
            bad = _read_cache(folder, table, config.image_size)
            if bad is None:
                bad = _build_cache(folder, source, table, config)
    if bad and config.on_bad_image == "stop":
        is_bad = table["digest"].isin(bad)
        first, *others = table["name"][is_bad]
        raise InputError(
            f"dataset={config.dataset}: {first}{f' and {len(others)} others' * bool(others)} cannot "
            "be decoded; repair or remove what is damaged, or set on_bad_image=skip "
            f"({_why_not(source, int(table['row'][is_bad].iloc[0]), config.image_size)})"
        )
    return folder / "pixels.npy", bad


def _why_not(source: Source, row: int, size: int) -> str:
    try:
        read_image(content(source.cells(np.array([row]))[0]), size, source.open)
    except InputError as error:
        return str(error)
    return "an earlier command could not"


def painted_pixels(file: Path, has_patch: np.ndarray, cache: Path) -> Path:
    """A copy of cached pixels with a coloured square on some images, made once.

    The square's side is a sixth of the image's, as is its distance from the upper left corner.

    Args:
        has_patch: (n,) bool, which images get it.
    """
    key = short_hash([RECIPE, "patch", file.parent.name, has_patch.tobytes().hex()])
    folder = cache / "pixels" / key
    shape = open_pixels(file).shape
    with alone(cache, f"pixels-{key}", "data: another process paints it; waiting"):
        if not _is_whole(folder / "pixels.npy", shape):
            with _remade(folder) as new:
                shutil.copyfile(file, new / "pixels.npy")
                pixels = np.load(new / "pixels.npy", mmap_mode="r+")
                side = max(2, shape[1] // 6)
                for row in np.flatnonzero(has_patch):
                    pixels[row, side : 2 * side, side : 2 * side] = PATCH_COLOUR
                pixels.flush()
    return folder / "pixels.npy"


@contextmanager
def _remade(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of what may lie there, broken, once it is filled.

    The caller is alone, so that an unfinished one is a killed process's.
    """
    new = folder.with_name(f"{folder.name}.unfinished")
    for old in (folder, new):
        shutil.rmtree(old, ignore_errors=True)
    open_pixels.cache_clear()
    new.mkdir()
    try:
        yield new
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _is_whole(file: Path, shape: tuple[int, ...]) -> bool:
    try:
        return np.load(file, mmap_mode="r").shape == shape
    except (OSError, ValueError):
        return False


def _read_cache(folder: Path, table: pd.DataFrame, size: int) -> set[str] | None:
    """Digests that were skipped when the cache was built; None if it has to be built."""
    try:
        bad = set(json.loads((folder / "skipped.json").read_text()))
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None
    n = int((~table["digest"].isin(bad)).sum())
    return bad if pixels.shape == (n, size, size, 3) and pixels.dtype == np.uint8 else None


def _build_cache(folder: Path, source: Source, table: pd.DataFrame, config: Config) -> set[str]:
    with _remade(folder) as new:
        good = _decode_all(new / "pixels.npy", source, table, config)
        bad = set(table["digest"][~good])
        (new / "skipped.json").write_text(json.dumps(sorted(bad)))
    return bad


def _decode_all(file: Path, source: Source, table: pd.DataFrame, config: Config) -> np.ndarray:
    """Decode the table's images into `file`, by the chunk; True where it worked, (n,).

    Raises:
        InputError: one is no longer what was listed.
    """
    size = config.image_size
    pixels = _new_pixels(file, len(table), size)
    good = np.zeros(len(table), bool)
    rows, names, digests = (table[column].to_numpy() for column in ("row", "name", "digest"))

    def decode(cell: dict[str, Any], name: str, listed: str) -> np.ndarray | None:
        held = content(cell)
        if digest(held) != listed:
            raise InputError(
                f"dataset={config.dataset}: {name} changed while it was read; try again"
            )
        try:
            return read_image(held, size, source.open)
        except InputError:
            return None

    with ThreadPoolExecutor() as pool:
        for chunk in chunks(len(table)):
            images = pool.map(decode, source.cells(rows[chunk]), names[chunk], digests[chunk])
            for row, image in enumerate(images, chunk.start):
                if image is not None:
                    pixels[row], good[row] = image, True
    if not good.all():
        kept = np.flatnonzero(good)
        compact = _new_pixels(file.with_suffix(".compact"), len(kept), size)
        for chunk in chunks(len(kept)):
            compact[chunk] = pixels[kept[chunk]]
        os.replace(file.with_suffix(".compact"), file)
    return good


def _new_pixels(file: Path, n: int, size: int) -> np.ndarray:
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (n, size, size, 3))
    reserve([file])
    return pixels


def read_image(
    content: bytes, size: int, open: Callable[[io.BytesIO], Image.Image] = open_image
) -> np.ndarray:
    """decode_image of what a file holds.

    Raises:
        InputError: no image, damaged, of another format than FORMATS, or of more than twice
            Pillow's MAX_IMAGE_PIXELS (179 million).
    """
    try:
        image = open(io.BytesIO(content))
        with _large if image.width * image.height > LARGE else nullcontext():
            return decode_image(image, size)
    except UnidentifiedImageError:
        raise InputError(f"no picture of a known format: {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plugins raise whatever they like on damaged files
        raise InputError(f"no picture that can be decoded: {reason(error)}") from None


def decode_image(image: Image.Image, size: int) -> np.ndarray:
    """An image upright, on white, short side fitted, centre kept: uint8 (size, size, 3)."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Wide grey values scaled, where Pillow's own conversion would clip them.

    By the mode alone, so that a dark image stays darker than a bright one: whole numbers are of 16
    bits, others from 0 to 1.

    Raises:
        ValueError: they are not.
    """
    values, top = np.asarray(image).astype(np.float64), 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN is neither
        raise ValueError(f"grey values of mode {image.mode} are not from 0 to {top}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def to_batch(
    pixels: np.ndarray | Tensor,
    mean: Iterable[float] | Tensor,
    std: Iterable[float] | Tensor,
    device: str | torch.device = "cpu",
) -> Tensor:
    """uint8 (B, H, W, 3) as a normalised float32 (B, 3, H, W), channels_last."""
    from torchvision.transforms.v2 import functional as F  # 4 s, which the driver need not wait

    if not isinstance(pixels, Tensor):
        pixels = torch.from_numpy(np.require(pixels, requirements=("C", "W")))
    batch = F.to_dtype(pixels.to(device).permute(0, 3, 1, 2), torch.float32, scale=True)
    mean, std = (v if isinstance(v, Tensor) else list(v) for v in (mean, std))
    batch = F.normalize(batch, mean, std, inplace=True)
    return batch.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Augmentation:
    """What happens to each example: mirrored or not, and where its crop starts in the padding."""

    flips: Tensor  # (n,) bool
    dy: Tensor  # (n,) int64 in [0, 2 * pad]
    dx: Tensor
    pad: int

    def __getitem__(self, index: Any) -> Augmentation:
        index = torch.as_tensor(index)
        return Augmentation(self.flips[index], self.dy[index], self.dx[index], self.pad)


def draw_augmentation(n: int, augment: str, pad: int, generator: torch.Generator) -> Augmentation:
    """Draw one epoch's augmentation for all n training examples at once.

    Drawn for all, then indexed by position, example i gets the same whichever others are present.
    """
    flips = torch.rand(n, generator=generator) < 0.5
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    if "flip" not in augment:
        flips = torch.zeros_like(flips)
    if "crop" not in augment:
        dy, dx, pad = torch.zeros_like(dy), torch.zeros_like(dx), 0
    return Augmentation(flips, dy, dx, pad)


def augment_batch(batch: Tensor, augmentation: Augmentation) -> Tensor:
    """Mirror and shift each image of (B, 3, H, W) as its entry says; stays channels_last."""
    from torchvision.transforms.v2 import functional as F

    flips, dy, dx = (
        value.to(batch.device) for value in (augmentation.flips, augmentation.dy, augmentation.dx)
    )
    batch = torch.where(flips[:, None, None, None], F.horizontal_flip(batch), batch)
    pad, (height, width) = augmentation.pad, batch.shape[2:]
    if pad:
        mode = "reflect" if pad < min(height, width) else "edge"
        padded = F.pad(batch, [pad], padding_mode=mode).permute(0, 2, 3, 1)
        ys = dy[:, None] + torch.arange(height, device=batch.device)
        xs = dx[:, None] + torch.arange(width, device=batch.device)
        sample = torch.arange(len(batch), device=batch.device)[:, None, None]
        batch = padded[sample, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
    return batch.contiguous(memory_format=torch.channels_last)
