"""Pictures as data: addresses."""

from __future__ import annotations

import base64
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attribution.data.thumbnails import SHOWN, picture


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_a_picture_is_embedded_without_loss(height, width, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = base64.b64decode(picture(pixels).split(",", 1)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)


def test_a_large_picture_is_embedded_as_small_as_it_is_shown() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    content = base64.b64decode(picture(pixels).split(",", 1)[1])
    assert max(Image.open(io.BytesIO(content)).size) == SHOWN
