"""What a difference between arms amounts to, in words, and which metric it is of."""

from __future__ import annotations

import pandas as pd

CONTROLS = ("random", "none")
BETTER, WORSE = "better than random", "worse than random"


def headline_of(table: pd.DataFrame) -> str:
    """The headline metric of a comparison table."""
    return str(table["metric"].iloc[0])


def judged_metrics(headline: str) -> tuple[str, ...]:
    """Metrics that have p-values and a table of verdicts."""
    return tuple(dict.fromkeys((headline, "worst_group_accuracy")))


def verdict(row: pd.Series, metric: str = "") -> str:
    """Verdict on a row of the comparison table, against random removal of the same size.

    With many arms, an interval that excludes zero is not enough: the p-value after Holm's
    adjustment also has to be below 0.05.
    """
    metric = metric or row["metric"]
    if row["arm"] in CONTROLS:
        return "baseline"
    if not row["n_removed"]:
        return "removes nothing"
    versus = f"{metric}_vs_random"
    return judge(row[f"{versus}_ci_low"], row[f"{versus}_ci_high"], row[f"{versus}_p_holm"])


def judge(low: float, high: float, p_holm: float, control: str = "random") -> str:
    """Verdict on a difference from a control, by the ends of its interval and its adjusted p-value."""
    if low <= 0 <= high:
        return f"indistinguishable from {control}"
    if p_holm >= 0.05:
        return "not significant after Holm"
    return f"{'better' if low > 0 else 'worse'} than {control}"
