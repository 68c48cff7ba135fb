"""Prediction, and the losses, margins and metrics that follow from logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.gradients.per_sample import margins as torch_margins
from attribution.models.batches import batches_of
from attribution.models.predict import (
    classification_metrics,
    losses,
    margins,
    predict,
)
from attribution.models.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ALL = np.ones(32, dtype=bool)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("toy"))


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(v.numpy().tobytes() for v in model.state_dict().values())


@pytest.fixture(scope="module")
def fitted(data) -> torch.nn.Module:
    return train(toy_config(epochs=1), data, 0, ALL).model


def test_prediction_and_plain_batches_are_never_augmented(data, fitted) -> None:
    plain, augmented = toy_config(augment="none"), toy_config(augment="flip,crop")
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(
            predict(plain, fitted, data, split), predict(augmented, fitted, data, split)
        )
        for (a, _), (b, _) in zip(
            batches_of(plain, data, split, 7, CPU), batches_of(augmented, data, split, 7, CPU)
        ):
            assert torch.equal(a, b)


def test_prediction_does_not_depend_on_which_examples_share_a_batch(data, fitted) -> None:
    together = predict(toy_config(), fitted, data, "test")
    one_by_one = [
        fitted(images).logits.detach()[0].numpy()
        for images, _ in batches_of(toy_config(), data, "test", 1, CPU)
    ]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_prediction_leaves_the_model_in_eval_mode_with_its_statistics(data, fitted) -> None:
    fitted.train()
    before = weights(fitted)
    predict(toy_config(), fitted, data, "test")
    assert not any(module.training for module in fitted.modules())
    assert weights(fitted) == before


def test_outputs_that_are_not_finite_are_refused(data) -> None:
    model = train(toy_config(epochs=1), data, 0, ALL, validate=False).model
    with torch.no_grad():
        model.classifier[1].bias[0] = math.nan
    with pytest.raises(InputError, match="learning_rate=0.01: .*not finite"):
        predict(toy_config(), model, data, "test")


# Figures made of logits


def by_mpmath(row: list[float], label: int) -> tuple[float, float]:
    """Loss and margin of one example with 60 digits more than float64 has."""
    import mpmath

    with mpmath.workdps(80):
        powers = [mpmath.e ** mpmath.mpf(v) for v in row]
        others = sum(p for i, p in enumerate(powers) if i != label)
        loss = mpmath.log(sum(powers)) - mpmath.mpf(row[label])
        return float(loss), float(mpmath.mpf(row[label]) - mpmath.log(others))


LOGIT_ROWS = st.lists(
    st.floats(-1e4, 1e4, width=32).map(lambda v: round(v, 3)), min_size=3, max_size=3
)


@settings(deadline=None)
@given(row=LOGIT_ROWS, label=st.integers(0, 2))
def test_loss_and_margin_are_those_of_exact_arithmetic_on_extreme_logits(row, label) -> None:
    loss, margin = by_mpmath(row, label)
    logits, labels = np.array([row]), np.array([label])
    np.testing.assert_allclose(losses(logits, labels), [loss], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(margins(logits, labels), [margin], rtol=1e-9, atol=1e-9)


@given(row=LOGIT_ROWS, label=st.integers(0, 2), shift=st.floats(-1e3, 1e3))
def test_a_shift_of_all_logits_changes_nothing(row, label, shift) -> None:
    labels = np.array([label])
    for figure in (losses, margins):
        shifted = figure(np.array([row]) + shift, labels)
        np.testing.assert_allclose(figure(np.array([row]), labels), shifted, atol=1e-7)


def test_the_margin_is_the_log_odds_of_the_label() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    found = margins(np.log(probabilities), np.array([0, 0]))
    np.testing.assert_allclose(found, np.log([0.7 / 0.3, 0.1 / 0.9]))


def test_float32_logits_are_computed_with_in_float64() -> None:
    logits = np.float32([[30.0, 0.0]])
    assert losses(logits, np.array([0]))[0] == pytest.approx(np.exp(-30), rel=1e-3)
    assert losses(logits, np.array([0])).dtype == np.float64


def test_the_probabilities_behind_losses_sum_to_one() -> None:
    logits = np.random.default_rng(0).normal(0, 50, (20, 5)).astype(np.float32)
    of_labels = [losses(logits, np.full(20, label)) for label in range(5)]
    np.testing.assert_allclose(np.exp(np.negative(of_labels)).sum(axis=0), 1)


def test_classification_metrics_are_those_counted_by_hand() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    metrics = classification_metrics(logits, np.array([0, 0, 1, 0]), "p_")
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    assert metrics == pytest.approx(
        {
            "p_accuracy": 0.5,
            "p_log_loss": (2 * right + 2 * wrong) / 4,
            "p_mean_margin": 0.0,
            "p_worst_class_accuracy": 0.0,
        }
    )


@pytest.mark.parametrize("gap", [0.0, 1.0, 1e4, 1e30])
def test_margins_of_extreme_logits_are_exact(gap: float) -> None:
    """With two classes the margin is the difference of the logits, however certain the model is."""
    logits = np.array([[gap, 0], [-gap, 0]], np.float32)
    expected = [float(np.float32(gap)), -float(np.float32(gap))]
    assert margins(logits, np.zeros(2, int)).tolist() == expected
    found = torch_margins(torch.from_numpy(logits), torch.zeros(2, dtype=torch.int64))
    assert found.tolist() == expected


@pytest.mark.parametrize("prefix", ["", "test_"])
def test_worst_group_accuracy_is_told_where_groups_are_given(prefix: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 3)), np.arange(60) % 3
    groups = rng.choice([2, 5, 9], 60, p=[0.6, 0.3, 0.1])
    right: dict[int, list[bool]] = {}
    for row, label, group in zip(logits, labels, groups):
        right.setdefault(int(group), []).append(max(range(3), key=lambda c: row[c]) == label)
    worst = min(sum(each) / len(each) for each in right.values())
    plain = classification_metrics(logits, labels, prefix)
    found = classification_metrics(logits, labels, prefix, groups=groups)
    assert found == plain | {f"{prefix}worst_group_accuracy": pytest.approx(worst)}
    assert worst not in plain.values()
    by_label = classification_metrics(logits, labels, groups=labels)
    assert by_label["worst_group_accuracy"] == by_label["worst_class_accuracy"]
