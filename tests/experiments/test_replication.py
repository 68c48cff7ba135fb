"""Several splits: each comparison's mean counts once, and intervals are over splits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_comparison import MORE, table_of
from scipy import stats

from attribution.errors import InputError
from attribution.experiments.contrasts import COLUMNS
from attribution.experiments.replication import by_split, check, summary
from attribution.experiments.statistics import holm

SEEDS = (3, 4, 5)
NONE = {seed: pd.DataFrame(columns=COLUMNS) for seed in SEEDS}  # no contrasts


def shifted(split: int) -> pd.DataFrame:
    """A comparison whose arms gain some right answers more on a later split."""
    gains = {key: np.add(more, split if key[0] == "harmful" else 0) for key, more in MORE.items()}
    table = table_of({key: tuple(map(int, more)) for key, more in gains.items()})
    is_oracle = table["arm"] == "oracle"  # its size depends on the split, not on frac
    table.loc[is_oracle, "frac"] += split / 100
    table.loc[is_oracle, "n_removed"] += split
    return table


@pytest.fixture(scope="module")
def tables() -> dict[int, pd.DataFrame]:
    return {seed: shifted(seed - 3) for seed in SEEDS}


def test_differences_and_intervals_are_student_s_t_over_splits(tables) -> None:
    found = summary(by_split(tables), NONE)[0].set_index(["arm", "action", "n_removed"])
    for key in (("harmful", "remove", 4), ("harmful", "remove", 8), ("loss", "remove", 8)):
        each = [
            float(
                t[(t["arm"] == key[0]) & (t["n_removed"] == key[2])]["accuracy_vs_random"].iloc[0]
            )
            for t in tables.values()
        ]
        row = found.loc[key]
        assert row["accuracy_vs_random"] == pytest.approx(np.mean(each)) and row["n_splits"] == 3
        if key[0] == "loss":
            continue  # the same on every split
        expected = stats.ttest_1samp(each, 0)
        interval = expected.confidence_interval()
        assert row["accuracy_vs_random_p"] == pytest.approx(expected.pvalue)
        ends = row[["accuracy_vs_random_ci_low", "accuracy_vs_random_ci_high"]].tolist()
        assert ends == pytest.approx([interval.low, interval.high])


def test_p_values_are_adjusted_over_all_trials(tables) -> None:
    table, _ = summary(by_split(tables), NONE)
    for control in ("random", "none"):
        p = table[f"accuracy_vs_{control}_p"].dropna()
        adjusted = table.loc[p.index, f"accuracy_vs_{control}_p_holm"]
        assert adjusted.min() == pytest.approx(min(1, len(p) * p.min()))


def test_contrasts_are_over_splits_and_in_one_family_with_the_arms(tables) -> None:
    differences = {3: 0.01, 4: 0.02, 5: 0.06}
    fixed = {"contrast": ["a-b"], "arm": ["a"], "against": ["b"], "action": ["remove"]}
    given = {
        seed: pd.DataFrame({**fixed, "metric": ["accuracy"], "difference": [value]})
        for seed, value in differences.items()
    }
    table, contrasts = summary(by_split(tables), given)
    (row,) = contrasts.itertuples()
    expected = stats.ttest_1samp(list(differences.values()), 0)
    assert row.difference == pytest.approx(0.03) and row.p == pytest.approx(expected.pvalue)
    family = [*table["accuracy_vs_random_p"].dropna(), row.p]
    assert row.p_holm == pytest.approx(holm(family)[-1])
    assert row.verdict == "indistinguishable from b"
    lone = {**given, 5: given[5].assign(contrast="a-c")}
    assert summary(by_split(tables), lone)[1].empty


def test_a_trial_is_the_same_on_every_split_where_its_size_depends_on_the_split(tables) -> None:
    rows = by_split(tables)
    assert rows.groupby("trial")["data_seed"].nunique().eq(3).all()
    assert rows[rows["arm"] == "oracle"]["n_removed"].tolist() == [4, 5, 6]
    own = summary(rows, NONE)[0].set_index("arm").loc["oracle"]
    assert own["n_removed"] == 5 and own["frac"] == pytest.approx(0.11)


def test_a_trial_that_one_split_lacks_is_left_out(tables) -> None:
    short = {**tables, 4: tables[4].query("n_removed != 8")}
    assert set(summary(by_split(short), NONE)[0]["n_removed"]) == {0, 4, 5}


def test_equal_splits_are_refused() -> None:
    check(["a", "b"])
    with pytest.raises(InputError, match="num_splits=3: every data seed .* --resplit"):
        check(["a", "b", "a"])
