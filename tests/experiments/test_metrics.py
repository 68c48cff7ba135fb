"""The metrics that arms are compared by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from toy import toy_config

from attribution.experiments.metrics import METRICS, class_metrics, headline, image_worth
from attribution.models.predict import classification_metrics


def test_metrics_of_a_rare_class_are_those_counted_by_hand() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    logits = np.eye(2)[[0] * 9 + [1]] * [3, 3]  # one of the two rare ones is missed
    found = class_metrics(labels, logits)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["macro_f1"] == pytest.approx((16 / 17 + 2 / 3) / 2)
    assert found["auroc"] == pytest.approx(0.75)  # 8 pairs are ordered, 8 are ties


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_metrics_are_scikit_learns_and_lie_within_0_and_1(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 9)])
    logits = rng.normal(size=(len(labels), classes))
    found = class_metrics(labels, logits)
    assert found["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels, logits.argmax(1))
    )
    assert found["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert ("auroc" in found) == (classes == 2)
    if classes == 2:
        probability = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
        assert found["auroc"] == pytest.approx(roc_auc_score(labels, probability))
    assert all(0 <= value <= 1 for value in found.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_one_image_changes_a_metric_by_at_most_its_worth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, 9)])
    logits = rng.normal(size=(12, 3))
    changed = logits.copy()
    changed[rng.integers(12)] = rng.normal(size=3)
    worth = image_worth(labels)
    before, after = (
        class_metrics(labels, each) | classification_metrics(each, labels)
        for each in (logits, changed)
    )
    for name in ("accuracy", "balanced_accuracy", "worst_class_accuracy"):
        assert abs(after[name] - before[name]) <= worth[name] + 1e-12


def test_the_worth_of_an_image_is_that_of_the_smallest_class_or_group() -> None:
    labels, groups = np.array([0] * 16 + [1] * 4), np.array([3] * 18 + [9] * 2)
    worth = image_worth(labels, groups)
    assert worth == pytest.approx(
        {
            "accuracy": 1 / 20,
            "balanced_accuracy": 1 / 8,
            "macro_f1": 1 / 8,
            "worst_class_accuracy": 1 / 4,
            "worst_group_accuracy": 1 / 2,
            "auroc": 1 / 64,
        }
    )
    assert list(worth) == list(METRICS)


@pytest.mark.parametrize(
    ("metric", "counts", "expected"),
    [
        ("auto", (30, 10), "accuracy"),
        ("auto", (31, 10), "balanced_accuracy"),
        ("auto", (10, 31), "balanced_accuracy"),
        ("accuracy", (90, 10), "accuracy"),
        ("macro_f1", (10, 10), "macro_f1"),
        ("worst_class", (10, 10), "worst_class_accuracy"),
    ],
)
def test_the_headline_is_balanced_where_classes_differ_by_more_than_three_times(
    metric, counts, expected
) -> None:
    labels = np.repeat([0, 1], counts)
    name, why = headline(toy_config(metric=metric), labels, ("cat", "dog"))
    assert name == expected and bool(why) == (expected != "accuracy")
    if metric == "auto" and why:
        assert f"'{['cat', 'dog'][np.argmax(counts)]}' there are 31 training images" in why
        assert f"'{['cat', 'dog'][np.argmin(counts)]}' 10" in why
