"""Arm against arm: which pairs, and their differences in one Holm family."""

from __future__ import annotations

import numpy as np
import pytest
from planted_trials import (
    CORRECT,
    LABELS,
    accuracy,
    controls,
    logits_with,
    trial,
)
from scipy import stats
from toy import toy_config

from attribution.errors import InputError
from attribution.experiments.contrasts import contrast, pairs_of
from attribution.experiments.outcome import compare

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_contrast_is_a_paired_difference_in_one_family_with_those_from_random() -> None:
    found = compare(
        [trial(*key) for key in CORRECT], list(map(logits_with, CORRECT.values())), LABELS
    )
    table = contrast(found, [("harmful", "loss"), ("harmful", "negative"), ("loss", "none")])
    pairs = [
        (("harmful", 5), ("loss", 5)),
        (("harmful", 5), ("negative", 9)),
        (("loss", 5), ("none", 0)),
    ]
    assert table["contrast"].tolist() == [
        "harmful 0.05-loss 0.05", "harmful 0.05-negative 0.09", "loss 0.05-none",
    ]  # fmt: skip
    versus = [(key, ("random", key[1])) for key in CORRECT if key[0] not in ("none", "random")]
    tests = [stats.ttest_rel(accuracy(a), accuracy(b)) for a, b in versus + pairs]
    adjusted, running = np.empty(len(tests)), 0.0
    for step, i in enumerate(np.argsort([each.pvalue for each in tests])):
        running = max(running, min(1, (len(tests) - step) * tests[i].pvalue))
        adjusted[i] = running
    np.testing.assert_allclose(table["p_holm"], adjusted[len(versus) :])
    own = [
        each.summary["accuracy_vs_random_p_holm"] for each in found if "random" in controls(each)
    ]
    np.testing.assert_allclose(own, adjusted[: len(versus)])
    for (a, b), row, test in zip(pairs, table.itertuples(), tests[len(versus) :], strict=True):
        interval = test.confidence_interval()
        assert row.difference == pytest.approx((accuracy(a) - accuracy(b)).mean())
        assert (row.ci_low, row.ci_high) == pytest.approx((interval.low, interval.high))
    assert table["verdict"].tolist()[0] == "better than loss 0.05"


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        ("harmful-los", "contrasts=harmful-los: los is not compared; did you mean loss"),
        ("harmful", "contrasts=harmful: not two arms"),
        ("loss-loss", "contrasts=loss-loss: not two arms"),
    ],
)
def test_a_contrast_of_an_arm_that_is_not_compared_is_refused(contrasts, message) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        pairs_of(toy_config(arms="harmful,loss", contrasts=contrasts))


def test_harmful_against_loss_is_the_default_where_both_are_compared() -> None:
    assert pairs_of(toy_config(arms="harmful,loss")) == [("harmful", "loss")]
    assert pairs_of(toy_config(arms="harmful")) == []
    given = pairs_of(toy_config(arms="harmful", contrasts="harmful-none,random-harmful"))
    assert given == [("harmful", "none"), ("random", "harmful")]
