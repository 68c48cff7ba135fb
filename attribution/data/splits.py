"""Divide images into disjoint training, validation and test splits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from attribution.config import Config
from attribution.data.sources import short_hash
from attribution.errors import InputError

SPLITS = ("train", "validation", "test")
TARGETS = "validation"  # the split whose margins the scores explain


def units(table: pd.DataFrame, values: Sequence[Any] | None, config: Config) -> pd.Series:
    """The unit of each image: the images of a unit go to one split.

    Without `split_by` a unit is an image with its copies. With it, units that share a copy are one.
    The halves of the training set that checkpoints see are drawn by image all the same: a score is
    about the effect of one image. So a training image's out-of-sample loss may rest on other images
    of its unit; losses of validation and test images never do.

    Args:
        table: digest, role, file_name and name (for messages) of each image.
        values: of the column `split_by`, None if it is a pattern.

    Raises:
        InputError: the pattern is wrong, an image has no unit, or a unit lies in several parts.
    """
    if not config.split_by:
        return table["digest"]
    shown = f"split_by={config.split_by}"
    if values is None:
        found = table["file_name"].str.extract(_pattern(config.split_by)).iloc[:, 0]
    else:
        found = pd.Series(values, table.index, object)
    if found.isna().any():
        raise InputError(
            f"{shown}: {found.isna().sum()} of {len(table)} images have no value, such as "
            f"{table['name'][found.isna()].iloc[0]!r}; give all one, or another pattern"
        )
    found = found.astype(str)
    images, unit = pd.factorize(table["digest"])[0], pd.factorize(found)[0]
    n = len(table)
    links = coo_array((np.ones(n), (images, n + unit)), shape=(2 * n, 2 * n))
    joined = connected_components(links, directed=False)[1][images]
    found = found.groupby(joined).transform("min")
    is_split = table.groupby(found)["role"].nunique() > 1
    if is_split.any():
        raise InputError(
            f"{shown}: {is_split.sum()} of its values, such as {is_split.idxmax()!r}, have images in "
            "several parts of the data set; add --resplit to divide all images anew"
        )
    return found


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"split_by={text}: not a regular expression ({error})") from None
    if not pattern.groups:
        raise InputError(
            f"split_by={text}: no column of the data set, and no pattern with a group in "
            "parentheses; '(patient\\d+)_' would group file names by patient"
        )
    return pattern


def carve(table: pd.DataFrame, config: Config) -> np.ndarray:
    """Assign a split to every row: official parts stay, the pool is divided class by class.

    The order of the draw is a hash of a unit's name (for a single image, of its content) and the
    seed, so it does not depend on the other images. The class with the fewest units is divided
    first, and its units count in the other classes: iterative stratification (Sechidis et al.
    2011), which serves a class of three units where k folds of groups leave it out of a split.

    Args:
        table: label, role and unit of each image.
    """
    split = table["role"].to_numpy(object).copy()
    pool = table[table["role"] == "pool"]
    shares = {"validation": config.val_fraction, "test": config.test_fraction}
    shares = {name: share for name, share in shares.items() if name not in set(split)}
    # An image that has two labels counts for the first, with all its copies.
    label = pool["label"] if config.split_by else pool.groupby("unit")["label"].transform("first")
    sizes = pool.groupby([label, "unit"]).size().rename("size").reset_index("unit")
    sizes["draw"] = [short_hash(str(config.data_seed), unit) for unit in sizes["unit"].tolist()]
    drawn: dict[str, str] = {}
    classes = [members for _, members in sizes.sort_values("draw").groupby("label")]
    for members in sorted(classes, key=len):
        _divide(dict(zip(members["unit"].tolist(), members["size"])), shares, drawn)
    split[pool.index] = [drawn[unit] for unit in pool["unit"].tolist()]
    return split


def _divide(sizes: dict[str, int], shares: dict[str, float], drawn: dict[str, str]) -> None:
    """Give each split its share of one class's images, in order; the rest is for training.

    Args:
        sizes: number of images of the class, by unit.
        shares: of the splits to make.
        drawn: split by unit, from the classes before; the units of this class are added.
    """
    for after, (name, share) in enumerate(shares.items()):
        target = max(1, round(share * sum(sizes.values())))
        free = [unit for unit in sizes if unit not in drawn]
        spare = len(free) - (len(shares) - after)  # keep one unit for each later split
        filled = sum(size for unit, size in sizes.items() if drawn.get(unit) == name)
        for unit in free:
            if spare > 0 and filled + sizes[unit] <= target:
                drawn[unit], filled, spare = name, filled + sizes[unit], spare - 1
        if not filled and free:
            drawn[min(free, key=sizes.__getitem__)] = name
    for unit in sizes:
        drawn.setdefault(unit, "train")


def check_every_class(
    examples: pd.DataFrame, names: Sequence[str], shown: str, why: str = ""
) -> None:
    """Refuse examples among which a class is missing from a split.

    Args:
        shown: the parameter that they follow from, and its value.
        why: the end of the message.

    Raises:
        InputError: a split lacks a class.
    """
    for split in SPLITS:
        left = set(examples["label"][examples["split"] == split])
        for label in sorted(set(range(len(names))) - left):
            kind = "training" if split == "train" else split
            raise InputError(f"{shown}: no {kind} example of class {names[label]!r} is left{why}")
