"""The same comparison on several splits of the data: the split is the unit, not the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from attribution.errors import InputError
from attribution.experiments.arms import trial_name
from attribution.experiments.contrasts import COLUMNS
from attribution.experiments.metrics import bounds
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.statistics import holm, mean_estimate
from attribution.experiments.verdicts import CONTROLS, headline_of, judge, judged_metrics, verdict


def check(data_fingerprints: Sequence[str]) -> None:
    """Refuse splits that are one and the same, before anything is trained.

    Raises:
        InputError: two fingerprints are equal.
    """
    if len(set(data_fingerprints)) < len(data_fingerprints):
        raise InputError(
            f"num_splits={len(data_fingerprints)}: every data seed gives the same splits, because the "
            "data set has its own validation and test part; add --resplit"
        )


def by_split(tables: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """The rows of several comparisons for the trials that all of them have.

    Random removals that control an arm whose size does not depend on frac differ between the splits,
    and are left out.

    Args:
        tables: comparison.csv by data seed.

    Returns:
        The tables below one another, with the columns `trial` and `data_seed`.
    """
    rows = pd.concat([table.assign(data_seed=seed) for seed, table in tables.items()])
    rows["trial"] = [_trial(row) for _, row in rows.iterrows()]
    counts = rows.groupby("trial")["data_seed"].transform("nunique")
    return rows[counts == len(tables)].reset_index(drop=True)


def _trial(row: pd.Series) -> str:
    """A name under which a trial has the same meaning on every split."""
    is_free = ARM_SPECS[row["arm"]].is_frac_free
    return trial_name(row["arm"], row["action"], None if is_free else row["frac"])


def summary(
    rows: pd.DataFrame, contrasts: Mapping[int, pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over splits, not over seeds: of every trial, and of every contrast that all splits have.

    Intervals and p-values are Student's t over splits, of each split's mean over its seeds. P-values
    are Holm-adjusted over the trials with the same control and metric; contrasts are in one family
    with the differences from `random` of the headline metric.

    Args:
        rows: from by_split, of at least two splits.
        contrasts: contrasts.csv by data seed.

    Returns:
        A row per trial with the columns of comparison.csv, and a row per contrast with those of
        contrasts.csv.
    """
    found = []
    for _, own in rows.groupby("trial", sort=False):
        row = {name: own[name].iloc[0] for name in ("arm", "action", "n_seeds", "metric")}
        row |= {"frac": own["frac"].mean(), "n_removed": round(own["n_removed"].mean())}
        row["n_splits"] = len(own)
        for name in own:
            versus = name.rpartition("_vs_")[2] in CONTROLS
            if own[name].notna().all() and (versus or name.endswith("_mean")):
                metric = name.removesuffix("_mean")
                within = bounds(metric.partition("_vs_")[0], is_difference=versus)
                estimate = mean_estimate(own[name].to_numpy(), within=within)
                row |= estimate.columns(metric, "" if versus else "_mean")
                row |= {f"{metric}_p": estimate.p} if versus else {}
        found.append(row)
    table = pd.DataFrame(found).reindex(columns=_columns(rows, found))
    pairs = _contrasts(contrasts)
    for name in [name for name in table if name.endswith("_p")]:
        known, is_family = table[name].notna(), name == f"{headline_of(rows)}_vs_random_p"
        more = [row["p"] for row in pairs] if is_family else []
        adjusted = holm([*table.loc[known, name], *more])
        table.loc[known, f"{name}_holm"] = adjusted[: known.sum()]
        for row, p in zip(pairs, adjusted[known.sum() :], strict=False):
            row["p_holm"] = p
            row["verdict"] = judge(row["ci_low"], row["ci_high"], p, row["against"])
    table = table.assign(verdict=[verdict(row) for _, row in table.iterrows()])
    return table, pd.DataFrame(pairs, columns=COLUMNS)


def _contrasts(tables: Mapping[int, pd.DataFrame]) -> list[dict[str, Any]]:
    """One row per contrast that every split has; p_holm and verdict stay open."""
    found = []
    for _, own in pd.concat(tables.values()).groupby("contrast", sort=False):
        if len(own) == len(tables):
            estimate = mean_estimate(own["difference"].to_numpy())
            found.append({**own.iloc[0], **estimate.contrast()})
    return found


def _columns(rows: pd.DataFrame, found: list[dict]) -> list[str]:
    """The columns of the summary; those of a difference from random exist even if there is none."""
    judged = judged_metrics(headline_of(rows))
    versus = [f"{metric}_vs_random" for metric in judged if f"{metric}_mean" in rows]
    ends = [f"{name}{end}" for name in versus for end in ("", "_ci_low", "_ci_high", "_p")]
    return list(dict.fromkeys([*(name for row in found for name in row), *ends]))
