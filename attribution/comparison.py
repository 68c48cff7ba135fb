"""Retrains every trial over paired seeds and sets the results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data import ImageData
from attribution.removal import Trial
from attribution.retraining import Series, retrained_logits
from attribution.statistics import Estimate, holm, mean_estimate, paired_difference
from attribution.training import classification_metrics

CONTROLS = ("random", "none")
METRICS = ("accuracy", "log_loss", "mean_margin", "worst_class_accuracy")


def retrain(
    config: Config, data: ImageData, trials: Sequence[Trial], seeds: list[int], work: Path
) -> list[np.ndarray]:
    """Retrain every trial under every seed and read the test split once for each model.

    Args:
        work: folder of finished retrainings.

    Returns:
        One array a trial, (n_seeds, n_test, C) float32 test logits.
    """
    n = len(data.rows("train"))
    wanted = []
    for trial in trials:
        keep = np.ones((len(seeds), n), dtype=bool)
        for row, removed in zip(keep, trial.removed, strict=True):
            row[removed] = False
        wanted.append(Series(trial.name, seeds, keep))
    return retrained_logits(config, data, wanted, "test", work, "ablation")


@dataclass
class Outcome:
    """What became of one trial.

    Attributes:
        per_seed: metric name to (n_seeds,) test values.
        mean: metric name to the mean over seeds.
        versus: 'random' or 'none' to metric name to the paired difference from that trial (for
            'random': the random trial of the same size).
        holm: 'random' or 'none' to the p-value of the accuracy difference, adjusted over all
            trials that are compared with it.
    """

    trial: Trial
    per_seed: dict[str, np.ndarray]
    mean: dict[str, Estimate] = field(default_factory=dict)
    versus: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    holm: dict[str, float] = field(default_factory=dict)


def compare(
    trials: Sequence[Trial], test_logits: Sequence[np.ndarray], test_labels: np.ndarray
) -> list[Outcome]:
    """Paired comparison of every trial with no removal and with random removal of the same size.

    Args:
        test_logits: one array a trial, (n_seeds, n_test, C); seeds in the same order.
    """
    outcomes = [
        Outcome(trial, _per_seed(logits, test_labels))
        for trial, logits in zip(trials, test_logits, strict=True)
    ]
    none = next(o for o in outcomes if o.trial.arm == "none")
    random = {_size(o): o for o in outcomes if o.trial.arm == "random"}
    for outcome in outcomes:
        outcome.mean = {name: mean_estimate(v) for name, v in outcome.per_seed.items()}
        if not _size(outcome):
            continue
        for name, control in (("none", none), ("random", random[_size(outcome)])):
            if outcome.trial.arm != name:
                outcome.versus[name] = {
                    metric: paired_difference(outcome.per_seed[metric], control.per_seed[metric])
                    for metric in METRICS
                }
    for name in CONTROLS:
        family = [o for o in outcomes if name in o.versus]
        adjusted = holm([o.versus[name]["accuracy"].p for o in family])
        for outcome, p in zip(family, adjusted, strict=True):
            outcome.holm[name] = p
    return outcomes


def _size(outcome: Outcome) -> int:
    return len(outcome.trial.removed[0])


def _per_seed(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    rows = [classification_metrics(each, labels) for each in logits]
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


def summary_metrics(outcome: Outcome) -> dict[str, float]:
    """One trial's figures under the names that MLflow shows."""
    figures = {}
    for metric, estimate in outcome.mean.items():
        figures |= _named(f"{metric}", estimate, mean_suffix="_mean")
    for control, differences in outcome.versus.items():
        for metric, estimate in differences.items():
            figures |= _named(f"{metric}_vs_{control}", estimate)
        figures[f"accuracy_vs_{control}_p"] = differences["accuracy"].p
        figures[f"accuracy_vs_{control}_p_holm"] = outcome.holm[control]
    return figures


_NOTHING = Estimate(np.nan, np.nan, np.nan, np.nan)


def _named(name: str, estimate: Estimate, mean_suffix: str = "") -> dict[str, float]:
    return {
        f"{name}{mean_suffix}": estimate.mean,
        f"{name}_ci_low": estimate.ci_low,
        f"{name}_ci_high": estimate.ci_high,
    }


def comparison_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row a trial: arm, frac, n_removed and every summary metric, NaN where none applies."""
    table = pd.DataFrame(
        [
            {
                "arm": o.trial.arm,
                "frac": round(o.trial.frac, 6),
                "n_removed": _size(o),
                "n_seeds": len(o.trial.removed),
                **summary_metrics(o),
            }
            for o in outcomes
        ]
    )
    # Every column, also where nothing but baselines is compared.
    differences = [_named(f"{m}_vs_{c}", _NOTHING) for c in CONTROLS for m in METRICS]
    p_values = [f"accuracy_vs_{c}_p{kind}" for c in CONTROLS for kind in ("", "_holm")]
    columns = dict.fromkeys([*table, *(name for d in differences for name in d), *p_values])
    return table.reindex(columns=list(columns))


def verdict(row: pd.Series) -> str:
    """What a row's interval against random removal of the same size allows to say.

    An interval that excludes zero is not enough where many arms are compared: the p-value has to
    stay below 0.05 after Holm's adjustment too.
    """
    if row["arm"] in ("none", "random"):
        return "baseline"
    if not row["n_removed"]:
        return "removes nothing"
    low, high = row["accuracy_vs_random_ci_low"], row["accuracy_vs_random_ci_high"]
    if low <= 0 <= high:
        return "indistinguishable from random"
    if row["accuracy_vs_random_p_holm"] >= 0.05:
        return "not significant after Holm"
    return "better than random" if low > 0 else "worse than random"
