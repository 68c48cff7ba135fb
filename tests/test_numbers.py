"""Numbers that go wrong: an error that says so or a documented fallback, never a silent NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy import toy_config, toy_data

from attribution.data.decoding import read_image
from attribution.errors import InputError
from attribution.experiments.evaluation import judge
from attribution.experiments.methods import Attribution
from attribution.experiments.statistics import (
    bootstrap_interval,
    detection,
    mean_estimate,
    paired_difference,
)
from attribution.experiments.subset_bank import Bank
from attribution.gradients import GradientError
from attribution.gradients.per_sample import capture
from attribution.gradients.per_sample import margins as torch_margins
from attribution.models.ensemble import Ensemble, label_quality
from attribution.models.predict import margins
from attribution.models.train import train, train_stacked
from attribution.reporting import terminal
from attribution.runtime.device import resolve_precision

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


# -- models that are no good -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy"))


PRECISIONS = ["float32"] + ["bfloat16"] * (
    resolve_precision("auto", torch.device("cpu")) == torch.bfloat16
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_diverged_training_is_refused(toy, precision: str, stacked: bool) -> None:
    config, keep = toy_config(learning_rate=1e9, precision=precision), np.ones(32, bool)
    with pytest.raises(InputError, match="^learning_rate=1000000000.0: .*use a smaller one"):
        if stacked:
            train_stacked(config, toy, [1, 2], [keep, keep])
            pytest.fail("a diverged stack came back")
        train(config, toy, 1, keep)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_training_set_too_small_for_a_batch_is_refused(toy, kept: int) -> None:
    with pytest.raises(InputError, match="^keep: "):
        train(toy_config(), toy, 0, np.arange(32) < kept)


def test_one_class_has_no_margin() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1)).eval()
    with pytest.raises(GradientError, match="at least two classes"):
        capture(model, torch.zeros(2, 3, 1, 1), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("gap", [0.0, 1.0, 1e4, 1e30])
def test_margins_of_extreme_logits_are_exact(gap: float) -> None:
    """With two classes the margin is the difference of the logits, however certain the model is."""
    logits = np.array([[gap, 0], [-gap, 0]], np.float32)
    expected = [float(np.float32(gap)), -float(np.float32(gap))]
    assert margins(logits, np.zeros(2, int)).tolist() == expected
    found = torch_margins(torch.from_numpy(logits), torch.zeros(2, dtype=torch.int64))
    assert found.tolist() == expected


def test_an_ensemble_that_is_certain_has_finite_losses_and_probabilities() -> None:
    logits = np.array([[[1e4, 0], [0, 1e4]]], np.float32)
    joint = Ensemble(np.array([[False, False]]), logits, logits)
    assert joint.train_loss(np.array([0, 0])).tolist() == [0, 1e4]
    assert joint.validation_loss(np.array([1, 1])).tolist() == [1e4, 0]
    assert joint.train_probabilities().tolist() == [[1, 0], [0, 1]]
    assert label_quality(np.array([0, 0]), joint.train_probabilities()).tolist() == [1, 0]


# -- scores that say nothing -----------------------------------------------------------------------


def judged(values: np.ndarray, margins: np.ndarray) -> pd.Series:
    masks = np.random.default_rng(1).random((len(margins), len(values))) < 0.5
    flipped = np.arange(len(values)) % 3 == 0
    return judge({"a": Attribution.of(values)}, Bank(masks, margins), flipped).iloc[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_undefined_of_equal_scores_is_empty_and_the_rest_is_chance() -> None:
    row = judged(np.zeros((12, 4), np.float32), RNG.normal(size=(10, 2, 4)))
    assert np.isnan([row["lds"], row["calibration_slope"], row["lds_share_of_ceiling"]]).all()
    assert terminal.interval(row, "lds", ".3f") == terminal.interval(row, "auroc_", ".3f") == ""
    assert row["auroc"] == 0.5 and 0 <= row["noise_ceiling"] <= 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_target_whose_margins_are_all_equal_counts_in_no_mean() -> None:
    values, margins = RNG.normal(size=(12, 4)), RNG.normal(size=(10, 2, 4))
    margins[:, :, 1] = 2.5
    others = [0, 2, 3]
    found = judged(values, margins)["lds"]
    assert found == pytest.approx(judged(values[:, others], margins[:, :, others])["lds"])


def test_with_nothing_flipped_or_all_there_is_nothing_to_detect() -> None:
    for value in (True, False):
        assert detection(np.full(5, value), np.arange(5.0)) == {}


# -- comparisons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_seed_whose_figure_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_estimate(np.array([0.5, bad]))
    with pytest.raises(ValueError, match="finite"):
        paired_difference(np.array([0.5, bad, 0.1]), np.zeros(3))


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("odd", [0.0, 0.1])
def test_intervals_of_seeds_that_nearly_all_agree_are_finite_and_hold_the_mean(n, odd) -> None:
    values = np.full(n, 0.25)
    values[0] += odd
    low, high = bootstrap_interval(values, draws=999)
    found = mean_estimate(values)
    assert low <= values.mean() <= high and found.ci_low <= values.mean() <= found.ci_high
    assert 0 < found.p <= 1


def comparison(difference: float, detectable: float) -> pd.DataFrame:
    name = "accuracy_vs_random"
    row = {"arm": "harmful", "frac": 0.1, "n_removed": 3, "n_seeds": 2, name: difference}
    row |= {f"{name}_ci_low": difference, f"{name}_ci_high": difference, f"{name}_p_holm": 1.0}
    return pd.DataFrame([row | {f"{name}_detectable": detectable}])


def test_seeds_without_spread_claim_no_power() -> None:
    """A difference of 0.0000 'found with 80 % power' would be what two lucky seeds say."""
    for difference in (0.0, 0.02):
        text = terminal.power(comparison(difference, 0.0))
        assert text.startswith("All 2 seeds") and "power is unknown" in text
    assert "±0.03 " in terminal.power(comparison(0.0, 0.03))


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros((4, 4), np.float32), 0),
        (np.ones((4, 4), np.float32), 255),
        (np.full((4, 4), 255, np.float32), None),  # beside an image below 1 it would be as white
        (np.full((4, 4), -5, np.float32), None),
        (np.full((4, 4), 65535, np.uint16), 255),
        (np.full((4, 4), np.nan, np.float32), None),
        (np.full((4, 4), np.inf, np.float32), None),
        (np.full((4, 4), 1e30, np.float32), None),
    ],
)
def test_pixels_of_another_range_are_scaled_or_refused(tmp_path: Path, values, expected) -> None:
    from PIL import Image

    Image.fromarray(values).save(tmp_path / "image.tif")
    content = (tmp_path / "image.tif").read_bytes()
    if expected is None:
        with pytest.raises(InputError, match="cannot be decoded|not an image"):
            read_image(content, 4)
    else:
        assert (read_image(content, 4) == expected).all()
