"""The answer of a comparison in words."""

from __future__ import annotations

import pandas as pd
from made_comparison import MORE, only, table_of

from attribution.experiments.names import ARM_SPECS
from attribution.reporting import answer


def test_the_best_arm_is_named_with_its_gain_over_random_and_over_none() -> None:
    table = table_of(MORE)
    first = answer.sentences(table)[0]
    row = table[table["arm"] == "oracle"].iloc[0]
    gain = 100 * row["accuracy_vs_random"]
    low, high = (100 * row[f"accuracy_vs_random_ci_{end}"] for end in ("low", "high"))
    assert first.startswith(
        f"Relabelling the 4 examples with flipped labels raised test accuracy by {gain:.1f} points "
        f"(95 % interval {low:.1f} to {high:.1f}) compared with relabelling 4 at random."
    )
    assert f"Compared with all examples: {100 * row['accuracy_vs_none']:+.1f} points" in first
    assert answer.best(table)["arm"] == "oracle"


def test_without_a_better_arm_no_gain_is_claimed() -> None:
    swapped = {"harmful": "random", "random": "harmful", "none": "none"}
    worse = {
        (swapped[arm], size, action): right
        for (arm, size, action), right in MORE.items()
        if arm in swapped and action == "remove"
    }
    for table in (table_of(worse), table_of(only("loss"))):
        assert answer.sentences(table) == [
            "No arm was shown to raise test accuracy more than random removal."
        ]
        assert answer.best(table) is None


def test_the_best_arm_for_the_worst_group_has_a_sentence_where_groups_are_known() -> None:
    table = table_of(MORE)
    assert [answer.short(table)] == answer.sentences(table)
    versus = [name for name in table if name.startswith("accuracy_vs_random")]
    groups = table.assign(**{f"worst_group_{name}": table[name] / 2 for name in versus})
    groups["worst_group_accuracy_vs_random_p_holm"] = table["accuracy_vs_random_p_holm"]
    # Of two arms that are better by accuracy, the other one gains most for the worst group.
    better = answer.judged(table)
    better = better[better["verdict"] == "better than random"]["accuracy_vs_random"].sort_values()
    best, other = better.index[-1], better.index[-2]
    ends = ["", "_ci_low", "_ci_high"]
    for end in ends:
        groups.loc[best, f"worst_group_accuracy_vs_random{end}"] = -0.1
    gain, low, high = (100 * groups.loc[other, f"worst_group_accuracy_vs_random{e}"] for e in ends)
    assert answer.sentences(groups)[0] == answer.sentences(table)[0]
    said = answer.sentences(groups)[1]
    assert answer.short(groups).endswith(said)
    assert (
        f"raised test worst group accuracy by {gain:.1f} points "
        f"(95 % interval {low:.1f} to {high:.1f}) compared with" in said
    )
    groups["worst_group_accuracy_vs_random_p_holm"] = 1.0
    none = "No arm was shown to raise test worst group accuracy more than random removal."
    assert answer.sentences(groups)[1] == none


def test_a_test_part_in_which_one_image_counts_a_point_is_said_to_hide_smaller_changes() -> None:
    table = table_of(MORE)
    assert answer.warnings(table) == []  # 400 images
    (sentence,) = answer.warnings(table.assign(n_test=12, image_worth=1 / 12))
    assert sentence.startswith(
        "One of the 12 test images changes accuracy by up to 8.3 points, and smaller changes cannot"
    )
    flagged = table.assign(n_test=90, image_worth=1 / 90, warning=["a class"] + [None] * 8)
    first, second = answer.warnings(flagged)
    assert first == "a class" and "up to 1.1 points" in second


def test_a_contrast_is_said_in_points_with_its_interval_and_verdict() -> None:
    row = {
        "arm": "harmful 0.05", "against": "loss 0.05", "difference": 0.0123, "ci_low": -0.001,
        "ci_high": 0.0256, "p_holm": 0.0712, "verdict": "indistinguishable from loss 0.05",
    }  # fmt: skip
    assert answer.contrasts(pd.DataFrame([row])) == [
        "harmful 0.05 against loss 0.05: +1.2 points (95 % interval -0.1 to 2.6, p 0.071 after Holm), "
        "indistinguishable from loss 0.05."
    ]
    assert answer.contrasts(pd.DataFrame(columns=list(row))) == []


def test_nothing_is_claimed_of_baselines() -> None:
    assert answer.sentences(table_of(only())) == ["No arm was compared with random removal."]


def test_every_arm_has_its_words() -> None:
    from attribution.experiments.arms import ARMS
    from attribution.experiments.methods import METHODS
    from attribution.experiments.names import METHOD_WORDS

    assert list(ARM_SPECS) == list(ARMS) and list(METHOD_WORDS) == list(METHODS)
    for words in ARM_SPECS.values():
        assert words.about[0].islower() and not words.about.endswith(".")
