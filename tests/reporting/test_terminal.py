"""The tables and sentences that a terminal shows."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from made_comparison import BASE, GROUPS, MORE, N_SEEDS, N_TEST, only, table_of
from rich.console import Console

from attribution.experiments.contrasts import COLUMNS
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.replication import by_split, summary
from attribution.experiments.statistics import detectable_effect, seeds_needed
from attribution.experiments.verdicts import verdict
from attribution.reporting import answer, terminal
from attribution.reporting.terminal import power, print_comparison


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
        f"{N_SEEDS} seeds can detect an accuracy change of about ±{np.median(found):.2g} (80 % power). "
    )


def test_power_tells_the_seeds_for_the_largest_difference_that_is_unclear() -> None:
    each = {n: differences(("loss", n, "remove"), ("random", n, "remove")) for n in (4, 8)}
    assert abs(each[4].mean()) > abs(each[8].mean())
    needed = seeds_needed(each[4].mean(), each[4].std(ddof=1))
    text = power(table_of(MORE))
    assert text.endswith(
        f" To confirm loss 0.1 at {each[4].mean():+.4f} you would need about {needed} seeds: "
        f"--num_seeds {needed}"
    )
    assert "harmful" not in text and "oracle" not in text


def test_power_asks_for_no_seeds_where_everything_is_clear() -> None:
    assert "--num_seeds" not in power(table_of(only("harmful")))


def test_power_has_nothing_to_say_of_baselines() -> None:
    assert power(table_of(only())) == ""


def test_power_asks_for_no_seeds_where_there_is_no_difference_at_all() -> None:
    same = only("loss") | {("loss", n, "remove"): MORE["random", n, "remove"] for n in (4, 8)}
    assert power(table_of(same)) == ""


def test_power_takes_a_difference_that_is_rounding_noise_in_its_stride() -> None:
    table = table_of(only("loss"))
    table.loc[table["arm"] == "loss", "accuracy_vs_random"] = 2.2e-17
    assert power(table).startswith("5 seeds can detect")


VERDICTS = ("better than random", "worse than random", "not significant after Holm",
            "indistinguishable from random")  # fmt: skip


def lines_of(output: str, word: str) -> list[str]:
    return [line for line in output.splitlines() if line.split()[:1] == [word]]


def test_a_second_table_tells_the_worst_group_where_groups_are_known(capsys) -> None:
    print_comparison(table_of(MORE))
    plain = capsys.readouterr().out
    assert "Test accuracy over 5 paired seeds" in plain and "worst group" not in plain
    table = table_of(MORE, GROUPS)
    print_comparison(table)
    both = capsys.readouterr().out
    plain, both = (text[text.index("Test accuracy") :] for text in (plain, both))
    assert plain.split("Relabelling")[0].rstrip() in both  # the first is as it was
    assert "Test worst group accuracy over 5 paired seeds" in both
    for arm in ("harmful", "loss"):
        assert len(lines_of(plain, arm)) == 2 and len(lines_of(both, arm)) == 4
    means = table.loc[table["arm"] == "harmful", "worst_group_accuracy_mean"]
    worst = [np.mean((np.add(BASE, MORE["harmful", n, "remove"]) - 300) / 100) for n in (4, 8)]
    np.testing.assert_allclose(means, worst)
    for mean, line in zip(worst, lines_of(both, "harmful")[2:], strict=True):
        assert f"{mean:.4f}" in line


def test_the_differences_on_each_split_are_told_for_every_judged_metric(capsys) -> None:
    tables = {seed: table_of(MORE, GROUPS) for seed in (3, 4, 5)}
    for seed, table in tables.items():
        versus = [name for name in table if name.endswith("_vs_random")]
        table[versus] += seed / 100
    rows = by_split(tables)
    terminal.print_splits(summary(rows, {3: pd.DataFrame(columns=COLUMNS)})[0], rows)
    output = capsys.readouterr().out
    titles = {"accuracy": "Test accuracy", "worst_group_accuracy": "Test worst group accuracy"}
    for metric, title in titles.items():
        shown = output.partition(f"{title} against random removal, by data_seed")[2]
        first = lines_of(shown, "harmful")[0]
        row = tables[3][tables[3]["arm"] == "harmful"].iloc[0]
        expected = [row[f"{metric}_vs_random"] + more for more in (0, 0.01, 0.02)]
        assert first.split()[-3:] == [f"{value:+.4f}" for value in expected]


def test_the_terminal_tells_relabelling_from_removal_and_ends_with_the_power(capsys) -> None:
    table = table_of(MORE)
    print_comparison(table)
    output = capsys.readouterr().out.partition("Test accuracy")[2]
    assert [line.split()[1] == "relabelled" for line in lines_of(output, "random")] == [
        False, False, True,
    ]  # fmt: skip
    assert lines_of(output, "oracle")[0].split()[1] == "relabelled"
    assert output.rstrip().endswith(power(table))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_width_of_a_terminal_hides_a_verdict_or_cuts_a_figure(
    width: int, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(MORE)
    monkeypatch.setattr(terminal, "_console", lambda: Console(width=width, force_terminal=True))
    print_comparison(table)
    output = "".join(re.split(r"\x1b\[[\d;]*m", capsys.readouterr().out))
    shown = output[output.index("Test accuracy") :].partition("Relabelling")[0]
    assert "…" not in output and max(map(len, output.splitlines())) <= width
    assert shown.count("verdict") == 1
    words = re.findall("|".join([*VERDICTS, "baseline"]), shown)
    assert words == [verdict(row) for _, row in table.iterrows()]
    for _, row in table.iterrows():
        assert f"{row['accuracy_mean']:.4f} ±" in shown
    for share in ("10 %", "20 %") if width >= 120 else ("harmful 0.1", "harmful 0.2"):
        assert share in shown


def test_every_arm_is_explained_before_its_row_and_the_answer_comes_after(capsys) -> None:
    table = table_of(MORE)
    print_comparison(table)
    before, _, after = capsys.readouterr().out.partition("Test accuracy")
    for arm in table["arm"]:
        assert f"  {arm} " in before and ARM_SPECS[arm].about in before
    for sentence in answer.sentences(table):
        assert sentence in after


def comparison(difference: float, detectable: float) -> pd.DataFrame:
    name = "accuracy_vs_random"
    row = {"arm": "harmful", "frac": 0.1, "n_removed": 3, "n_seeds": 2, name: difference}
    row |= {"metric": "accuracy"}
    row |= {f"{name}_ci_low": difference, f"{name}_ci_high": difference, f"{name}_p_holm": 1.0}
    return pd.DataFrame([row | {f"{name}_detectable": detectable}])


def test_seeds_without_spread_claim_no_power() -> None:
    """A difference of 0.0000 'found with 80 % power' would be what two lucky seeds say."""
    for difference in (0.0, 0.02):
        assert power(comparison(difference, 0.0)) == ""
    assert "±0.03 " in power(comparison(0.0, 0.03))


def test_another_headline_is_named_throughout_and_accuracy_stands_below(capsys) -> None:
    table = table_of(MORE, metric="macro_f1")
    print_comparison(table, "Differences and verdicts are of macro F1: because.")
    output = capsys.readouterr().out
    before, _, after = output.partition("Test macro F1 over 5 paired seeds")
    assert before.rstrip().endswith("of macro F1: because.")
    assert "test macro F1 by" in after and "5 seeds can detect a macro F1 change" in after
    others = after.split("Other test metrics")[1].splitlines()
    assert others[2].split()[1:4] == ["accuracy", "balanced", "accuracy"]
    rows = [line.split() for line in others if line.strip().startswith("harmful 0.1")]
    accuracy = table.loc[(table["arm"] == "harmful") & (table["frac"] == 0.1), "accuracy_mean"]
    assert rows[0][2] == f"{accuracy.iloc[0]:.4f}"


def test_a_cut_off_interval_shows_its_ends_and_a_whole_one_half_its_width() -> None:
    row = table_of(only("harmful")).iloc[3].copy()
    row["accuracy_mean"], row["accuracy_ci_low"], row["accuracy_ci_high"] = 0.998, 0.994, 1.0
    assert terminal.cells(row, "accuracy")[3] == "0.9980 (0.9940 to 1)"
    row["accuracy_ci_high"] = 1.002
    assert terminal.cells(row, "accuracy")[3] == "0.9980 ± 0.0040"
