"""Arm against arm: paired differences between two compared arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from attribution.config import Config, nearest, split_list
from attribution.errors import InputError
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.outcome import Outcome, adjust
from attribution.experiments.statistics import mean_estimate
from attribution.experiments.verdicts import judge

DEFAULT = ("harmful", "loss")
COLUMNS = [
    "contrast", "arm", "against", "action", "metric", "difference", "ci_low", "ci_high", "p", "p_holm",
    "verdict",
]  # fmt: skip


def pairs_of(config: Config) -> list[tuple[str, str]]:
    """The pairs of arms that parameter `contrasts` names; empty stands for DEFAULT if both are compared.

    Raises:
        InputError: not a pair, or an arm that is not compared.
    """
    compared = list(dict.fromkeys([*config.arm_names, "none", "random"]))
    if not config.contrasts:
        return [DEFAULT] if set(DEFAULT) <= set(compared) else []
    found = []
    for text in split_list(config.contrasts):
        arm, _, against = text.partition("-")
        if not against or arm == against:
            raise InputError(f"contrasts={text}: not two arms such as harmful-loss")
        for name in (arm, against):
            if name not in compared:
                raise InputError(
                    f"contrasts={text}: {name} is not compared; {nearest(name, compared, 20)}"
                )
        found.append((arm, against))
    return found


def contrast(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Compare pairs of arms in the headline metric, in one Holm family with the differences from `random`.

    Returns:
        One row per pair of trials: their paired difference with interval, p and p_holm, and a verdict.
    """
    rows = [
        _difference(a, b)
        for pair in pairs
        for a in outcomes
        for b in outcomes
        if (a.trial.arm, b.trial.arm) == pair and _are_comparable(a, b)
    ]
    adjusted = adjust(outcomes, outcomes[0].metric, "random", [row["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"] = p
        row["verdict"] = judge(row["ci_low"], row["ci_high"], p, row["against"])
    return pd.DataFrame(rows, columns=COLUMNS)


def _are_comparable(a: Outcome, b: Outcome) -> bool:
    """Whether two trials do the same to as many examples, or one has a size of its own."""
    is_free = ARM_SPECS[a.trial.arm].is_frac_free or ARM_SPECS[b.trial.arm].is_frac_free
    return a.trial.action == b.trial.action and (is_free or a.trial.size == b.trial.size)


def _difference(a: Outcome, b: Outcome) -> dict[str, Any]:
    """The row of a pair of trials; p_holm and the verdict stay open."""
    metric = a.metric
    found = mean_estimate(a.per_seed[metric] - b.per_seed[metric], **a.limits(metric, True))
    return {
        "contrast": f"{a.trial.name}-{b.trial.name}",
        "arm": a.trial.name,
        "against": b.trial.name,
        "action": a.trial.action,
        "metric": metric,
        **found.contrast(),
    }
