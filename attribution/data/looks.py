"""Whether a new picture looks like the training images: its size, its shape, and its brightness."""

from __future__ import annotations

import io

import numpy as np

from attribution.data.dataset import ImageData
from attribution.data.sources import Source, content

SAMPLE = 256  # training images whose file is opened for its size, and most whose pixels are read
ASPECT = 1.5  # times the training images' longest shape: only the centre of a picture is seen
SMALLER, LARGER = 3, 16  # times the training images' shorter side
SLACK = 0.15  # of the range of brightness between training images, on both sides of it


def unlike(data: ImageData, size: tuple[int, int], pixels: np.ndarray) -> list[str]:
    """One line for each way in which a picture looks unlike the training images.

    Args:
        size: width and height of the picture in its file.
        pixels: uint8 (size, size, 3), as the model sees them.
    """
    rows = data.rows("train")
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)]
    train = brightness(np.asarray(data.pixels()[chosen]))
    found = of_size(size, _training_sizes(data.listing.source)) if data.listing else []
    return found + of_brightness(pixels, train)


def _training_sizes(source: Source) -> np.ndarray:
    """Width and height of a sample of the data set's images, (n, 2), as their files have them."""
    n = len(source.labels)
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int))
    sizes = []
    for cell in source.cells(rows):
        try:
            sizes.append(source.open(io.BytesIO(content(cell))).size)
        except Exception:  # a damaged file, which on_bad_image=skip allows
            continue
    return np.array(sizes)


def of_size(size: tuple[int, int], train: np.ndarray) -> list[str]:
    """What is unusual about a width and height among those of training images, (n, 2)."""
    short, long = min(size), max(size)
    typical = int(np.median(train.min(1)))
    shape, longest = long / short, float((train.max(1) / train.min(1)).max())
    found, shown = [], f"{size[0]} × {size[1]} pixels"
    if shape > ASPECT * longest:
        found.append(
            f"shape: {shown}, {shape:.1f} times as long as wide (training images at most "
            f"{longest:.1f}); the model sees only the square in its middle"
        )
    if short * SMALLER < train.min() or short > LARGER * train.min(1).max():
        word = "small" if short < typical else "large"
        found.append(f"size: {shown} is {word}; the shorter side of training images is {typical}")
    return found


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Of images uint8 (n, size, size, 3): the mean of all pixels, and of those at the border, (n, 2)."""
    grey = pixels.mean(axis=3)
    edge = max(1, grey.shape[1] // 16)
    inner = grey[:, edge:-edge, edge:-edge]
    border = (grey.sum((1, 2)) - inner.sum((1, 2))) / (grey[0].size - inner[0].size)
    return np.stack([grey.mean((1, 2)), border], axis=1)


def of_brightness(pixels: np.ndarray, train: np.ndarray) -> list[str]:
    """What is unusual about a picture's brightness among those of training images, (n, 2)."""
    low, high = train.min(0), train.max(0)
    slack = SLACK * (high - low) + 2

    def is_usual(values: np.ndarray) -> bool:
        return bool(((values >= low - slack) & (values <= high + slack)).all())

    own, inverse = brightness(np.stack([pixels, 255 - pixels]))
    if is_usual(own):
        return []
    mean, border = np.median(train, axis=0)
    figures = (
        f"mean {own[0]:.0f} and border {own[1]:.0f} of 255 (training images: "
        f"typically {mean:.0f} and {border:.0f})"
    )
    if is_usual(inverse):
        return [f"inverted: {figures}; dark and light look swapped, so try the inverted picture"]
    return [f"brightness: {figures}"]
