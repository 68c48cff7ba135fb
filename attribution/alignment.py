"""One number for each training example: how much it helps the groups of targets that need help."""

from __future__ import annotations

import numpy as np
import pandas as pd

from attribution.config import nearest
from attribution.errors import InputError
from attribution.matrices import row_blocks


def group_ids(targets: pd.DataFrame, groups: str) -> np.ndarray:
    """The group of each target, (n_targets,), as whole numbers from 0.

    Raises:
        InputError: no such column, or it has a single value.
    """
    if groups not in targets.columns:
        raise InputError(f"groups={groups}: no such column; {nearest(groups, list(targets))}")
    ids = pd.factorize(targets[groups], sort=True)[0]
    if ids.min() < 0 or ids.max() < 1:
        raise InputError(f"groups={groups}: the column must have two values or more, none missing")
    return ids


def group_weights(losses: np.ndarray, groups: np.ndarray, kind: str) -> np.ndarray:
    """Weight of each group, (n_groups,), summing to 1.

    Args:
        losses: (n_targets,) ensemble loss in nats of each target.
        groups: (n_targets,) from group_ids.
        kind: 'exp_loss' (exp of the group's mean loss: a worse group weighs more), 'loss',
            'uniform', or 'paper' (exp of minus the loss, the formula of the D3M workshop paper
            read literally, under which a worse group weighs less; kept to compare).
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
    """Alignment of each training example, (n_train,), float64; positive = helpful.

    A_i = sum over groups g of w_g times the mean of scores[i, j] over the targets j in g
    (Jain et al. 2024, "Data Debiasing with Datamodels (D3M)", equation 4).

    Args:
        scores: (n_train, n_targets), positive = helpful; may be a memory map.
        groups: (n_targets,) group of each target.
        weights: (n_groups,) from group_weights.
    """
    column_weights = weights[groups] / np.bincount(groups)[groups]
    return np.concatenate(
        [block.astype(np.float64) @ column_weights for block in row_blocks(scores)]
    )
