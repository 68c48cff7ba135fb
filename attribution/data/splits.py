"""Divide images into disjoint training, validation and test splits."""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.data.sources import short_hash

SPLITS = ("train", "validation", "test")
TARGETS = "validation"  # the split whose margins the scores explain
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
