"""What a comparison says in a terminal, and its curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from attribution.experiments.arms import Trial
from attribution.experiments.comparison import compare, comparison_table
from attribution.experiments.statistics import detectable_effect, seeds_needed
from attribution.reporting import figures
from attribution.reporting.terminal import power, print_comparison

N_TEST, N_SEEDS = 400, 5
LABELS = np.arange(N_TEST) % 2
GROUPS = (np.arange(N_TEST) >= 300).astype(int)
BASE = [310, 296, 322, 305, 301]
# Right answers of each trial less those of `none`, under each seed.
MORE = {
    ("none", 0, "remove"): [0, 0, 0, 0, 0],
    ("random", 4, "remove"): [0, -1, 0, 1, 0],
    ("random", 8, "remove"): [-2, 1, 0, 0, -1],
    ("harmful", 4, "remove"): [9, 8, 10, 8, 9],
    ("harmful", 8, "remove"): [15, 14, 14, 16, 15],
    ("loss", 4, "remove"): [3, -2, 1, 0, 1],
    ("loss", 8, "remove"): [-3, 1, 1, -1, 0],
    ("random", 4, "relabel"): [1, 0, 0, -1, 0],
    ("oracle", 4, "relabel"): [19, 18, 20, 18, 19],
}


def table_of(more: dict, groups: np.ndarray | None = None) -> pd.DataFrame:
    trials, logits = [], []
    for (arm, size, action), added in more.items():
        trial = Trial(arm, size / 40, (np.arange(size),) * N_SEEDS)
        if action == "relabel":
            trial = replace(trial, new_labels=(np.zeros(size, int),) * N_SEEDS)
        trials.append(trial)
        right = np.arange(N_TEST) < np.add(BASE, added)[:, None]
        shown = np.where(right, LABELS, 1 - LABELS)
        logits.append(3 * np.eye(2)[shown])
    return comparison_table(compare(trials, logits, LABELS, groups))


def only(*arms: str) -> dict:
    return {key: value for key, value in MORE.items() if key[0] in ("none", "random", *arms)}


def differences(key: tuple, control: tuple) -> np.ndarray:
    return (np.array(MORE[key]) - MORE[control]) / N_TEST


COMPARED = [key for key in MORE if key[0] not in ("none", "random")]


def test_power_tells_what_could_have_been_seen_over_the_arms() -> None:
    found = []
    for arm, size, action in COMPARED:
        spread = differences((arm, size, action), ("random", size, action)).std(ddof=1)
        found.append(detectable_effect(spread, N_SEEDS))
    text = power(table_of(MORE))
    assert text.startswith(
        f"With {N_SEEDS} seeds a difference from random of {np.median(found):.4f} "
    )
    assert f"{min(found):.4f} to {max(found):.4f}" in text and "80 % power" in text


def test_power_tells_the_seeds_for_the_largest_difference_that_is_unclear() -> None:
    each = {n: differences(("loss", n, "remove"), ("random", n, "remove")) for n in (4, 8)}
    assert abs(each[4].mean()) > abs(each[8].mean())
    needed = seeds_needed(each[4].mean(), each[4].std(ddof=1))
    text = power(table_of(MORE))
    assert f"Were {each[4].mean():+.4f} of loss 0.1 its true effect, {needed} seeds" in text
    assert "harmful" not in text and "oracle" not in text


def test_power_asks_for_no_seeds_where_everything_is_clear() -> None:
    assert "true effect" not in power(table_of(only("harmful")))


def test_power_has_nothing_to_say_of_baselines() -> None:
    assert power(table_of(only())) == ""


def test_power_asks_for_no_seeds_where_there_is_no_difference_at_all() -> None:
    same = only("loss") | {("loss", n, "remove"): MORE["random", n, "remove"] for n in (4, 8)}
    text = power(table_of(same))
    assert "no power is known" in text and "true effect" not in text


def test_power_takes_a_difference_that_is_rounding_noise_in_its_stride() -> None:
    table = table_of(only("loss"))
    table.loc[table["arm"] == "loss", "accuracy_vs_random"] = 2.2e-17
    assert power(table).startswith("With 5 seeds")


def lines_of(output: str, word: str) -> list[str]:
    return [line for line in output.splitlines() if line.split()[:1] == [word]]


def test_a_second_table_tells_the_worst_group_where_groups_are_known(capsys) -> None:
    print_comparison(table_of(MORE))
    plain = capsys.readouterr().out
    assert "Test accuracy over 5 paired seeds" in plain and "worst group" not in plain
    table = table_of(MORE, GROUPS)
    print_comparison(table)
    both = capsys.readouterr().out
    assert plain.split("With 5 seeds")[0].rstrip() in both  # the first is as it was
    assert "Test worst group accuracy over 5 paired seeds" in both
    for arm in ("harmful", "loss"):
        assert len(lines_of(plain, arm)) == 2 and len(lines_of(both, arm)) == 4
    means = table.loc[table["arm"] == "harmful", "worst_group_accuracy_mean"]
    worst = [np.mean((np.add(BASE, MORE["harmful", n, "remove"]) - 300) / 100) for n in (4, 8)]
    np.testing.assert_allclose(means, worst)
    for mean, line in zip(worst, lines_of(both, "harmful")[2:], strict=True):
        assert f"{mean:.4f}" in line


def test_the_terminal_tells_relabelling_from_removal_and_ends_with_the_power(capsys) -> None:
    table = table_of(MORE)
    print_comparison(table)
    output = capsys.readouterr().out
    assert [line.split()[1] == "relabelled" for line in lines_of(output, "random")] == [
        False, False, True,
    ]  # fmt: skip
    assert lines_of(output, "oracle")[0].split()[1] == "relabelled"
    assert output.rstrip().endswith(power(table))


def test_removal_curves_are_one_line_an_arm_and_action(tmp_path: Path, monkeypatch) -> None:
    drawn = {}
    original = figures._save
    monkeypatch.setattr(figures, "_save", lambda f, p: (drawn.update(figure=f), original(f, p)))
    table = table_of(MORE)
    figures.removal_curves(table, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert np.ptp(np.asarray(image.convert("L"))) > 100
    (axes,) = drawn["figure"].axes
    curves = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    assert set(curves) == {"random", "harmful", "loss", "random relabelled", "oracle relabelled"}
    rows = table[(table["arm"] == "harmful")]
    expected = np.column_stack([100 * rows["frac"], rows["accuracy_mean"]])
    np.testing.assert_allclose(curves["harmful"], expected)
    assert curves["oracle relabelled"].shape == (1, 2)


def test_removal_curves_of_baselines_and_of_an_arm_that_removes_nothing(tmp_path: Path) -> None:
    nothing = only() | {("negative", 0, "remove"): MORE["none", 0, "remove"]}
    figures.removal_curves(table_of(nothing), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
