"""Damaged image files: an array of the right shape or one documented refusal, and nothing else."""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib

import numpy as np
import pytest
from damage import Edit, edited, edits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from attribution.data.pixel_cache import read_image
from attribution.errors import InputError

SIDE = 8


def small_files() -> list[bytes]:
    """One image for each format and each pixel mode that the format can hold, and a moving GIF."""
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    image, files = Image.fromarray(values), []
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                source = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
                extra = {"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}
                source.save(file, name, **extra)
                files.append(file.getvalue())
    moving, floating = io.BytesIO(), io.BytesIO()
    image.save(moving, "GIF", save_all=True, append_images=[image.rotate(90)])
    Image.fromarray(values[..., 0] / np.float32(255)).save(floating, "TIFF")
    return [*files, moving.getvalue(), floating.getvalue()]


def with_right_checksums(content: bytes) -> bytes:
    """A PNG whose chunks get fitting checksums, so that damage reaches the code behind them."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = content[:8], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        if len(body) < 4 + length:
            break
        out += content[at : at + 4] + body + zlib.crc32(body).to_bytes(4)
        at += 12 + length
    return out + content[at:]


FILES = small_files()


@pytest.mark.parametrize("content", FILES)
def test_every_format_and_mode_is_read(content: bytes) -> None:
    assert read_image(content, SIDE).shape == (SIDE, SIDE, 3)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(FILES).flatmap(lambda file: st.tuples(st.just(file), edits(len(file)))),
    st.booleans(),
)
def test_a_damaged_image_is_read_or_refused(
    monkeypatch: pytest.MonkeyPatch, case: tuple[bytes, list[Edit]], mend: bool
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 19)  # a larger allowed one takes seconds
    content = edited(*case)
    content = with_right_checksums(content) if mend else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, which refuse nothing
        with contextlib.suppress(InputError):
            pixels = read_image(content, SIDE)
            assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8


def test_a_png_with_mended_checksums_is_read_as_what_it_claims() -> None:
    file = io.BytesIO()
    Image.new("L", (5, 5), 7).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[19] = 4  # the last byte of the width
    with pytest.raises((SyntaxError, OSError)):
        Image.open(io.BytesIO(content)).load()
    assert Image.open(io.BytesIO(with_right_checksums(bytes(content)))).size == (4, 5)
