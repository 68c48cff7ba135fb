"""The results of trials with planted numbers of right answers: differences, p-values, warnings, tables."""

from __future__ import annotations

import numpy as np
import pytest
from planted_trials import (
    BOTH,
    CORRECT,
    GROUPS,
    LABELS,
    N_SEEDS,
    N_TEST,
    accuracy,
    controls,
    logits_with,
    relabelled,
    trial,
)
from scipy import stats

from attribution.experiments.arms import Trial
from attribution.experiments.comparison import (
    comparison_table,
)
from attribution.experiments.outcome import Outcome, compare, warn
from attribution.experiments.verdicts import verdict

pytestmark = pytest.mark.usefixtures("one_thread")


JUDGEMENTS = ("p", "p_holm", "bootstrap_low", "bootstrap_high", "detectable")


@pytest.fixture(scope="module")
def outcomes() -> dict:
    trials = [trial(*key) for key in CORRECT]
    found = compare(trials, [logits_with(c) for c in CORRECT.values()], LABELS)
    return dict(zip(CORRECT, found))


@pytest.mark.parametrize("key", CORRECT)
def test_per_seed_accuracy_and_its_mean_are_the_planted_ones(outcomes, key) -> None:
    np.testing.assert_allclose(outcomes[key].per_seed["accuracy"], accuracy(key))
    assert outcomes[key].summary["accuracy_mean"] == pytest.approx(accuracy(key).mean())


@pytest.mark.parametrize(
    ("arm", "control", "name"),
    [
        (("harmful", 5), ("random", 5), "random"),
        (("negative", 9), ("random", 9), "random"),
        (("harmful", 5), ("none", 0), "none"),
        (("random", 9), ("none", 0), "none"),
    ],
)
def test_an_arm_is_compared_seed_by_seed_with_its_control(outcomes, arm, control, name) -> None:
    found, versus = outcomes[arm].summary, f"accuracy_vs_{name}"
    reference = stats.ttest_rel(accuracy(arm), accuracy(control))
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(
        [found[versus + end] for end in ("", "_ci_low", "_ci_high", "_p")],
        [(accuracy(arm) - accuracy(control)).mean(), interval.low, interval.high, reference.pvalue],
        rtol=1e-7,
    )


def test_none_is_compared_with_nothing_and_random_with_none_alone(outcomes) -> None:
    assert controls(outcomes["none", 0]) == set()
    assert controls(outcomes["random", 5]) == {"none"}
    assert controls(outcomes["loss", 5]) == {"none", "random"}


def test_worst_class_accuracy_is_that_of_the_worst_class(outcomes) -> None:
    count = CORRECT["harmful", 5][0]
    right = np.arange(N_TEST) < count
    worst = min(right[c == LABELS].mean() for c in range(4))
    found = outcomes["harmful", 5].per_seed["worst_class_accuracy"][0]
    assert found == pytest.approx(worst)


@pytest.mark.parametrize("name", ["random", "none"])
def test_p_values_are_adjusted_over_all_trials_with_that_control(outcomes, name: str) -> None:
    family = [o for o in outcomes.values() if name in controls(o)]
    p_values = [o.summary[f"accuracy_vs_{name}_p"] for o in family]
    running = 0.0
    for step, i in enumerate(np.argsort(p_values)):
        running = max(running, min(1, (len(family) - step) * p_values[i]))
        assert family[i].summary[f"accuracy_vs_{name}_p_holm"] == pytest.approx(running)


def test_summary_metrics_have_the_documented_names(outcomes) -> None:
    metrics = (
        "accuracy", "log_loss", "mean_margin", "worst_class_accuracy", "balanced_accuracy", "macro_f1",
    )  # fmt: skip
    expected = {f"{m}_{end}" for m in metrics for end in ("mean", "ci_low", "ci_high")}
    for control in ("random", "none"):
        for m in metrics:
            expected |= {f"{m}_vs_{control}{end}" for end in ("", "_ci_low", "_ci_high")}
        expected |= {f"accuracy_vs_{control}_{judgement}" for judgement in JUDGEMENTS}
    assert set(outcomes["harmful", 5].summary) == expected


