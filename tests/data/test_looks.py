"""Pictures unlike the training images, and ordinary ones, which nothing is said about."""

from __future__ import annotations

import numpy as np
import pytest

from attribution.config import Config, resolve
from attribution.data import looks
from attribution.data.dataset import ImageData, load_data


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Config, ImageData]:
    config = resolve({"cache_dir": str(tmp_path_factory.mktemp("cache"))})
    return config, load_data(config)


def test_no_digit_of_the_other_splits_is_unlike_and_every_inverted_one_is(digits) -> None:
    _, data = digits
    pixels = np.asarray(data.pixels())
    train = looks.brightness(pixels[data.rows("train")])
    for split in ("validation", "test"):
        shown = pixels[data.rows(split)]
        assert np.mean([bool(looks.of_brightness(image, train)) for image in shown]) < 0.02
        inverted = [looks.of_brightness(255 - image, train) for image in shown]
        assert all(line.startswith("inverted: ") for (line,) in inverted)


def test_what_a_picture_is_compared_with(digits) -> None:
    _, data = digits
    pixels = np.asarray(data.pixels())[data.rows("test")[0]]
    assert looks.unlike(data, (8, 8), pixels) == []
    strip, inverted = looks.unlike(data, (32, 8), 255 - pixels)
    assert strip.startswith("shape: 32 × 8 pixels, 4.0 times as long as wide")
    assert inverted.startswith("inverted: ")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((300, 200), []), ((200, 300), []), ((450, 225), []), ((1200, 300), ["shape"]),
        ((300, 1200), ["shape"]), ((60, 60), ["size"]), ((9000, 8000), ["size"]),
        ((900, 90), ["shape"]), ((90, 30), ["shape", "size"]),
    ],
)  # fmt: skip
def test_sizes(size: tuple[int, int], words: list[str]) -> None:
    """Training images of 200 x 300 to 400 x 300: shorter sides of 200 and 300, at most 1.5 : 1."""
    train = np.array([[200, 300], [300, 200], [400, 300]])
    assert [line.split(":")[0] for line in looks.of_size(size, train)] == words


def test_grey_pictures_are_dark_bright_or_usual() -> None:
    train = np.array([[100.0, 90.0], [140.0, 130.0]])
    flat = lambda value: np.full((16, 16, 3), value, np.uint8)  # noqa: E731
    assert looks.brightness(flat(7)[None]).tolist() == [[7, 7]]
    assert looks.of_brightness(flat(120), train) == []
    assert looks.of_brightness(flat(0), train)[0].startswith("brightness: mean 0 and border 0")
