"""Numbers that go wrong: an error that says so or a documented fallback, never a silent NaN."""

from __future__ import annotations

from dataclasses import replace
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
from attribution.models import classifier
from attribution.models.ensemble import Ensemble, label_quality
from attribution.models.predict import margins
from attribution.models.train import train, train_stacked
from attribution.reporting import terminal
from attribution.runtime.device import resolve_precision
from attribution.scores import trak
from attribution.scores.alignment import auto_groups, group_alignment, group_weights
from attribution.scores.artifact import Scores, top_k
from attribution.scores.suspects import near_duplicates
from attribution.scores.traker_adapters import RidgeScoreComputer

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


# -- Gram matrices ---------------------------------------------------------------------------------


def tau(train: np.ndarray, targets: np.ndarray, lambda_reg: float) -> np.ndarray:
    """Scores (n, m) of features, as the project computes them."""
    phi, psi = (torch.from_numpy(np.asarray(x, np.float32)) for x in (train, targets))
    computer = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=lambda_reg)
    found = torch.zeros(len(phi), len(psi))
    computer.get_scores(computer.get_x_xtx_inv(phi, computer.get_xtx(phi)), psi, found)
    return found.numpy()


def dual(train: np.ndarray, targets: np.ndarray, lambda_reg: float) -> np.ndarray:
    """The same by way of the n x n matrix: Phi (Phi'Phi + l I)^-1 = (Phi Phi' + l I)^-1 Phi."""
    kernel = train @ train.T
    ridge = lambda_reg * np.square(train).sum() / train.shape[1]
    return np.linalg.solve(kernel + ridge * np.eye(len(train)), train @ targets.T)


SMALL = RNG.normal(size=(5, 20))  # n < k


@pytest.mark.parametrize(
    ("features", "targets"),
    {
        "fewer examples than features": (SMALL, RNG.normal(size=(3, 20))),
        "one target": (RNG.normal(size=(30, 6)), RNG.normal(size=(1, 6))),
        "one example": (RNG.normal(size=(1, 4)), RNG.normal(size=(2, 4))),
        "every example twice": (np.repeat(SMALL, 2, axis=0), SMALL),
        "all the same": (np.tile(SMALL[:1], (7, 1)), SMALL),
        "large": (1e12 * SMALL, 1e12 * SMALL),
        "small": (1e-12 * SMALL, 1e-12 * SMALL),
    }.values(),
)
def test_with_a_ridge_scores_are_those_of_the_dual_form(features, targets) -> None:
    expected = dual(features, targets, 0.1)
    np.testing.assert_allclose(
        tau(features, targets, 0.1), expected, atol=1e-5 * abs(expected).max()
    )


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_share_what_one_would_have(copies: int) -> None:
    """Of unit vectors, each so many times, the Gram matrix is a multiple of the identity."""
    found = tau(np.repeat(np.eye(4), copies, axis=0), np.eye(4), 0.5)
    expected = np.repeat(np.eye(4), copies, axis=0) / (copies * 1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_of_equal_features_every_score_is_the_closed_form_s() -> None:
    n, k, ridge = 7, 3, 0.25
    features = np.ones((n, k)) * [1, -2, 0.5]
    np.testing.assert_allclose(
        tau(features, features, ridge), np.full((n, n), 1 / (n * (1 + ridge / k))), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("features", "lambda_reg", "says"),
    {
        "n < k, no ridge": (SMALL, 0, "singular with lambda_reg 0 and proj_dim 20; raise"),
        "copies, no ridge": (np.tile(SMALL[:2, :4], (9, 1)), 0, "singular"),
        "a ridge below rounding": (np.tile(SMALL[:1, :4], (9, 1)), 1e-9, "singular"),
        "zero": (np.zeros((5, 2)), 0.1, "zero, or nearly so"),
        "squares that vanish": (1e-20 * SMALL, 0.1, "zero, or nearly so"),
        "squares that overflow": (1e25 * SMALL, 0.1, "not finite"),
        "NaN": (np.where(SMALL > 1, np.nan, SMALL), 0.1, "not finite"),
        "infinite": (np.where(SMALL > 1, np.inf, SMALL), 0.1, "not finite"),
    }.values(),
)
def test_a_gram_matrix_that_cannot_be_solved_is_refused(features, lambda_reg, says) -> None:
    with pytest.raises(InputError, match=says):
        tau(features, np.ones((1, features.shape[1])), lambda_reg)


def test_a_factor_that_is_not_finite_is_refused() -> None:
    computer = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=0.1)
    with pytest.raises(InputError, match="singular"):
        computer.factor(torch.full((1, 2, 2), np.nan, dtype=torch.float64))


