"""The arms: how many and which examples each takes away, and what it is compared with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.config import resolve
from attribution.errors import InputError
from attribution.removal import ARMS, Evidence, Trial, plan_trials, removal_metrics, removed_table

SEEDS = [11, 22, 33]


def evidence(n: int = 40, seed: int = 0, n_negative: int = 7) -> Evidence:
    """Four classes in turn; n_negative examples have negative alignment."""
    rng = np.random.default_rng(seed)
    values = rng.permutation(n).astype(float) - n_negative + 0.5
    return Evidence(np.arange(n) % 4, values, rng.permutation(n).astype(float))


def plan(arms: str, fracs: list[float], found: Evidence | None = None, seeds=None) -> list[Trial]:
    return plan_trials(arms.split(","), fracs, found or evidence(), seeds or SEEDS)


def one(trials: list[Trial], arm: str) -> Trial:
    (trial,) = [t for t in trials if t.arm == arm]
    return trial


@given(st.integers(20, 80), st.integers(0, 1000), st.floats(0.03, 0.5))
def test_every_arm_removes_its_share_of_different_existing_examples(n, seed, frac) -> None:
    try:
        trials = plan("random,helpful,harmful,loss", [frac], evidence(n, seed))
    except InputError as error:
        assert "class" in str(error)
        return
    for trial in trials[1:]:
        for removed in trial.removed:
            assert len(removed) == len(set(removed.tolist())) == round(frac * n)
            assert removed.min() >= 0 and removed.max() < n
            assert (np.diff(removed) > 0).all()


@given(st.integers(8, 60), st.integers(0, 1000), st.data())
def test_helpful_and_harmful_share_no_example_up_to_half_the_set(n, seed, data) -> None:
    count = data.draw(st.integers(1, n // 2))
    found, rng = evidence(n, seed), np.random.default_rng(0)
    helpful = set(ARMS["helpful"](found, count, rng).tolist())
    harmful = set(ARMS["harmful"](found, count, rng).tolist())
    assert not helpful & harmful


def test_helpful_and_harmful_share_no_example_where_alignments_are_equal() -> None:
    found, rng = Evidence(np.zeros(10, int), np.zeros(10), np.zeros(10)), np.random.default_rng(0)
    helpful = set(ARMS["helpful"](found, 3, rng).tolist())
    assert not helpful & set(ARMS["harmful"](found, 3, rng).tolist())


@pytest.mark.parametrize(
    ("arm", "worst_first"),
    [
        ("helpful", lambda e: sorted(range(40), key=lambda i: -e.alignment[i])),
        ("harmful", lambda e: sorted(range(40), key=lambda i: e.alignment[i])),
        ("loss", lambda e: sorted(range(40), key=lambda i: -e.loss[i])),
    ],
)
def test_a_ranked_arm_takes_the_extreme_of_its_evidence(arm: str, worst_first) -> None:
    found = evidence()
    trial = one(plan(arm, [0.15], found), arm)
    assert trial.removed[0].tolist() == sorted(worst_first(found)[:6])


@pytest.mark.parametrize("arm", ["helpful", "harmful", "loss", "negative"])
def test_an_arm_that_draws_nothing_removes_the_same_under_every_seed(arm: str) -> None:
    first, *others = one(plan(arm, [0.1]), arm).removed
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("frac", [0.05, 0.3])
def test_negative_takes_all_with_negative_alignment_whatever_frac_says(frac: float) -> None:
    found = evidence(n_negative=9)
    trial = one(plan("negative", [frac], found), "negative")
    assert trial.removed[0].tolist() == [i for i in range(40) if found.alignment[i] < 0]
    assert trial.frac == 9 / 40


def test_negative_appears_once_however_many_fracs_there_are() -> None:
    assert [t.arm for t in plan("negative", [0.1, 0.2])].count("negative") == 1


def test_an_alignment_of_zero_is_not_negative() -> None:
    found = Evidence(np.arange(8) % 2, np.zeros(8), np.zeros(8))
    assert len(one(plan("negative", [0.25], found), "negative").removed[0]) == 0


def test_random_differs_by_seed() -> None:
    first, second, third = one(plan("random", [0.2]), "random").removed
    assert not np.array_equal(first, second) and not np.array_equal(second, third)


def test_random_is_the_same_for_the_same_seed() -> None:
    trial = one(plan("random", [0.2], seeds=[5, 6, 5]), "random")
    again = one(plan("random", [0.2], seeds=[6]), "random")
    assert np.array_equal(trial.removed[0], trial.removed[2])
    assert np.array_equal(trial.removed[1], again.removed[0])


def test_random_takes_every_example_equally_often_over_many_seeds() -> None:
    trial = one(plan("random", [0.25], seeds=list(range(4000))), "random")
    counts = np.bincount(np.concatenate(trial.removed), minlength=40)
    error = np.sqrt(4000 * 0.25 * 0.75)
    assert abs(counts - 1000).max() < 5 * error


def test_none_removes_nothing() -> None:
    assert [len(r) for r in one(plan("none", [0.1]), "none").removed] == [0, 0, 0]


@pytest.mark.parametrize("arms", ["harmful", "none,harmful", "random,harmful", "harmful,none"])
def test_none_and_a_random_of_the_same_size_are_always_there(arms: str) -> None:
    trials = plan(arms, [0.1, 0.2])
    assert [t.arm for t in trials] == ["none", "random", "random", "harmful", "harmful"]
    sizes = [len(t.removed[0]) for t in trials]
    assert sizes == [0, 4, 8, 4, 8]


def test_negative_gets_a_random_of_its_own_size() -> None:
    trials = plan("negative,harmful", [0.1])
    assert sorted(len(t.removed[0]) for t in trials if t.arm == "random") == [4, 7]


def test_an_arm_named_twice_is_tried_once() -> None:
    assert [t.arm for t in plan("loss,loss", [0.1])] == ["none", "random", "loss"]


def test_two_fracs_that_remove_equally_many_are_tried_once() -> None:
    assert len(plan("loss", [0.1, 0.101])) == 3


def test_a_trial_keeps_the_frac_that_was_asked_for_and_negative_tells_its_own_share() -> None:
    trial = one(plan("loss", [0.11]), "loss")
    assert trial.frac == 0.11 and trial.name == "loss 0.11" and len(trial.removed[0]) == 4
    negative = one(plan("negative", [0.11]), "negative")
    assert negative.frac == len(negative.removed[0]) / 40


def test_trials_have_different_names() -> None:
    names = [t.name for t in plan("none,random,helpful,harmful,negative,loss", [0.05, 0.1, 0.2])]
    assert len(names) == len(set(names))


def test_an_arm_that_empties_a_class_is_refused_with_frac_and_class() -> None:
    labels = np.array([0] * 17 + [1] * 3)
    found = Evidence(labels, labels * -1.0, np.zeros(20))
    with pytest.raises(InputError) as caught:
        plan("harmful", [0.15], found, seeds=[1])
    message = str(caught.value)
    assert "frac=0.15" in message and "class 1" in message and "harmful" in message
    assert "\n" not in message


def test_an_arm_that_leaves_one_example_of_a_class_is_accepted() -> None:
    labels = np.array([0] * 16 + [1] * 4)
    found = Evidence(labels, labels * -1.0, np.zeros(20))
    trials = plan_trials(["harmful"], [0.15], found, [1])
    assert (labels[one(trials, "harmful").removed[0]] == 1).all()


def test_a_random_draw_that_empties_a_class_under_one_seed_is_refused() -> None:
    labels = np.array([0] * 19 + [1])
    found = Evidence(labels, np.arange(20.0), np.zeros(20))
    with pytest.raises(InputError, match="arm random .*class 1"):
        plan("none", [0.5], found, seeds=list(range(20)))


def test_a_class_that_no_training_example_has_is_not_held_against_an_arm() -> None:
    found = Evidence(np.array([0, 2] * 10), np.arange(20.0), np.zeros(20))
    assert len(plan("harmful", [0.1], found)) == 3


def test_a_frac_that_removes_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="frac=0.01: .* 40 training examples"):
        plan("harmful", [0.01, 0.2])


def test_an_unknown_arm_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(InputError) as caught:
        plan("none,harmfull", [0.1])
    assert str(caught.value).startswith("arms=harmfull: unknown; did you mean harmful")


def test_the_default_arms_are_all_known() -> None:
    assert set(resolve({}).arm_names) <= set(ARMS)


def table_of(removed: list[list[int]], n: int = 6) -> pd.DataFrame:
    trial = Trial("random", 0.3, tuple(np.array(r, dtype=np.int64) for r in removed))
    train = pd.DataFrame(
        {
            "position": range(n),
            "label_name": ["cat", "dog"] * (n // 2),
            "is_flipped": [True, False, False, True, False, False],
        }
    )
    found = Evidence(np.arange(n) % 2, np.arange(n) / 10, np.zeros(n))
    return removed_table(trial, train, found)


def test_the_removed_table_says_how_many_seeds_removed_each_example() -> None:
    table = table_of([[0, 1], [1, 5]])
    assert table["position"].tolist() == [0, 1, 5]
    assert table["seeds"].tolist() == [1, 2, 1]
    assert table["alignment"].tolist() == [0.0, 0.1, 0.5]


def test_removal_metrics_are_those_counted_by_hand() -> None:
    metrics = removal_metrics(table_of([[0, 1], [1, 5]]), n_flipped=2, n_seeds=2)
    assert metrics == {
        "removed/cat": 0.5,  # example 0, under one of two seeds
        "removed/dog": 1.5,  # 1 twice, 5 once
        "flips_precision": 0.25,  # one flip among four removals
        "flips_recall": 0.25,  # one of two flips times two seeds
    }


def test_without_planted_flips_there_is_no_precision_or_recall() -> None:
    metrics = removal_metrics(table_of([[0, 1], [1, 5]]), n_flipped=0, n_seeds=2)
    assert set(metrics) == {"removed/cat", "removed/dog"}


def test_an_arm_that_removes_nothing_has_no_removal_metrics() -> None:
    assert removal_metrics(table_of([[], []]), n_flipped=2, n_seeds=2) == {}
