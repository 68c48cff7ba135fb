"""The arms: how many and which examples each takes away, and what it is compared with."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planted_trials import evidence_of
from toy import toy_config

from attribution.config import Config, resolve
from attribution.errors import InputError
from attribution.experiments.arms import (
    ARMS,
    Trial,
    check_arms,
    check_fracs,
    count_trials,
    export_files,
    plan_trials,
    removal_metrics,
    removed_table,
)
from attribution.experiments.names import ARM_SPECS

SEEDS = [11, 22, 33]


def simple(labels: np.ndarray, alignment: np.ndarray, loss: np.ndarray, **more) -> pd.DataFrame:
    """Where trust says what alignment does."""
    return evidence_of(labels, alignment, alignment, loss, **more)


def evidence(n: int = 40, seed: int = 0, n_negative: int = 7) -> pd.DataFrame:
    """Four classes in turn; n_negative examples have negative alignment."""
    rng = np.random.default_rng(seed)
    values = rng.permutation(n).astype(float) - n_negative + 0.5
    loss, trust = (rng.permutation(n).astype(float) for _ in range(2))
    return evidence_of(np.arange(n) % 4, values, trust, loss)


def full_evidence(n: int = 40, seed: int = 0) -> pd.DataFrame:
    """With all that an arm may look at; groups 0, 1, 2 hold half, a third and a sixth."""
    rng = np.random.default_rng(seed + 1)
    found = evidence(n, seed)
    return found.assign(
        stored_trust=rng.permutation(n).astype(float),
        label_quality=rng.random(n),
        self_influence=rng.random(n),
        predicted_label=rng.integers(0, 4, n),
        group_id=rng.permutation(np.array([0, 0, 0, 1, 1, 2])[np.arange(n) % 6]),
        is_flipped=np.arange(n) % 9 == 1,
        true_label=np.where(np.arange(n) % 9 == 1, (found.label + 1) % 4, found.label),
    )


def plan(
    arms: str, fracs: list[float], found: pd.DataFrame | None = None, seeds=None
) -> list[Trial]:
    found, config = evidence() if found is None else found, configured(arms, fracs)
    check_fracs(config.fracs, found["label"].to_numpy())
    return plan_trials(config, found, seeds or SEEDS)


def configured(arms: str, fracs: list[float], **given: str) -> Config:
    return toy_config(arms=arms, frac=",".join(map(str, fracs)), **given)


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
def test_helpful_and_harmful_of_one_order_share_no_example_up_to_half_the_set(
    n, seed, data
) -> None:
    count = data.draw(st.integers(1, n // 2))
    values = evidence(n, seed).alignment
    found, rng = simple(np.zeros(n, int), values, np.zeros(n)), np.random.default_rng(0)
    helpful = set(ARMS["helpful"](found, count, rng).tolist())
    harmful = set(ARMS["harmful"](found, count, rng).tolist())
    assert not helpful & harmful


def test_helpful_and_harmful_share_no_example_where_alignments_are_equal() -> None:
    found, rng = simple(np.zeros(10, int), np.zeros(10), np.zeros(10)), np.random.default_rng(0)
    helpful = set(ARMS["helpful"](found, 3, rng).tolist())
    assert not helpful & set(ARMS["harmful"](found, 3, rng).tolist())


@pytest.mark.parametrize(
    ("arm", "worst_first"),
    [
        ("helpful", lambda e: sorted(range(40), key=lambda i: -e.alignment[i])),
        ("harmful", lambda e: sorted(range(40), key=lambda i: e.trust[i])),
        ("trust", lambda e: sorted(range(40), key=lambda i: e.stored_trust[i])),
        ("d3m", lambda e: sorted(range(40), key=lambda i: e.alignment[i])),
        ("loss", lambda e: sorted(range(40), key=lambda i: -e.loss[i])),
        ("confident", lambda e: sorted(range(40), key=lambda i: e.label_quality[i])),
        ("self_influence", lambda e: sorted(range(40), key=lambda i: -e.self_influence[i])),
    ],
)
def test_a_ranked_arm_takes_the_extreme_of_its_evidence(arm: str, worst_first) -> None:
    found = full_evidence()
    trial = one(plan(arm, [0.15], found), arm)
    assert trial.removed[0].tolist() == sorted(worst_first(found)[:6])


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_can_be_exported_only_if_every_seed_chooses_the_same(arm: str) -> None:
    first, *others = one(plan(arm, [0.2], full_evidence()), arm).removed
    is_drawn = not all(np.array_equal(first, other) for other in others)
    assert ARM_SPECS[arm].is_drawn == is_drawn
    if is_drawn:
        with pytest.raises(InputError, match=f"export_arm={arm}: draws other examples"):
            export_files(configured(arm, [0.2], export_arm=arm))


@pytest.mark.parametrize("frac", [0.05, 0.3])
def test_negative_takes_all_with_negative_alignment_whatever_frac_says(frac: float) -> None:
    found = evidence(n_negative=9)
    trial = one(plan("negative", [frac], found), "negative")
    assert trial.removed[0].tolist() == [i for i in range(40) if found.alignment[i] < 0]
    assert trial.frac == 9 / 40


def test_negative_appears_once_however_many_fracs_there_are() -> None:
    assert [t.arm for t in plan("negative", [0.1, 0.2])].count("negative") == 1


def test_an_alignment_of_zero_is_not_negative() -> None:
    found = simple(np.arange(8) % 2, np.zeros(8), np.zeros(8))
    assert len(one(plan("negative", [0.25], found), "negative").removed[0]) == 0


def test_random_differs_by_seed() -> None:
    first, second, third = one(plan("random", [0.2]), "random").removed
    assert not np.array_equal(first, second) and not np.array_equal(second, third)


def test_random_is_the_same_for_the_same_seed() -> None:
    trial = one(plan("random", [0.2], seeds=[5, 6, 5]), "random")
    again = one(plan("random", [0.2], seeds=[6]), "random")
    assert np.array_equal(trial.removed[0], trial.removed[2])
    assert np.array_equal(trial.removed[1], again.removed[0])


def test_arms_that_draw_from_the_same_examples_draw_independently() -> None:
    """With a single group `majority` chooses as `random` does, but not the same examples."""
    seeds = list(range(300))
    found = full_evidence().assign(group_id=np.zeros(40, dtype=int))
    trials = plan("random,majority", [0.25], found, seeds)
    pairs = zip(one(trials, "random").removed, one(trials, "majority").removed, strict=True)
    shared = [len(np.intersect1d(a, b)) for a, b in pairs]
    assert np.mean(shared) == pytest.approx(10 * 10 / 40, abs=0.3)  # as chance has it


def test_random_takes_every_example_equally_often_over_many_seeds() -> None:
    trial = one(plan("random", [0.25], seeds=list(range(4000))), "random")
    counts = np.bincount(np.concatenate(trial.removed), minlength=40)
    error = np.sqrt(4000 * 0.25 * 0.75)
    assert abs(counts - 1000).max() < 5 * error


@pytest.mark.parametrize("arm", [arm for arm in ARMS if ARM_SPECS[arm].is_drawn])
def test_an_arm_that_draws_does_so_by_the_seed_alone(arm: str) -> None:
    trial = one(plan(arm, [0.2], full_evidence(), seeds=[5, 6, 5]), arm)
    again = one(plan(arm, [0.2], full_evidence(), seeds=[6]), arm)
    assert np.array_equal(trial.removed[0], trial.removed[2])
    assert np.array_equal(trial.removed[1], again.removed[0])
    assert not np.array_equal(trial.removed[0], trial.removed[1])


@given(st.integers(20, 80), st.integers(0, 1000), st.data())
def test_every_known_arm_takes_different_existing_examples(n, seed, data) -> None:
    found, count = full_evidence(n, seed), data.draw(st.integers(1, n))
    for name, choose in ARMS.items():
        taken = choose(found, count, np.random.default_rng(seed)).tolist()
        assert len(taken) == len(set(taken)) and set(taken) <= set(range(n))
        if name not in ("none", "negative", "oracle", "majority"):
            assert len(taken) == count


@given(st.integers(20, 80), st.integers(0, 1000), st.floats(0.03, 0.6))
def test_random_matched_takes_as_many_of_each_class_as_harmful(n, seed, frac) -> None:
    found, count = evidence(n, seed), round(frac * n)
    rng = np.random.default_rng(seed)
    per_class = [
        [int((found.label[ARMS[arm](found, count, rng)] == label).sum()) for label in range(4)]
        for arm in ("harmful", "random_matched")
    ]
    assert per_class[0] == per_class[1]


@pytest.mark.slow
def test_random_matched_takes_every_example_of_a_class_equally_often() -> None:
    labels = np.arange(40) % 2
    found = simple(labels, np.where(labels, np.arange(40.0), 100.0), np.zeros(40))
    trial = one(plan("random_matched", [0.25], found, seeds=list(range(3000))), "random_matched")
    counts = np.bincount(np.concatenate(trial.removed), minlength=40)
    assert not counts[labels == 0].any()  # harmful takes none of class 0
    assert abs(counts[labels == 1] - 1500).max() < 5 * np.sqrt(3000 * 0.5 * 0.5)


@given(st.integers(4, 40), st.integers(0, 1000), st.data())
def test_harmful_loss_goes_down_both_orders_until_it_has_enough(n, seed, data) -> None:
    found, count = evidence(n, seed), data.draw(st.integers(1, n))
    by_trust = sorted(range(n), key=lambda i: found.trust[i])
    by_loss = sorted(range(n), key=lambda i: -found.loss[i])
    both: set[int] = set()
    for depth in range(1, n + 1):
        before, both = both, set(by_trust[:depth]) & set(by_loss[:depth])
        if len(both) >= count:
            break
    taken = set(ARMS["harmful_loss"](found, count, np.random.default_rng(0)).tolist())
    assert before <= taken <= both and len(taken) == count


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 99), st.data())
def test_balanced_always_takes_from_the_group_that_is_then_largest(groups, seed, data) -> None:
    groups = np.array(groups)
    found = evidence(len(groups)).assign(group_id=groups)
    count = data.draw(st.integers(0, len(groups)))
    sizes = np.bincount(groups)
    for _ in range(count):
        sizes[sizes.argmax()] -= 1
    taken = ARMS["balanced"](found, count, np.random.default_rng(seed))
    left = np.bincount(np.delete(groups, taken), minlength=len(sizes))
    assert sorted(left) == sorted(sizes)  # which of two equal groups comes first is drawn


def test_balanced_takes_every_example_of_a_group_equally_often() -> None:
    groups = np.array([0] * 20 + [1] * 15 + [2] * 5)  # less 15: ten of each large one stay
    found = evidence(40).assign(group_id=groups)
    rng = np.random.default_rng(0)
    counts = sum(np.bincount(ARMS["balanced"](found, 15, rng), minlength=40) for _ in range(3000))
    assert counts.sum() == 45_000 and not counts[groups == 2].any()
    for group, size in ((0, 20), (1, 15)):
        of_group = counts[groups == group]
        share = of_group.sum() / 3000 / size
        assert abs(of_group - of_group.mean()).max() < 5 * np.sqrt(3000 * share * (1 - share))
    assert counts[groups == 0].sum() == 2 * counts[groups == 1].sum()  # 10 and 5 of each draw


def test_majority_takes_from_the_largest_group_alone_and_no_more_than_it_has() -> None:
    found, rng = full_evidence(), np.random.default_rng(0)
    largest = [i for i in range(40) if found.group_id[i] == 0]
    seen = set()
    for _ in range(60):
        taken = ARMS["majority"](found, 6, rng).tolist()
        assert set(taken) <= set(largest) and len(taken) == 6
        seen |= set(taken)
    assert seen == set(largest)
    assert sorted(ARMS["majority"](found, 39, rng)) == largest


@pytest.mark.parametrize("frac", [0.05, 0.3])
def test_oracle_takes_exactly_the_flips_whatever_frac_says(frac: float) -> None:
    trial = one(plan("oracle", [frac], full_evidence()), "oracle")
    assert trial.removed[0].tolist() == [1, 10, 19, 28, 37] and trial.frac == 5 / 40


def test_oracle_gets_a_random_of_its_own_size_and_appears_once() -> None:
    trials = plan("oracle", [0.1, 0.2], full_evidence())
    assert [(t.arm, len(t.removed[0])) for t in trials] == [
        ("none", 0), ("random", 4), ("random", 5), ("random", 8), ("oracle", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arm", "column", "words"),
    [
        ("majority", "group_id", ("groups=auto", "label or a column")),
        ("balanced", "group_id", ("groups=auto", "label or a column")),
        ("oracle", "is_flipped", ("no label was flipped", "label_noise")),
    ],
)
def test_an_arm_without_its_evidence_is_refused_by_name(arm, column, words) -> None:
    check_arms([arm])
    with pytest.raises(InputError) as caught:
        check_arms(["none", arm], [column])
    message = str(caught.value)
    assert message.startswith(f"arms={arm}: ") and message.endswith("or leave out the arm")
    assert all(word in message for word in words) and "\n" not in message


def test_trials_have_different_names_where_the_majority_is_smaller_than_asked_for() -> None:
    trials = plan("majority", [0.3, 0.6], full_evidence())
    assert [len(t.removed[0]) for t in trials if t.arm == "majority"] == [12, 21]
    names = [t.name for t in trials]
    assert len(names) == len(set(names))


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


@settings(max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(0, 99), st.data())
def test_no_arm_takes_the_last_two_examples_of_a_class(sizes, seed, data) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n, most = len(labels), sum(max(size - 2, 0) for size in sizes)
    assume(most)
    count = data.draw(st.integers(1, most))
    found = full_evidence(n, seed).assign(label=labels)
    for trial in plan(",".join(ARMS), [count / n], found)[1:]:
        for removed in trial.removed:
            left = np.bincount(np.delete(labels, removed), minlength=len(sizes))
            assert (left >= np.minimum(sizes, 2)).all() and len(set(removed)) == trial.size
        if not ARM_SPECS[trial.arm].is_frac_free and trial.arm not in ("random", "majority"):
            assert trial.size == count


def test_an_arm_takes_its_next_choices_in_place_of_the_last_two_of_a_class() -> None:
    labels = np.array([0] * 16 + [1] * 4)
    found = simple(labels, np.where(labels, -1.0, np.arange(20)), np.zeros(20))
    assert one(plan("harmful", [0.2], found), "harmful").removed[0].tolist() == [0, 1, 16, 17]
    with pytest.raises(InputError, match=r"^frac=0.9: .* 4 of 20; use at most 0.8$"):
        plan("harmful", [0.9], found)


def test_a_class_that_no_training_example_has_is_not_held_against_an_arm() -> None:
    found = simple(np.array([0, 2] * 10), np.arange(20.0), np.zeros(20))
    assert len(plan("harmful", [0.1], found)) == 3


def test_a_frac_that_removes_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="frac=0.01: .* 40 training examples"):
        plan("harmful", [0.01, 0.2])


def test_an_unknown_arm_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(InputError) as caught:
        check_arms(["none", "harmfull"])
    assert str(caught.value).startswith("arms=harmfull: unknown; did you mean harmful")


def test_the_default_arms_are_all_known() -> None:
    assert set(resolve({}).arm_names) <= set(ARMS)


@pytest.mark.parametrize("action", ["remove", "relabel", "both"])
@pytest.mark.parametrize("frac", ["0.1", "0.1,0.101,0.2"])
@pytest.mark.parametrize(
    ("arms", "surplus"),
    [
        ("none", 0),
        ("random", 0),
        ("none,random,harmful,harmful", 0),
        ("helpful,loss,negative", 0),
        ("oracle,balanced,negative", 0),
        ("majority", 1),  # whose group is large enough here
    ],
)
def test_trials_are_counted_before_the_scores_are_known(arms, surplus, frac, action) -> None:
    config = toy_config(arms=arms, frac=frac, action=action)
    actions = ("remove", "relabel") if action == "both" else (action,)
    # Sizes of their own that no other arm has: 7 flips, 9 with negative alignment.
    found = full_evidence(60).assign(alignment=evidence(60, n_negative=9).alignment)
    trials = plan_trials(config, found, SEEDS)
    assert count_trials(config, 60) == len(trials) + surplus * len(actions)


def test_an_arm_that_ran_out_of_examples_has_one_trial_of_a_size() -> None:
    """Also where a share rounds to the size of its group, and another asks for more."""
    trials = [t for t in plan("majority", [0.501, 0.7], full_evidence(60)) if t.arm == "majority"]
    assert [(t.size, t.frac) for t in trials] == [(30, 0.501)]


def test_the_count_of_trials_is_enough_where_the_majority_is_smaller_than_asked_for() -> None:
    config = toy_config(arms="majority", frac="0.3,0.6")
    assert count_trials(config, 40) >= len(plan("majority", config.fracs, full_evidence()))


# Relabelling


def relabelled(arms: str, fracs: list[float], action: str, found: pd.DataFrame) -> list[Trial]:
    return plan_trials(configured(arms, fracs, action=action), found, SEEDS)


def test_without_being_asked_nothing_is_relabelled() -> None:
    trials = plan("harmful,oracle", [0.1], full_evidence())
    assert {t.action for t in trials} == {"remove"} and {t.new_labels for t in trials} == {None}


@pytest.mark.parametrize("arm", ["harmful", "random", "majority"])
def test_relabelled_examples_are_those_removed_under_the_predicted_label(arm: str) -> None:
    found = full_evidence()
    removed = one(plan(arm, [0.2], found), arm)
    trial = one(relabelled(arm, [0.2], "relabel", found), arm)
    assert trial.action == "relabel" and removed.action == "remove"
    for positions, again, labels in zip(
        removed.removed, trial.removed, trial.new_labels, strict=True
    ):
        assert positions.tolist() == again.tolist()
        assert labels.tolist() == [found.predicted_label[i] for i in positions]


def test_the_oracle_relabels_with_the_true_labels_and_its_control_with_predictions() -> None:
    found = full_evidence()
    trials = relabelled("oracle", [0.1], "relabel", found)
    oracle = one(trials, "oracle")
    for positions, labels in zip(oracle.removed, oracle.new_labels, strict=True):
        assert labels.tolist() == [found.true_label[i] for i in positions]
        assert (labels != found.label[positions]).all()
    control = [t for t in trials if t.arm == "random" and len(t.removed[0]) == 5]
    for positions, labels in zip(control[0].removed, control[0].new_labels, strict=True):
        assert labels.tolist() == [found.predicted_label[i] for i in positions]


@pytest.mark.parametrize("action", ["remove", "relabel", "both"])
def test_each_action_has_its_own_random_of_each_size_and_none_is_there_once(action) -> None:
    trials = relabelled("negative,harmful", [0.1, 0.2], action, full_evidence())
    actions = ["remove", "relabel"] if action == "both" else [action]
    assert [t.arm for t in trials].count("none") == 1 and trials[0].arm == "none"
    assert list(dict.fromkeys(t.action for t in trials[1:])) == actions
    for action in actions:
        sizes = {
            arm: [len(t.removed[0]) for t in trials if (t.arm, t.action) == (arm, action)]
            for arm in ("random", "harmful", "negative")
        }
        assert sizes == {"random": [4, 7, 8], "harmful": [4, 8], "negative": [7]}


def test_trials_of_both_actions_have_different_names_that_say_which_is_which() -> None:
    found = full_evidence()
    trials = relabelled(",".join(set(ARMS) - {"majority"}), [0.1, 0.3], "both", found)
    names = [t.name for t in trials]
    assert len(names) == len(set(names))
    assert {t.name.endswith(" relabelled") == (t.action == "relabel") for t in trials} == {True}


def trial_of(*removed: list[int]) -> Trial:
    return Trial("random", 0.3, tuple(np.array(r, dtype=np.int64) for r in removed))


def six(is_flipped: list[bool]) -> pd.DataFrame:
    """Evidence of six examples."""
    found = simple(np.arange(6) % 2, np.arange(6) / 10, np.zeros(6), is_flipped=is_flipped)
    return found.assign(position=range(6), label_name=["cat", "dog"] * 3)


FLIPPED = [True, False, False, True, False, False]


def test_the_removed_table_says_how_many_seeds_removed_each_example() -> None:
    table = removed_table(trial_of([0, 1], [1, 5]), six(FLIPPED))
    assert table["position"].tolist() == [0, 1, 5]
    assert table["seeds"].tolist() == [1, 2, 1]
    assert table["alignment"].tolist() == [0.0, 0.1, 0.5]


def test_removal_metrics_are_those_counted_by_hand() -> None:
    assert removal_metrics(trial_of([0, 1], [1, 5]), six(FLIPPED)) == {
        "removed/cat": 0.5,  # example 0, under one of two seeds
        "removed/dog": 1.5,  # 1 twice, 5 once
        "flips_precision": 0.25,  # one flip among four removals
        "flips_recall": 0.25,  # one of two flips times two seeds
    }


def test_without_planted_flips_there_is_no_precision_or_recall() -> None:
    metrics = removal_metrics(trial_of([0, 1], [1, 5]), six([False] * 6))
    assert set(metrics) == {"removed/cat", "removed/dog"}


def test_an_arm_that_removes_nothing_has_no_removal_metrics() -> None:
    assert removal_metrics(trial_of([], []), six(FLIPPED)) == {}
