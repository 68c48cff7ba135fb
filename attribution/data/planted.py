"""Faults planted in the data on purpose, so that what the scores find can be checked: label noise, a patch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.errors import InputError

PATCH_COLOUR = (255, 0, 255)
PATCH_SHARE = {"first class": 0.95, "others": 0.05, "held out": 0.5}


def plant_noise(table: pd.DataFrame, names: list[str], config: Config) -> pd.DataFrame:
    """The columns of ImageData.examples, with round(label_noise * n_train) wrong training labels.

    A flipped label becomes any other class (noise_kind=uniform) or the next class (noise_kind=pair:
    Han et al. 2018, "Co-teaching").
    """
    true_label = table["label"].to_numpy(np.int64)
    train = np.flatnonzero(table["split"] == "train")
    generator = np.random.default_rng(config.data_seed)
    flipped = generator.choice(train, round(config.label_noise * len(train)), replace=False)
    label = true_label.copy()
    last = len(names) if config.noise_kind == "uniform" else 2
    label[flipped] += generator.integers(1, last, len(flipped))
    label %= len(names)
    return pd.DataFrame(
        {
            "example_id": example_ids(table),
            "file_name": table["file_name"],
            "split": table["split"],
            "label": label,
            "label_name": [names[i] for i in label],
            "true_label": true_label,
            "is_flipped": label != true_label,
        }
    )


def example_ids(table: pd.DataFrame) -> list[str]:
    """An id for each row of a listing, by its image's content; copies are numbered."""
    copy = table.groupby("digest").cumcount()
    return [f"{d[:16]}-{c}" if c else d[:16] for d, c in zip(table["digest"].tolist(), copy)]


def plant_patch(examples: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Add columns has_patch and group: in training a patch gives the first class away, later not.

    Images are drawn within each true class and split, in exact shares.

    Raises:
        InputError: the images are too small for a patch.
    """
    if config.image_size < 8:
        raise InputError(
            f"image_size={config.image_size}: too small for shortcut=patch; use 8 or more"
        )
    generator = np.random.default_rng([config.data_seed, 1])
    has_patch = np.zeros(len(examples), dtype=bool)
    for (split, true_label), rows in examples.groupby(["split", "true_label"]).indices.items():
        kind = "first class" if true_label == 0 else "others"
        share = PATCH_SHARE[kind if split == "train" else "held out"]
        has_patch[generator.choice(rows, round(share * len(rows)), replace=False)] = True
    names = np.where(has_patch, "with patch", "without patch")
    return examples.assign(has_patch=has_patch, group=examples["label_name"] + ", " + names)


def paint_patch(file: Path, rows: np.ndarray) -> None:
    """Paint a coloured square on these rows of a pixels file, in place.

    The square's side, and its distance from the upper left corner, are a sixth of the image's side.
    """
    pixels = np.load(file, mmap_mode="r+")
    side = max(2, pixels.shape[1] // 6)
    for row in rows:
        pixels[row, side : 2 * side, side : 2 * side] = PATCH_COLOUR
    pixels.flush()