@pytest.mark.parametrize("lambda_reg", [-1.0, np.nan, np.inf])
def test_a_ridge_that_is_no_ridge_is_refused(lambda_reg: float) -> None:
    with pytest.raises(InputError, match="lambda_reg"):
        RidgeScoreComputer(torch.float32, "cpu", lambda_reg=lambda_reg)


# -- models that are no good -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy"))


PRECISIONS = ["float32"] + ["bfloat16"] * (
    resolve_precision("auto", torch.device("cpu")) == torch.bfloat16
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (1e20, "features are not finite"),  # the margin is a number, the gradient's square is none
        (3e38, "the margin of sample 0 is not finite"),
        (0.0, "zero, or nearly so"),  # of the layers below the head
    ],
)
def test_a_checkpoint_whose_gradients_overflow_or_vanish_is_refused(
    toy, tmp_path: Path, precision: str, scale: float, says: str
) -> None:
    model = classifier.build("resnet-mini", toy.class_names, 0)
    with torch.no_grad():
        model.classifier[1].weight.sign_().mul_(scale)
    classifier.save(model, tmp_path / "model", 16, *classifier.normalisation("resnet-mini"))
    config = toy_config(proj_dim=8, num_blocks=2, num_models=1, lambda_reg=0.1)
    config = replace(config, feature_precision=precision)
    with pytest.raises(InputError, match=says):
        trak.compute_scores(config, toy, [tmp_path / "model"], tmp_path / "work")
    assert not (tmp_path / "work" / "scores.npy").exists()


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("largest", [True, False])
def test_the_best_of_scores_that_are_not_finite_are_refused(bad: float, largest: bool) -> None:
    values = np.zeros((9, 2), np.float32)
    values[5, 1] = bad
    scores = Scores(values, pd.DataFrame({"position": range(9)}), pd.DataFrame(index=range(2)), {})
    with pytest.raises(InputError, match="^target=1: a score of it is not finite"):
        scores.top(1, 3) if largest else scores.bottom(1, 3)
    assert len(scores.top(0, 3)) == 3
    if not np.isinf(bad) or (bad > 0) == largest:
        with pytest.raises(InputError, match="^scores: not all are finite"):
            top_k(values, 3, largest)


@pytest.mark.parametrize("kind", ["exp_loss", "loss", "uniform", "paper"])
@pytest.mark.parametrize("losses", [[0, 0, 0], [1e6, 0, 1e6], [800, 1, 1], [7, 7, 7]])
def test_weights_of_groups_are_finite_and_sum_to_one(kind: str, losses: list[float]) -> None:
    weights = group_weights(np.array(losses, float), np.array([0, 1, 2]), kind)
    assert np.isfinite(weights).all() and weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    if len(set(losses)) == 1:
        np.testing.assert_allclose(weights, 1 / 3)


def test_alignment_with_one_target_is_its_column() -> None:
    values = RNG.normal(size=(6, 1)).astype(np.float32)
    weights = group_weights(np.array([3.0]), np.array([0]), "exp_loss")
    np.testing.assert_array_equal(group_alignment(values, np.array([0]), weights), values[:, 0])


@pytest.mark.parametrize("value", [0.0, 1.0, -1e30])
def test_labels_whose_scores_are_all_equal_are_not_divided(value: float) -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = auto_groups(np.full((4, 6), value, np.float32), labels)
    np.testing.assert_array_equal(found, labels)


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


def test_images_without_contrast_are_near_duplicates_of_nothing() -> None:
    assert (
        near_duplicates(np.zeros((4, 6), np.float32), np.array([0, 1, 0, 1])).tolist() == [-1] * 4
    )


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
