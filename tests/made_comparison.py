"""A made-up comparison of arms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd

from attribution.experiments.arms import Trial
from attribution.experiments.comparison import comparison_table
from attribution.experiments.outcome import compare

N_TEST = 400


N_SEEDS = 5


LABELS = np.arange(N_TEST) % 2


GROUPS = (np.arange(N_TEST) >= 300).astype(int)


BASE = [310, 296, 322, 305, 301]


# Right answers of each trial less those of `none`, under each seed.
MORE = {
    ("none", 0, "remove"): [0, 0, 0, 0, 0],
    ("random", 4, "remove"): [0, -1, 0, 1, 0],
    ("random", 8, "remove"): [-2, 1, 0, 0, -1],
    ("harmful", 4, "remove"): [9, 8, 10, 8, 9],
    ("harmful", 8, "remove"): [15, 14, 14, 16, 15],
    ("loss", 4, "remove"): [3, -2, 1, 0, 1],
    ("loss", 8, "remove"): [-3, 1, 1, -1, 0],
    ("random", 4, "relabel"): [1, 0, 0, -1, 0],
    ("oracle", 4, "relabel"): [19, 18, 20, 18, 19],
}


def table_of(
    more: dict, groups: np.ndarray | None = None, metric: str = "accuracy"
) -> pd.DataFrame:
    rows = tuple((*key, tuple(added)) for key, added in more.items())
    return _table_of(rows, None if groups is None else tuple(groups), metric).copy()


@cache  # a comparison takes a second
def _table_of(rows: tuple, groups: tuple | None, metric: str) -> pd.DataFrame:
    trials, logits = [], []
    for arm, size, action, added in rows:
        trial = Trial(arm, size / 40, (np.arange(size),) * N_SEEDS)
        if action == "relabel":
            trial = replace(trial, new_labels=(np.zeros(size, int),) * N_SEEDS)
        trials.append(trial)
        right = np.arange(N_TEST) < np.add(BASE, added)[:, None]
        shown = np.where(right, LABELS, 1 - LABELS)
        logits.append(3 * np.eye(2)[shown])
    given = None if groups is None else np.array(groups)
    return comparison_table(compare(trials, logits, LABELS, given, metric))


def only(*arms: str) -> dict:
    return {key: value for key, value in MORE.items() if key[0] in ("none", "random", *arms)}
