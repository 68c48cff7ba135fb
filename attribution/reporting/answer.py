"""The answer of a comparison in plain sentences: which arm changed the test metric, and by how much."""

from __future__ import annotations

import pandas as pd

from attribution.experiments.metrics import METRICS
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.verdicts import BETTER, CONTROLS, headline_of, verdict

VERBS = {"remove": "removing", "relabel": "relabelling"}


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a comparison that are compared with random removal."""
    return table[~table["arm"].isin(CONTROLS) & (table["n_removed"] > 0)]


def best(table: pd.DataFrame) -> pd.Series | None:
    """The row of the arm with the largest gain over random among those that are better; None if none is."""
    rows = judged(table)
    rows = rows[rows["verdict"] == BETTER]
    return None if rows.empty else rows.loc[rows[f"{headline_of(table)}_vs_random"].idxmax()]


def short(table: pd.DataFrame) -> str:
    """The sentences as one text."""
    return " ".join(sentences(table))


def sentences(table: pd.DataFrame) -> list[str]:
    """The best arm against random removal, and the best for the worst group where groups are known."""
    if judged(table).empty:
        return ["No arm was compared with random removal."]
    top = best(table)
    return [_no_gain(headline_of(table)) if top is None else _gain(top), *_worst_group(table)]


def _no_gain(metric: str) -> str:
    return f"No arm was shown to raise test {METRICS[metric].words} more than random removal."


def _worst_group(table: pd.DataFrame) -> list[str]:
    """A sentence on the arm with the largest gain for the worst group, if groups are known and one gains."""
    metric = "worst_group_accuracy"
    rows = judged(table)
    if metric == headline_of(table) or f"{metric}_vs_random" not in rows:
        return []
    rows = rows[[verdict(row, metric) == BETTER for _, row in rows.iterrows()]]
    if rows.empty:
        return [_no_gain(metric)]
    row = rows.loc[rows[f"{metric}_vs_random"].idxmax()]
    return [_gain(pd.Series({**row, "metric": metric}))]


def _gain(row: pd.Series) -> str:
    """One sentence on a row that is better than random, and on its difference from `none` if that is known."""
    n, acting, metric = int(row["n_removed"]), VERBS[row["action"]], row["metric"]
    words = ARM_SPECS[row["arm"]].chosen.format(n=n)
    text = (
        f"{acting.capitalize()} {words} raised test {METRICS[metric].words} by "
        f"{100 * row[f'{metric}_vs_random']:.1f} points ({_interval(row, 'random')}) "
        f"compared with {acting} {n} at random."
    )
    if pd.notna(row.get(f"{metric}_vs_none")):
        change = 100 * row[f"{metric}_vs_none"]
        text += f" Compared with all examples: {change:+z.1f} points ({_interval(row, 'none')})."
    return text


def _interval(row: pd.Series, control: str) -> str:
    """The 95 % interval of a difference, in points."""
    versus = f"{row['metric']}_vs_{control}"
    return _ends(100 * row[f"{versus}_ci_low"], 100 * row[f"{versus}_ci_high"])


def _ends(low: float, high: float) -> str:
    return f"95 % interval {low:z.1f} to {high:z.1f}"  # z: no -0.0


def warnings(table: pd.DataFrame) -> list[str]:
    """The arms that took most of a class; then, where one test image is worth a point, that it is."""
    found, row = list(table["warning"].dropna()), table.iloc[0]
    if row["image_worth"] >= 0.01:
        found.append(
            f"One of the {row['n_test']} test images changes {METRICS[row['metric']].words} by up to "
            f"{100 * row['image_worth']:.2g} points, and smaller changes cannot be seen. Use a larger "
            "--test_fraction, or several splits (--num_splits)."
        )
    return found


def contrasts(table: pd.DataFrame) -> list[str]:
    """A line for each pair of arms: their difference, its interval in points, and the verdict.

    Args:
        table: contrasts.csv.
    """
    return [
        f"{row.arm} against {row.against}: {100 * row.difference:+z.1f} points "
        f"({_ends(100 * row.ci_low, 100 * row.ci_high)}, p {row.p_holm:.2g} after Holm), {row.verdict}."
        for row in table.itertuples()
    ]
