"""Decode one image file into square uint8 pixels."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing import get_context

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL.Image import Transpose

from attribution.errors import InputError, reason

# Pillow tries these formats only. Some others start programs (EPS runs Ghostscript), and Pillow
# recognises a format by content: a file named .png can hold EPS.
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]
if features.check("avif"):
    FORMATS.append("AVIF")
with suppress(ImportError):  # Pillow reads HEIC with this package only
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
ORIENTATION = 0x0112  # the tag of EXIF
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}  # by orientation
LARGE = 1 << 24  # pixels in an image
# Files are decoded by several forks or, outside of Linux, threads: see runtime/forked.py. Only one of
# them may hold a large image at a time, so that memory stays bounded.
_large = get_context("fork").Lock() if sys.platform == "linux" else threading.Lock()


def open_image(file: io.BytesIO) -> Image.Image:
    """Open an image in one of FORMATS without decoding it."""
    return Image.open(file, formats=FORMATS)


def read_image(
    content: bytes, size: int, open: Callable[[io.BytesIO], Image.Image] = open_image
) -> np.ndarray:
    """Decode the content of a file to uint8 (size, size, 3), see decode_image.

    Raises:
        InputError: the content is not an image in one of FORMATS, is damaged, or has more than
            twice Pillow's MAX_IMAGE_PIXELS (179 million pixels).
    """
    if not content:
        raise InputError("the file is empty or cannot be read")
    try:
        image = open(io.BytesIO(content))
        with _large if image.width * image.height > LARGE else nullcontext():
            return decode_image(image, size)
    except UnidentifiedImageError:
        heic = "" if "HEIF" in FORMATS else "; HEIC needs pip install pillow-heif"
        raise InputError(f"not an image in a known format: {', '.join(FORMATS)}{heic}") from None
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise InputError(f"the image cannot be decoded: {reason(error)}") from None


def decode_image(image: Image.Image, size: int) -> np.ndarray:
    """Turn upright, lay on white, resize the short side and crop the centre: uint8 (size, size, 3)."""
    image.load()
    turn = TURNS.get(_orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    # Faster than np.asarray(image), which counts for small images.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(size, size, 3)


def _orientation(image: Image.Image) -> int:
    """The orientation that EXIF gives; 1 (upright) without EXIF or if it is damaged.

    ImageOps.exif_transpose would also rewrite the other tags, and fail on a damaged one.
    """
    if not image.info:  # as in many small files, for which getexif takes a while
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises exceptions of many types for damaged EXIF
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits to 0 … 255; Pillow's own conversion would clip them.

    The range depends on the mode alone (integers: 0 to 65535, floats: 0 to 1), so that a dark image
    stays darker than a bright one.

    Raises:
        ValueError: a value lies outside that range.
    """
    values, top = np.asarray(image).astype(np.float64), 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also true for NaN
        raise ValueError(f"grey values of mode {image.mode} are not from 0 to {top}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
