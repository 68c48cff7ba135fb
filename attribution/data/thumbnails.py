"""Small pictures inside a page: images as data: addresses."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

SHOWN = 128  # pixels: images are embedded no larger, because a page holds a hundred of them


def embedded(content: bytes, kind: str = "png") -> str:
    """An image file as a data: address."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def picture(pixels: np.ndarray, is_one_of_many: bool = False) -> str:
    """An image, uint8 (h, w, 3), as a data: address, at most SHOWN pixels wide and high.

    Args:
        is_one_of_many: whether a page has so many that they should be JPEGs.
    """
    file, image = io.BytesIO(), Image.fromarray(pixels)
    image.thumbnail((SHOWN, SHOWN))
    if is_one_of_many and min(image.size) > 32:  # a JPEG of a tiny image is hardly smaller
        image.save(file, "JPEG", quality=85)
        return embedded(file.getvalue(), "jpeg")
    image.save(file, "PNG", optimize=True)
    return embedded(file.getvalue())
