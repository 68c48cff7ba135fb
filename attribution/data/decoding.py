"""Decode one image file into square uint8 pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from attribution.errors import InputError, reason

# Pillow tries these formats only. Some others start programs (EPS runs Ghostscript), and Pillow
# recognises a format by content: a file named .png can hold EPS.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
LARGE = 1 << 24  # pixels in an image
# Files are decoded by several threads. Only one of them may hold a large image at a time, so that
# memory stays bounded.
_large = Lock()


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
        raise InputError(f"not an image in a known format: {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise InputError(f"the image cannot be decoded: {reason(error)}") from None


def decode_image(image: Image.Image, size: int) -> np.ndarray:
    """Turn upright, lay on white, resize the short side and crop the centre: uint8 (size, size, 3)."""
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
