"""Divide images into disjoint training, validation and test splits, and keep a part of training."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.sources import short_hash
from attribution.errors import InputError

SPLITS = ("train", "validation", "test")
TARGETS = "validation"  # the split whose margins the scores explain
LEFT_OUT = "left out"  # the split of training examples that `keep` does not name
CARVED_SHARE = 0.2


def carve(table: pd.DataFrame, data_seed: int) -> np.ndarray:
    """Assign a split to every row: official parts stay, the pool is divided class by class.

    The order of the draw is a hash of an image's content and the seed. So it does not depend on
    the other images, and copies of an image get the same split.
    """
    split = table["role"].to_numpy(object).copy()
    pool = table[table["role"] == "pool"]
    missing = [name for name in ("test", "validation") if name not in set(split)]
    groups = pool.groupby("digest", sort=False)["label"].agg(["first", "size"])
    groups["draw"] = [short_hash(str(data_seed), digest) for digest in groups.index]
    drawn: dict[str, str] = {}
    for _, members in groups.sort_values("draw").groupby("first"):
        drawn.update(_divide(members["size"].to_dict(), missing))
    split[pool.index] = pool["digest"].map(drawn)
    return split


def _divide(sizes: dict[str, int], missing: list[str]) -> dict[str, str]:
    """Give a fifth of one class's images to each missing split, in order; the rest is for training.

    Args:
        sizes: number of copies of each image, by digest.
    """
    target = max(1, round(CARVED_SHARE * sum(sizes.values())))
    split = dict.fromkeys(sizes, "train")
    for after, name in enumerate(reversed(missing)):
        free = [digest for digest in sizes if split[digest] == "train"]
        spare = len(free) - (len(missing) - after)  # keep one image for each later split
        filled = 0
        for digest in free:
            if spare > 0 and filled + sizes[digest] <= target:
                split[digest], filled, spare = name, filled + sizes[digest], spare - 1
        if not filled:
            split[min(free, key=sizes.__getitem__)] = name
    return split


def read_ids(file: str) -> list[str]:
    """Read example_ids from a file: the column of that name in a .csv table, or one id per line.

    Raises:
        InputError: the file cannot be read, or holds no ids.
    """
    try:
        # utf-8-sig: spreadsheets start a saved table with a byte order mark.
        with Path(file).expanduser().open(encoding="utf-8-sig", newline="") as lines:
            rows = [row for row in csv.reader(lines) if any(map(str.strip, row))]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"keep={file}: cannot be read ({error})") from None
    column = 0
    if rows and "example_id" in rows[0]:
        column, rows = rows[0].index("example_id"), rows[1:]
    ids = [row[column].strip() for row in rows if len(row) > column]
    if not ids:
        raise InputError(f"keep={file}: holds no example_ids")
    return ids


def kept_splits(examples: pd.DataFrame, names: list[str], config: Config) -> np.ndarray:
    """The split of every example, LEFT_OUT for training examples that `keep` does not name.

    Raises:
        InputError: an id is unknown, or a class has no training example left.
    """
    ids = set(read_ids(config.keep))
    split = examples["split"].to_numpy(object).copy()
    train = split == "train"
    unknown = sorted(ids - set(examples["example_id"][train]))
    if unknown:
        raise InputError(
            f"keep={config.keep}: {len(unknown)} of its {len(ids)} example_ids are not in this "
            f"training set, e.g. {unknown[0][:40]!r}; were they written for other data, or with "
            "another data_seed?"
        )
    split[train & ~examples["example_id"].isin(ids)] = LEFT_OUT
    check_trained_classes(examples["label"][split == "train"], names, f"keep={config.keep}")
    return split


def check_trained_classes(labels: pd.Series, names: list[str], shown: str) -> None:
    """Refuse labels of training examples among which a class is missing.

    Args:
        shown: the parameter and its value, for the message.

    Raises:
        InputError: a class has no training example.
    """
    for label in sorted(set(range(len(names))) - set(labels)):
        raise InputError(f"{shown}: no training example of class {names[label]!r} is left")
