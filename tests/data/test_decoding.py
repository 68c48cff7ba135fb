"""Images of every kind are decoded to the same shape; damaged and odd files give one documented refusal."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import runpy
import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from damage import Edit, edited, edits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_folders import fails, picture, png
from PIL import Image, ImageOps

from attribution.data import decoding
from attribution.data.decoding import FORMATS, ORIENTATION, decode_image, read_image
from attribution.errors import InputError


def test_grey_palette_and_cmyk() -> None:
    grey = Image.new("L", (8, 8), 77)
    assert (decode_image(grey, 8) == 77).all()
    palette = picture(0, (8, 8)).quantize(4)
    assert (decode_image(palette, 8) == np.asarray(palette.convert("RGB"))).all()
    assert (decode_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), 8)[0, 0] == [255, 0, 0]).all()
    assert (decode_image(Image.new("1", (8, 8), 1), 8) == 255).all()


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    pixels = decode_image(image, 8)
    assert pixels[0, 0].tolist() == [10, 20, 30] and (pixels[1:] == 255).all()
    assert (decode_image(Image.new("LA", (8, 8), (0, 0)), 8) == 255).all()
    stream = io.BytesIO()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(stream, "PNG", transparency=0)
    assert (decode_image(Image.open(stream), 8) == 255).all()


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_16_bit_grey_is_scaled(mode, suffix) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8)
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    stream = io.BytesIO()
    image.save(stream, suffix)
    pixels = decode_image(Image.open(stream), 8)
    assert np.abs(pixels[..., 0] - values / 257).max() <= 1


@pytest.mark.parametrize("bright", [0.9, 1.0, 1.1, 256.0, np.nan, -0.1])
def test_numbers_without_an_agreed_range_are_refused_and_others_keep_their_order(bright) -> None:
    """A range guessed from each image would make a dark one lighter than a bright one."""
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), bright, np.float32)).save(stream, "TIFF")
    if 0 <= bright <= 1:
        assert np.abs(decode_image(Image.open(stream), 8) - 255 * bright).max() <= 0.6
    else:
        with pytest.raises(ValueError, match="grey values of mode F are not from 0 to 1"):
            decode_image(Image.open(stream), 8)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation(orientation) -> None:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    picture(3, (8, 8)).save(stream, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(stream))
    assert (decode_image(Image.open(stream), 8) == np.asarray(upright)).all()


@pytest.mark.parametrize(
    "damaged",
    [struct.pack("<HHII", 0x10D, 5, 1, 38), struct.pack("<HHIi", 0x100, 9, 1, -5)],
    ids=["a text that is a fraction", "a negative width"],
)
def test_of_damaged_exif_only_the_orientation_counts(damaged) -> None:
    stream = io.BytesIO()
    picture(3, (8, 8)).save(stream, "JPEG")
    jpeg, turned = stream.getvalue(), struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + damaged
    body += struct.pack("<III", 0, 7, 3)
    content = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
    assert (read_image(content, 8) == np.rot90(read_image(jpeg, 8), 3)).all()


def test_an_exif_block_that_breaks_off_is_ignored() -> None:
    content = png(1)
    at = content.index(b"IDAT") - 4
    block = b"eXIf\x00\x08\x00\x02\x01\x12\x00\x03"
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    assert (read_image(content[:at] + chunk + content[at:], 8) == read_image(content, 8)).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(kind) -> None:
    stream = io.BytesIO()
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(stream, kind, save_all=True, append_images=[blue])
    assert np.abs(read_image(stream.getvalue(), 8) - np.array([255, 0, 0])).max() <= 2


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (1, 3000), (5, 5), (300, 200)])
def test_short_side_is_fitted_and_the_centre_kept(size) -> None:
    image = Image.new("RGB", size, "red")
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste("blue", (left, top, left + side, top + side))
    pixels = decode_image(image, 16)
    assert pixels.shape == (16, 16, 3)
    assert side < 5 or (pixels[4:12, 4:12] == [0, 0, 255]).all()


def test_right_size_is_untouched() -> None:
    image = picture(3, (8, 8))
    assert (decode_image(image, 8) == np.asarray(image)).all()


def claims(width: int, height: int, colour: int = 0) -> bytes:
    """A PNG of one colour, so well compressed that it is small however large the image is."""
    row = bytes(1 + (-(-width // 8) if colour == 0 else 3 * width))
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row * 100) for _ in range(-(-height // 100))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1 if colour == 0 else 8, colour, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


UNKNOWN = "not an image in a known format: JPEG, PNG"


UNDECODABLE = {
    "zero bytes": (b"", "the file is empty or cannot be read"),
    "a bomb": (claims(20_000, 20_000), "exceeds limit"),
    "a header that claims a bomb": (claims(1, 1)[:16] + b"\x7f" * 8, "the image cannot be decoded"),
    "cut off": (png(1)[:90], "the image cannot be decoded: image file is truncated"),
    "PostScript under another name": (eps(), UNKNOWN),
    "a table": (b"PAR1", UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), UNDECODABLE.values(), ids=UNDECODABLE)
def test_what_is_no_image_stops_the_run_or_is_skipped(load, root, content, says) -> None:
    (root / "cat" / "odd.png").write_bytes(content)
    for _ in range(2):  # the second time the reason comes from the cache
        fails(load, root, f"dataset={root}", "cat/odd.png", "on_bad_image=skip", says)
    loaded = load(root, on_bad_image="skip")
    assert loaded.skipped == ("cat/odd.png",) and len(loaded.examples) == 25


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 100)])
def test_sizes_that_nobody_expects(load, root, size) -> None:
    Image.new("RGB", size, (200, 100, 50)).save(root / "cat" / "odd.png")
    loaded = load(root)
    (row,) = np.flatnonzero(loaded.examples["file_name"] == "cat/odd.png")
    assert (loaded.pixels()[row] == [200, 100, 50]).all()


def test_a_program_is_not_started_for_a_picture(monkeypatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    with pytest.raises(InputError, match="not an image in a known format"):
        decoding.read_image(eps(), 8)
    assert not started


def test_large_images_are_decoded_one_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "LARGE", 10)
    running, most, original = [], [], decoding.decode_image

    def counted(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        return original(*arguments)

    monkeypatch.setattr(decoding, "decode_image", counted)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: decoding.read_image(png(i), 8), range(12)))
    assert max(most) == 1 and len(most) == 12


def test_images_are_decoded_where_there_are_no_forks(monkeypatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(multiprocessing, "get_context", {"spawn": None}.__getitem__)
    monkeypatch.setattr(sys, "platform", "win32")
    module = runpy.run_path(decoding.__file__)
    assert (module["read_image"](png(1), 8) == read_image(png(1), 8)).all()


# Damaged files

SIDE = 8


def small_files() -> list[bytes]:
    """One image for each format and each pixel mode that the format can hold, and a moving GIF."""
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    image, files = Image.fromarray(values), []
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # rotated
    for name in FORMATS:
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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros((4, 4), np.float32), 0),
        (np.ones((4, 4), np.float32), 255),
        (np.full((4, 4), 255, np.float32), None),  # beside an image below 1 it would be as white
        (np.full((4, 4), -5, np.float32), None),
        (np.full((4, 4), 65535, np.uint16), 255),
        (np.full((4, 4), np.nan, np.float32), None),
        (np.full((4, 4), np.inf, np.float32), None),
        (np.full((4, 4), 1e30, np.float32), None),
    ],
)
def test_pixels_of_another_range_are_scaled_or_refused(tmp_path: Path, values, expected) -> None:
    Image.fromarray(values).save(tmp_path / "image.tif")
    content = (tmp_path / "image.tif").read_bytes()
    if expected is None:
        with pytest.raises(InputError, match="cannot be decoded|not an image"):
            read_image(content, 4)
    else:
        assert (read_image(content, 4) == expected).all()
