"""The unit of the scores: how far a margin moves for each unit that the scores predict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

FEWEST = 3  # independent checkpoints from which a scale is estimated
MARGIN = "margin (log-odds of the target's label)"
NO_UNIT = "none: the scores rank, but their size means nothing"


@dataclass(frozen=True)
class Calibration:
    """The factor that brings scores into margins.

    Attributes:
        scale: measured change of a margin for each unit of predicted change.
        low, high: its 95 % interval.
        num_checkpoints: independent ones from which it was estimated.
    """

    scale: float
    low: float
    high: float
    num_checkpoints: int


def calibrate(predicted: np.ndarray, measured: np.ndarray) -> Calibration | None:
    """Estimate the scale from independent checkpoints that saw different examples.

    It is the slope, through the origin, of the measured margins on the predicted ones, each less its
    mean over checkpoints. The interval is Student's t around it, with the standard error of the
    delete-one jackknife over checkpoints (Efron and Stein 1981, "The Jackknife Estimate of Variance").

    Args:
        predicted: (M, n_targets), for each checkpoint the sum of the scores of what it saw.
        measured: (M, n_targets), the margins of the targets under each checkpoint.

    Returns:
        None where the checkpoints say nothing about a scale: they are fewer than three, saw the same
        examples, or the interval reaches zero.
    """
    count = len(predicted)
    if count < FEWEST or np.allclose(predicted, predicted[0]):
        return None
    scale = slope(predicted, measured)
    without = [slope(*(np.delete(x, m, 0) for x in (predicted, measured))) for m in range(count)]
    error = np.sqrt((count - 1) * np.var(without))
    reach = float(stats.t.ppf(0.975, count - 1) * error)
    if not scale - reach > 0:
        return None
    return Calibration(scale, scale - reach, scale + reach, count)


def slope(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Slope of measured on predicted margins (S, n_targets), each less its mean over models, pooled.

    1 is calibrated; below 1, predicted changes are too large.
    """
    x, y = predicted - predicted.mean(0), measured - measured.mean(0)
    return float((x * y).sum() / np.square(x).sum())


def describe(found: Calibration | None) -> dict[str, Any]:
    """The unit and the calibration, for the metadata of a score artifact."""
    return {"unit": MARGIN if found else NO_UNIT, "calibration": found and asdict(found)}
