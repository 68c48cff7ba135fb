"""The scale of the scores is the slope of measured margins on predicted ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from attribution.scores.calibration import MARGIN, NO_UNIT, calibrate, describe, slope


def margins(seed: int, count: int = 10, targets: int = 30, noise: float = 1.0, slope: float = 4.0):
    """Predicted margins, and measured ones: slope times as large, moved for each target, and noisy."""
    rng = np.random.default_rng(seed)
    predicted = rng.normal(size=(count, targets))
    own = rng.normal(scale=5, size=targets)
    return predicted, slope * predicted + own + rng.normal(scale=noise, size=(count, targets))


def test_an_exact_scale_is_found_without_a_width() -> None:
    found = calibrate(*margins(0, noise=0))
    assert found.scale == pytest.approx(4) and found.high - found.low < 1e-9
    assert found.num_checkpoints == 10
    assert (
        describe(found)["unit"] == MARGIN and describe(found)["calibration"]["scale"] == found.scale
    )


def test_the_scale_is_that_of_regression_on_centred_margins() -> None:
    predicted, measured = margins(1)
    x, y = ((m - m.mean(0)).ravel() for m in (predicted, measured))
    expected = LinearRegression(fit_intercept=False).fit(x[:, None], y).coef_[0]
    assert calibrate(predicted, measured).scale == pytest.approx(expected)


def test_about_95_of_100_intervals_hold_the_true_scale() -> None:
    """Noise that all targets of a checkpoint share, as training has, is covered too."""
    held = 0
    for seed in range(400):
        predicted, measured = margins(seed, noise=0.5)
        shared = np.random.default_rng(1000 + seed).normal(size=(10, 1))
        found = calibrate(predicted, measured + shared)
        held += found.low <= 4 <= found.high
    assert 0.92 <= held / 400 <= 0.985


@pytest.mark.parametrize("case", ["two checkpoints", "all saw the same", "nothing but noise"])
def test_no_unit_is_claimed_where_checkpoints_do_not_tell_it(case: str) -> None:
    predicted, measured = margins(2)
    if case == "two checkpoints":
        predicted, measured = predicted[:2], measured[:2]
    elif case == "all saw the same":
        predicted = np.repeat(predicted[:1], 10, 0) * (1 + 1e-9 * np.arange(10)[:, None])
    else:
        measured = np.random.default_rng(3).normal(size=measured.shape)
    assert calibrate(predicted, measured) is None
    assert describe(None) == {"unit": NO_UNIT, "calibration": None}


def test_the_slope_is_that_of_a_regression_of_what_is_left_of_each_target() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(3, 1, (20, 4)), rng.normal(-1, 2, (20, 4))
    centred = [(values - values.mean(axis=0)).ravel() for values in (x, y)]
    assert slope(x, y) == pytest.approx(stats.linregress(*centred).slope)
    assert slope(x, 0.3 * x + np.arange(4)) == pytest.approx(0.3)
