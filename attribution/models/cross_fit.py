"""Logits of every labelled image by models that were trained on four fifths of all images without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.models.retrain import Series, retrained_logits
from attribution.runtime.hashing import derive_seed, digest

FOLDS = 5
REPEATS = 3  # divisions into folds: one alone depends much on its draw


def cross_fit(config: Config, data: ImageData, work: Path) -> np.ndarray:
    """Train on all folds but one, in turn; return the left-out images' logits, (REPEATS, n, C) float32.

    Images of all splits are trained on alike, so that nothing that is judged on a split may use
    these logits. Images are in the order of SPLITS. All epochs are run: nothing is left over for
    `patience` to judge by.

    Args:
        work: folder of finished models' logits. A second call continues from it.

    Raises:
        InputError: as train() does.
    """
    split = data.examples["split"]
    examples = data.examples.assign(split=split.where(~split.isin(SPLITS), "train"))
    key = digest(data.fingerprint, "all images train")
    pooled = dataclasses.replace(data, examples=examples, fingerprint=key)
    labels, units = pooled.labels("train"), data.units()[pooled.rows("train")]
    folds = np.stack([draw_folds(labels, units, config.seed, r) for r in range(REPEATS)])
    keep = np.concatenate([each != np.arange(FOLDS)[:, None] for each in folds])
    for m, row in enumerate(keep):  # equally many for every model, which stacks need
        seen = np.random.default_rng(derive_seed(config.seed, "cross_fit", "spare", m))
        row[seen.permutation(np.flatnonzero(row))[keep.sum(axis=1).min() :]] = False
    seeds = [derive_seed(config.seed, "cross_fit", m) for m in range(len(keep))]
    series, config = Series("cross-fitting", seeds, keep), dataclasses.replace(config, patience=0)
    [logits] = retrained_logits(config, pooled, [series], "train", work, "trak")
    logits = logits.reshape(REPEATS, FOLDS, *logits.shape[1:])
    found = np.take_along_axis(logits, folds[:, None, :, None], axis=1)[:, 0]
    rows = np.concatenate([data.rows(split) for split in SPLITS])
    return found[:, np.searchsorted(pooled.rows("train"), rows)]


def draw_folds(labels: np.ndarray, units: np.ndarray, seed: int, repeat: int) -> np.ndarray:
    """Draw each image's fold, (n,) from 0 to FOLDS - 1, stratified by label.

    Args:
        units: (n,), images of one unit get one fold and count for the first one's label.
    """
    rng = np.random.default_rng(derive_seed(seed, "cross_fit", "folds", repeat))
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    fold = np.empty(len(first), np.int64)
    fold[np.lexsort((rng.permutation(len(first)), labels[first]))] = np.arange(len(first)) % FOLDS
    return fold[unit]
