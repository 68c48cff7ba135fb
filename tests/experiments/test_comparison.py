"""The paired comparison of arms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from toy import toy_config, toy_data

from attribution.errors import InputError
from attribution.experiments.arms import Trial
from attribution.experiments.comparison import (
    CLASS_COLUMNS,
    Comparison,
    check,
    class_effects,
    comparison_table,
    retrain,
)
from attribution.experiments.contrasts import contrast, pairs_of
from attribution.experiments.outcome import Outcome, compare, warn
from attribution.experiments.verdicts import verdict
from attribution.models.predict import predict
from attribution.models.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

N_TEST, N_SEEDS = 200, 6
JUDGEMENTS = ("p", "p_holm", "bootstrap_low", "bootstrap_high", "detectable")
LABELS = np.arange(N_TEST) % 4


def trial(arm: str, size: int, n: int = 100) -> Trial:
    return Trial(arm, size / n, tuple(np.arange(size) + s for s in range(N_SEEDS)))


def logits_with(correct: list[int]) -> np.ndarray:
    """(n_seeds, n_test, 4) logits that get exactly so many test examples right under each seed."""
    logits = np.zeros((len(correct), N_TEST, 4), np.float32)
    for row, count in zip(logits, correct):
        shown = np.where(np.arange(N_TEST) < count, LABELS, (LABELS + 1) % 4)
        row[np.arange(N_TEST), shown] = 3
    return logits


CORRECT = {
    ("none", 0): [160, 150, 170, 158, 163, 149],
    ("random", 5): [158, 149, 168, 157, 160, 148],
    ("random", 9): [150, 143, 160, 149, 155, 140],
    ("harmful", 5): [170, 162, 181, 168, 173, 160],  # 12 more than random 5, about
    ("helpful", 5): [140, 133, 150, 139, 144, 129],
    ("loss", 5): [159, 148, 169, 156, 161, 147],  # one up, one down
    ("negative", 9): [165, 159, 173, 164, 171, 155],  # about 15 more than random 9
}


@pytest.fixture(scope="module")
def outcomes() -> dict:
    trials = [trial(*key) for key in CORRECT]
    found = compare(trials, [logits_with(c) for c in CORRECT.values()], LABELS)
    return dict(zip(CORRECT, found))


def accuracy(key: tuple[str, int]) -> np.ndarray:
    return np.array(CORRECT[key]) / N_TEST


@pytest.mark.parametrize("key", CORRECT)
def test_per_seed_accuracy_and_its_mean_are_the_planted_ones(outcomes, key) -> None:
    np.testing.assert_allclose(outcomes[key].per_seed["accuracy"], accuracy(key))
    assert outcomes[key].summary["accuracy_mean"] == pytest.approx(accuracy(key).mean())


def controls(outcome: Outcome) -> set[str]:
    """What an outcome is compared with."""
    return {name for name in ("none", "random") if f"accuracy_vs_{name}" in outcome.summary}


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


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "words"),
    [
        (0.0, 0.1, 0.01, "indistinguishable from random"),
        (-0.1, 0.0, 0.01, "indistinguishable from random"),
        (0.01, 0.1, 0.06, "not significant after Holm"),
        (-0.1, -0.01, 0.06, "not significant after Holm"),
        (0.01, 0.1, 0.04, "better than random"),
        (-0.1, -0.01, 0.04, "worse than random"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_adjusted_p_value(low, high, p_holm, words) -> None:
    versus = {"ci_low": low, "ci_high": high, "p_holm": p_holm}
    row = {f"accuracy_vs_random_{name}": value for name, value in versus.items()}
    assert verdict(pd.Series(row | {"arm": "harmful", "n_removed": 5}), "accuracy") == words


def test_an_arm_that_removes_nothing_is_compared_with_nothing() -> None:
    same = logits_with(CORRECT["none", 0])
    trials = [trial("none", 0), trial("random", 5), trial("negative", 0)]
    found = compare(trials, [same] * 3, LABELS)
    table = comparison_table(found)
    assert not controls(found[2]) and table["accuracy_vs_random"].isna().all()
    verdicts = [verdict(row) for _, row in table.iterrows()]
    assert verdicts == ["baseline", "baseline", "removes nothing"]


def test_a_comparison_tells_what_an_arm_keeps_at_every_share_that_was_asked_for() -> None:
    train = pd.DataFrame({"example_id": [f"id{i}" for i in range(100)], "label_name": "a"})
    train = train.assign(file_name="")
    spec = [("none", 0), ("random", 5), ("harmful", 5), ("harmful", 9), ("negative", 9)]
    trials = [trial(*key) for key in spec] + [relabelled("loss", 5)]
    outcomes = [Outcome(each, {}, np.empty((0, 0))) for each in trials]
    found = Comparison(outcomes, *[pd.DataFrame()] * 3, train, None)
    for arm_name, frac, size in (
        ("harmful", 0.05, 5),
        ("harmful", 0.049, 5),  # rounds to as many examples
        ("harmful", 0.09, 9),
        ("negative", None, 9),
    ):
        kept = found.kept(arm_name, frac)
        assert kept["example_id"].tolist() == [f"id{i}" for i in range(size, 100)]
    for arm_name, frac in (("harmful", 0.2), ("loss", 0.05)):
        with pytest.raises(InputError, match=f"export_arm={arm_name}"):
            found.kept(arm_name, frac)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": "harmfull"}, "arms=harmfull: unknown"),
        ({"arms": "oracle"}, "arms=oracle: no label was flipped on purpose"),
        ({"arms": "balanced", "groups": "auto"}, "arms=balanced: groups=auto"),
        ({"frac": "0.2,0.01"}, "frac=0.01: removes none of the 32 training examples"),
        ({"groups": "camera"}, "groups=camera: no such column"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: Path, given, message) -> None:
    data = toy_data(tmp_path)
    check(toy_config(), data)
    with pytest.raises(InputError, match=f"^{message}"):
        check(toy_config(**given), data)


# Relabelling and groups


GROUPS = np.where(np.arange(N_TEST) < 150, 0, 7)  # those after 150 are first to be wrong


def relabelled(arm: str, size: int) -> Trial:
    return replace(trial(arm, size), new_labels=(np.zeros(size, int),) * N_SEEDS)


BOTH = {
    ("none", 0, "remove"): CORRECT["none", 0],
    ("random", 5, "remove"): CORRECT["random", 5],
    ("harmful", 5, "remove"): CORRECT["harmful", 5],
    ("random", 5, "relabel"): CORRECT["random", 9],
    ("harmful", 5, "relabel"): CORRECT["negative", 9],
}


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


# Arm against arm


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


# A rare class


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
        "accuracy of that class fell from 1.00 to 0.00."
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


# Retraining


def arm(name: str, *removed: list[int]) -> Trial:
    return Trial(name, len(removed[0]) / 24, tuple(np.array(r, dtype=np.int64) for r in removed))


def test_a_trial_trains_each_seed_on_what_it_does_not_remove(tmp_path, monkeypatch) -> None:
    data, seeds, wanted = toy_data(tmp_path, n_train=24, n_other=6), [5, 6], []
    monkeypatch.setattr(
        "attribution.experiments.comparison.retrained_logits",
        lambda *given: wanted.extend(given[2]),
    )
    retrain(toy_config(), data, [arm("none", [], []), arm("harmful", [0], [2])], seeds, tmp_path)
    assert [list(series.seeds) for series in wanted] == [seeds, seeds]
    left_out = [[np.flatnonzero(~row).tolist() for row in series.keep] for series in wanted]
    assert left_out == [[[], []], [[0], [2]]]


def test_a_relabelling_trial_keeps_every_example_and_changes_those_labels(tmp_path) -> None:
    data, seeds = toy_data(tmp_path / "data", n_train=24, n_other=6), [5, 6]
    config = toy_config(epochs=1, batch_size=65)
    new = (np.array([1, 1]), np.array([0, 0]))
    given = replace(arm("harmful", [0, 4], [1, 5]), new_labels=new)
    (found,) = retrain(config, data, [given], seeds, tmp_path / "work")
    for seed, positions, labels, logits in zip(seeds, given.removed, new, found, strict=True):
        changed = data.labels("train").copy()
        assert (changed[positions] != labels).all()
        changed[positions] = labels
        every = np.ones(24, dtype=bool)
        model = train(config, data, seed, every, validate=False, labels=changed).model
        np.testing.assert_array_equal(logits, predict(config, model, data, "test"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4))
def test_class_effects_are_those_of_explicit_loops(tmp_path_factory, seed, classes, seeds) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 7)])
    spec = [("none", 0), ("random", 2), ("random", 3), ("harmful", 2), ("negative", 3)]
    trials = [Trial(arm, size / 9, (np.arange(size),) * seeds) for arm, size in spec]
    logits = [rng.normal(size=(seeds, len(labels), classes)) for _ in spec]
    right = [
        [(each.argmax(2) == labels)[:, labels == c].mean(1) for c in range(classes)]
        for each in logits
    ]
    outcomes = [Outcome(trial, {}, found) for trial, found in zip(trials, right, strict=True)]
    names = [f"c{i}" for i in range(classes)]
    table = class_effects(outcomes, labels, names)
    assert list(table) == CLASS_COLUMNS and len(table) == 2 * classes
    rows = iter(table.to_dict("records"))
    for treated, control in ((3, 1), (4, 2)):
        for label in range(classes):
            d = []
            for s in range(seeds):
                own = [i for i in range(len(labels)) if labels[i] == label]
                hits = [
                    sum(logits[t][s, i].argmax() == label for i in own) for t in (treated, control)
                ]
                d.append((hits[0] - hits[1]) / len(own))
            row = next(rows)
            assert (row["arm"], row["label_name"]) == (spec[treated][0], f"c{label}")
            assert row["n_test"] == len(own) and row["frac"] == round(spec[treated][1] / 9, 6)
            assert row["accuracy_vs_random"] == pytest.approx(np.mean(d), abs=1e-12)
            half = stats.t.ppf(0.975, seeds - 1) * np.std(d, ddof=1) / np.sqrt(seeds)
            low, high = np.mean(d) - half, np.mean(d) + half
            assert row["accuracy_vs_random_ci_low"] == pytest.approx(low, abs=1e-9)
            assert row["accuracy_vs_random_ci_high"] == pytest.approx(high, abs=1e-9)
