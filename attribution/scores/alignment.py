"""Alignment: one number per training example, how much it helps the groups of targets."""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.config import nearest
from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.runtime.npy_blocks import pieces, row_blocks

AUTO = ("auto", "auto_uncentred")
SMALLEST_HALF = 0.05  # share of a label's targets; a smaller half stays with its label


def group_ids(targets: pd.DataFrame, groups: str, scores: np.ndarray | None = None) -> np.ndarray:
    """Group of each target, (n_targets,) whole numbers from 0.

    Args:
        targets: one row per target.
        groups: a column of `targets`, or one of AUTO.
        scores: (n_train, n_targets); only needed for AUTO.

    Raises:
        InputError: an unknown column, or one with a single value or a missing value.
    """
    if groups in AUTO:
        assert scores is not None
        return auto_groups(scores, targets["label"].to_numpy(), is_centred=groups == "auto")
    if groups not in targets.columns:
        valid = [*AUTO, *targets]
        raise InputError(f"groups={groups}: no such column; {nearest(groups, valid, limit=10)}")
    ids = pd.factorize(targets[groups], sort=True)[0]
    if ids.min() < 0 or ids.max() < 1:
        raise InputError(
            f"groups={groups}: the column must have at least two values, and none missing"
        )
    return ids


def check_groups(examples: pd.DataFrame, groups: str) -> None:
    """Refuse a column that cannot group the targets, before anything is trained.

    Args:
        examples: all examples, with their split.
        groups: a column of `examples`, or one of AUTO.

    Raises:
        InputError: an unknown column, a single value, or a group without validation examples.
    """
    if groups in AUTO:
        return
    examples = examples[examples["split"].isin(SPLITS)]
    splits = {name: part for name, part in examples.groupby("split")}
    for part in (splits["validation"], *splits.values()):
        group_ids(part, groups)
    known = set(splits["validation"][groups])
    lost = sorted(map(str, set(examples[groups]) - known))
    if lost:
        raise InputError(
            f"groups={groups}: group {lost[0]!r} has no validation example, so nothing could tell "
            "which examples help it; merge it with another group, or use groups=label"
        )


def auto_groups(scores: np.ndarray, labels: np.ndarray, is_centred: bool = True) -> np.ndarray:
    """Pseudo-groups of targets that different training examples help, (n_targets,) from 0.

    The targets of each label are split by the sign of the first principal component of their
    normalised score columns (Jain et al. 2024, "Data Debiasing with Datamodels (D3M)", section 4,
    Auto-D3M). A label stays whole if one side would have fewer than 5 % of its targets, or one.

    Args:
        scores: (n_train, n_targets); may be a memory map.
        labels: (n_targets,) labels of the targets.
        is_centred: whether the sign is that of the projection less its mean, as principal components
            are defined. The authors' code takes the sign of the projection itself.
    """
    columns = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    grams = [np.zeros((len(c), len(c))) for c in columns]
    for block in row_blocks(scores):
        for gram, c in zip(grams, columns, strict=True):
            part = block[:, c].astype(np.float64)
            gram += part.T @ part
    ids, count = np.zeros(len(labels), dtype=np.int64), 0
    for gram, c in zip(grams, columns, strict=True):
        positive = _first_component(gram, is_centred) > 0
        smaller = min(positive.sum(), len(c) - positive.sum())
        is_split = smaller >= max(2, SMALLEST_HALF * len(c))
        ids[c] = count + (positive if is_split else 0)
        count += 1 + is_split
    return ids


def _first_component(gram: np.ndarray, is_centred: bool) -> np.ndarray:
    """Projections, up to a factor, of vectors scaled to length one on their first principal component.

    Args:
        gram: (n, n) Gram matrix of the vectors.
        is_centred: whether the projections (n,) have their mean subtracted.
    """
    lengths = np.sqrt(np.diag(gram))
    scale = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosine = gram * np.outer(scale, scale)
    centred = cosine - cosine.mean(0) - cosine.mean(1, keepdims=True) + cosine.mean()
    values, vectors = np.linalg.eigh(centred)
    if values[-1] <= 1e-9:
        return np.zeros(len(gram))
    return vectors[:, -1] if is_centred else cosine @ vectors[:, -1]


def group_weights(losses: np.ndarray, groups: np.ndarray, kind: str) -> np.ndarray:
    """Weight of each group, (n_groups,), with sum 1.

    Args:
        losses: (n_targets,) ensemble loss of each target in nats.
        groups: (n_targets,) from group_ids.
        kind: 'exp_loss' (exp of the group's mean loss: a worse group weighs more), 'loss' (the mean
            loss), 'uniform', or 'paper' (exp of minus the mean loss, the formula of the D3M paper
            taken literally: a worse group weighs less; for comparison).
    """
    mean_loss = np.bincount(groups, losses) / np.bincount(groups)
    weights = {
        "exp_loss": np.exp(mean_loss - mean_loss.max()),
        "loss": np.maximum(mean_loss, np.finfo(float).tiny),
        "uniform": np.ones_like(mean_loss),
        "paper": np.exp(mean_loss.min() - mean_loss),
    }[kind]
    return weights / weights.sum()


def group_alignment(scores: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Alignment of each training example, (n_train,) float64; positive = helpful.

    A_i is the sum over groups g of w_g times the mean of scores[i, j] over the targets j of g (Jain
    et al. 2024, "Data Debiasing with Datamodels (D3M)", equation 4).

    Args:
        scores: (n_train, n_targets), positive = helpful; may be a memory map.
        groups: (n_targets,) group of each target.
        weights: (n_groups,) from group_weights.
    """
    column_weights = weights[groups] / np.bincount(groups)[groups]
    return np.concatenate(
        [
            piece.astype(np.float64) @ column_weights
            for block in row_blocks(scores)
            for piece in pieces(block)
        ]
    )


def unweighted(alignment: np.ndarray, row_weight: np.ndarray) -> np.ndarray:
    """Alignment divided by the row weights of the scores, (n_train,); 0 where a weight is 0."""
    return np.divide(alignment, row_weight, out=np.zeros(len(alignment)), where=row_weight > 0)


def held_out_weights(masks: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Weight of each training example as a target under each checkpoint, (M, n_train).

    Every group has the same weight. Weights by loss would favour groups with many wrong labels, which
    are what the result should find. Within a group only examples that the checkpoint did not see
    count, all alike: a checkpoint's margins on examples it was fitted to say nothing.

    Args:
        masks: (M, n_train) bool, the examples that each checkpoint saw.
        groups: (n_train,) group of each training example, from 0.
    """
    unseen, count = ~masks, groups.max() + 1
    members = np.stack([np.bincount(groups, row, count) for row in unseen])
    return unseen / (count * np.maximum(members, 1))[:, groups]