@pytest.mark.parametrize("control", [("random", 5), ("none", 0)])
def test_a_difference_has_its_bootstrap_interval_and_what_it_could_have_shown(
    outcomes, control
) -> None:
    difference = accuracy(("harmful", 5)) - accuracy(control)
    found, name = outcomes["harmful", 5].summary, f"accuracy_vs_{control[0]}"
    wide = np.sqrt(N_SEEDS / (N_SEEDS - 1)) * stats.t.ppf(0.975, N_SEEDS - 1)  # few seeds
    level = 1 - 2 * stats.norm.sf(wide)
    reference = stats.bootstrap((difference,), np.mean, confidence_level=level, rng=1)
    ends = [found[f"{name}_bootstrap_low"], found[f"{name}_bootstrap_high"]]
    spread = difference.std(ddof=1)
    np.testing.assert_allclose(ends, reference.confidence_interval, atol=0.1 * spread)
    effect = found[f"{name}_detectable"] / spread
    critical = stats.t.ppf(0.975, N_SEEDS - 1)
    power = stats.nct.sf(critical, N_SEEDS - 1, effect * np.sqrt(N_SEEDS))
    assert power == pytest.approx(0.8, abs=1e-4)


def test_summary_metrics_are_plain_finite_numbers(outcomes) -> None:
    for outcome in outcomes.values():
        values = outcome.summary.values()
        assert all(type(v) is float for v in map(float, values)) and np.isfinite([*values]).all()


def test_the_table_has_a_row_a_trial_and_leaves_open_what_is_not_compared(outcomes) -> None:
    table = comparison_table(list(outcomes.values()))
    assert list(zip(table["arm"], table["n_removed"])) == list(CORRECT)
    assert (table["n_seeds"] == N_SEEDS).all()
    np.testing.assert_allclose(table["frac"], table["n_removed"] / 100)
    assert {"accuracy_mean", "accuracy_vs_random_p_holm", "accuracy_vs_none"} <= set(table)
    is_control = table["arm"].isin(["none", "random"])
    assert (table["accuracy_vs_random"].isna() == is_control).all()


def test_verdicts_are_those_that_were_planted(outcomes) -> None:
    table = comparison_table(list(outcomes.values()))
    found = {row["arm"]: verdict(row) for _, row in table.iterrows()}
    assert found == {
        "none": "baseline",
        "random": "baseline",
        "harmful": "better than random",
        "helpful": "worse than random",
        "loss": "indistinguishable from random",
        "negative": "better than random",
    }


def test_an_arm_that_removes_nothing_is_compared_with_nothing() -> None:
    same = logits_with(CORRECT["none", 0])
    trials = [trial("none", 0), trial("random", 5), trial("negative", 0)]
    found = compare(trials, [same] * 3, LABELS)
    table = comparison_table(found)
    assert not controls(found[2]) and table["accuracy_vs_random"].isna().all()
    verdicts = [verdict(row) for _, row in table.iterrows()]
    assert verdicts == ["baseline", "baseline", "removes nothing"]


@pytest.fixture(scope="module")
def both() -> dict:
    """Outcomes of removal and of relabelling, with groups."""
    trials = [
        trial(arm, size) if action == "remove" else relabelled(arm, size)
        for arm, size, action in BOTH
    ]
    return dict(zip(BOTH, compare(trials, list(map(logits_with, BOTH.values())), LABELS, GROUPS)))


@pytest.mark.parametrize("action", ["remove", "relabel"])
def test_random_is_matched_by_size_and_action(both, action: str) -> None:
    arm, control = (np.array(BOTH[name, 5, action]) / N_TEST for name in ("harmful", "random"))
    found = both["harmful", 5, action].summary
    assert found["accuracy_vs_random"] == pytest.approx((arm - control).mean())
    none = np.array(BOTH["none", 0, "remove"]) / N_TEST
    assert found["accuracy_vs_none"] == pytest.approx((arm - none).mean())


def test_the_table_tells_the_actions_apart(both) -> None:
    table = comparison_table(list(both.values()))
    assert list(zip(table["arm"], table["n_removed"], table["action"])) == list(BOTH)


@pytest.mark.parametrize("key", BOTH)
def test_worst_group_accuracy_is_that_of_the_worst_group(both, key) -> None:
    expected = []
    for count in BOTH[key]:
        first, last = min(count, 150) / 150, max(count - 150, 0) / 50
        expected.append(min(first, last))
    np.testing.assert_allclose(both[key].per_seed["worst_group_accuracy"], expected)


@pytest.mark.parametrize("control", ["random", "none"])
@pytest.mark.parametrize("metric", ["accuracy", "worst_group_accuracy"])
def test_each_judged_metric_is_adjusted_by_itself_over_both_actions(both, control, metric) -> None:
    family = [o for o in both.values() if control in controls(o)]
    assert len(family) == {"random": 2, "none": 4}[control]
    p_values = [o.summary[f"{metric}_vs_{control}_p"] for o in family]
    running = 0.0
    for step, i in enumerate(np.argsort(p_values)):
        running = max(running, min(1, (len(family) - step) * p_values[i]))
        assert family[i].summary[f"{metric}_vs_{control}_p_holm"] == pytest.approx(running)


def test_worst_group_accuracy_is_judged_where_there_are_groups_alone(outcomes, both) -> None:
    judged = {f"worst_group_accuracy_vs_{c}_{k}" for c in ("random", "none") for k in JUDGEMENTS}
    assert judged <= set(both["harmful", 5, "relabel"].summary)
    assert not judged & set(outcomes["harmful", 5].summary)
    assert judged <= set(comparison_table(list(both.values())))
    assert not judged & set(comparison_table(list(outcomes.values())))


def test_a_verdict_is_that_of_the_metric_asked_for(both) -> None:
    table = comparison_table(list(both.values()))
    row = table[(table["arm"] == "harmful") & (table["action"] == "relabel")].iloc[0].copy()
    row["worst_group_accuracy_vs_random_ci_low"] = -1.0
    assert verdict(row) == "better than random"
    assert verdict(row, "worst_group_accuracy") == "indistinguishable from random"


RARE = np.repeat([0, 1, 2], [40, 40, 4])  # test labels


RARE_TRAIN = np.repeat([0, 1, 2], [100, 92, 12])


@pytest.fixture(scope="module")
def rare() -> list[Outcome]:
    """Of a chest X-ray set: helpful takes 8 of the 12 examples of a class, whose accuracy collapses."""
    common, few = np.arange(12), np.arange(192, 204)
    removed = {
        "none": common[:0],
        "random": np.arange(0, 204, 17),
        "helpful": np.concatenate([few[:8], common[:4]]),
        "loss": np.concatenate([few[:5], common[:7]]),
    }
    right = {
        "none": (36, 36, 4),
        "random": (36, 36, 4),
        "helpful": (36, 36, 0),
        "loss": (38, 37, 4),
    }
    trials, logits = [], []
    for arm, positions in removed.items():
        trials.append(Trial(arm, len(positions) / 204, (positions,) * 4))
        shown = np.concatenate(
            [
                np.where(np.arange(count) < right[arm][label], label, (label + 1) % 3)
                for label, count in enumerate(np.bincount(RARE))
            ]
        )
        logits.append(np.tile(3 * np.eye(3)[shown], (4, 1, 1)))
    found = compare(trials, logits, RARE, metric="balanced_accuracy")
    warn(found, RARE_TRAIN, ("normal", "pneumonia", "effusion"))
    return found


def test_an_arm_that_takes_most_of_a_class_is_flagged_with_what_became_of_it(rare) -> None:
    table = comparison_table(rare).set_index("arm")
    assert table["warning"].dropna().to_dict() == {
        "helpful": "helpful 0.0588 removed 8 of the 12 training examples of 'effusion'; the test "
        "accuracy of that class went from 1.00 to 0.00."
    }


def test_verdicts_are_of_the_headline_and_accuracy_keeps_its_means_and_differences(rare) -> None:
    table = comparison_table(rare).set_index("arm", drop=False)
    assert list(table)[:5] == [
        "arm", "frac", "balanced_accuracy_mean", "balanced_accuracy_vs_random", "verdict",
    ]  # fmt: skip
    assert (table["metric"] == "balanced_accuracy").all() and (table["n_test"] == 84).all()
    assert table["image_worth"].iloc[0] == pytest.approx(1 / 12)
    helpful = table.loc["helpful"]
    assert helpful["balanced_accuracy_vs_random"] == pytest.approx(-1 / 3)
    assert helpful["accuracy_vs_random"] == pytest.approx(-4 / 84)
    assert helpful["accuracy_mean"] == pytest.approx(72 / 84)
    assert "balanced_accuracy_vs_random_p_holm" in table and "accuracy_vs_random_p" not in table


def test_equal_seeds_are_not_certainty_and_no_interval_leaves_what_a_share_can_be(rare) -> None:
    for outcome in rare:
        for name in ("accuracy", "balanced_accuracy", "worst_class_accuracy", "macro_f1"):
            low, high = (outcome.summary[f"{name}_ci_{end}"] for end in ("low", "high"))
            assert 0 <= low < high <= 1
    summary = rare[2].summary
    step = "balanced_accuracy_vs_random"
    assert summary[f"{step}_ci_low"] < summary[step] < summary[f"{step}_ci_high"]
    assert summary[f"{step}_p"] == 2**-3
    assert verdict(comparison_table(rare).iloc[2]) == "not significant after Holm"
