"""Retrains every trial over paired seeds and sets the results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.experiments.arms import Trial
from attribution.experiments.statistics import (
    Estimate,
    bootstrap_interval,
    detectable_effect,
    holm,
    mean_estimate,
    paired_difference,
)
from attribution.models.predict import classification_metrics
from attribution.models.retrain import Series, retrained_logits

CONTROLS = ("random", "none")
# Those with p-values; worst_group_accuracy is there where `groups` is a column.
JUDGED = ("accuracy", "worst_group_accuracy")
# What a person sees without scrolling in MLflow's table view.
FIRST_COLUMNS = ["arm", "frac", "accuracy_mean", "accuracy_vs_random", "verdict"]
CLASS_COLUMNS = [
    "arm", "action", "frac", "label_name", "n_test",
    "accuracy_vs_random", "accuracy_vs_random_ci_low", "accuracy_vs_random_ci_high",
]  # fmt: skip


def retrain(
    config: Config, data: ImageData, trials: Sequence[Trial], seeds: list[int], work: Path
) -> Sequence[np.ndarray]:
    """Retrain every trial under every seed and read the test split once for each model.

    Args:
        work: folder of finished retrainings.

    Returns:
        One array a trial, (n_seeds, n_test, C) float32 test logits.
    """
    wanted = [_series(trial, seeds, data.labels("train")) for trial in trials]
    return retrained_logits(config, data, wanted, "test", work, "ablation")


def _series(trial: Trial, seeds: list[int], labels: np.ndarray) -> Series:
    if trial.new_labels is None:
        return Series.without(trial.name, seeds, len(labels), trial.removed)
    changed = np.tile(labels, (len(seeds), 1))
    for row, positions, new in zip(changed, trial.removed, trial.new_labels, strict=True):
        row[positions] = new
    return Series(trial.name, seeds, np.ones(changed.shape, dtype=bool), changed)


@dataclass
class Outcome:
    """What became of one trial.

    Attributes:
        per_seed: metric name to (n_seeds,) test values.
        mean: metric name to the mean over seeds.
        versus: 'random' or 'none' to metric name to the paired difference from that trial (for
            'random': the random trial of the same size and action).
        bootstrap: likewise, of the JUDGED metrics, the bootstrap interval of that difference.
        detectable: likewise, the smallest difference found with 80 % power, unadjusted.
        holm: likewise, the p-value adjusted over all trials that are compared with it.
    """

    trial: Trial
    per_seed: dict[str, np.ndarray]
    mean: dict[str, Estimate] = field(default_factory=dict)
    versus: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    bootstrap: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    detectable: dict[str, dict[str, float]] = field(default_factory=dict)
    holm: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def judged(self) -> list[str]:
        return [name for name in JUDGED if name in self.per_seed]

    def against(self, control: Outcome, name: str) -> None:
        """Compare with a control, seed by seed."""
        pairs = {metric: (v, control.per_seed[metric]) for metric, v in self.per_seed.items()}
        self.versus[name] = {metric: paired_difference(*pair) for metric, pair in pairs.items()}
        judged = {metric: np.subtract(*pairs[metric]) for metric in self.judged}
        self.bootstrap[name] = {metric: bootstrap_interval(d) for metric, d in judged.items()}
        self.detectable[name] = {
            metric: detectable_effect(float(d.std(ddof=1)), len(d)) for metric, d in judged.items()
        }


def compare(
    trials: Sequence[Trial],
    test_logits: Sequence[np.ndarray],
    test_labels: np.ndarray,
    test_groups: np.ndarray | None = None,
) -> list[Outcome]:
    """Paired comparison of every trial with no removal and with random removal of the same size.

    Args:
        test_logits: one array a trial, (n_seeds, n_test, C); seeds in the same order.
        test_groups: (n_test,) whole numbers, where the worst group's accuracy is asked for.
    """
    outcomes = [
        Outcome(trial, _per_seed(logits, test_labels, test_groups))
        for trial, logits in zip(trials, test_logits, strict=True)
    ]
    none = next(o for o in outcomes if o.trial.arm == "none")
    random = _random_controls(outcomes)
    for outcome in outcomes:
        outcome.mean = {name: mean_estimate(v) for name, v in outcome.per_seed.items()}
        if not _size(outcome):
            continue
        for name, control in (("none", none), ("random", random[_choice(outcome)])):
            if outcome.trial.arm != name:
                outcome.against(control, name)
    for name in CONTROLS:
        family = [o for o in outcomes if name in o.versus]
        for metric in outcomes[0].judged:
            adjusted = holm([o.versus[name][metric].p for o in family])
            for outcome, p in zip(family, adjusted, strict=True):
                outcome.holm.setdefault(name, {})[metric] = p
    return outcomes


def _random_controls(outcomes: Sequence[Outcome]) -> dict[tuple[int, str], Outcome]:
    return {_choice(o): o for o in outcomes if o.trial.arm == "random"}


def class_effects(
    outcomes: Sequence[Outcome],
    test_logits: Sequence[np.ndarray],
    test_labels: np.ndarray,
    class_names: Sequence[str],
) -> pd.DataFrame:
    """What each trial did to each class's test accuracy, against random removal of as many.

    Returns:
        One row a trial and class: arm, action, frac, label_name, n_test, and the paired difference
        `accuracy_vs_random` with its unadjusted 95 % interval.
    """
    correct = [logits.argmax(axis=2) == test_labels for logits in test_logits]
    of = {id(outcome): hits for outcome, hits in zip(outcomes, correct, strict=True)}
    random, rows = _random_controls(outcomes), []
    for outcome in outcomes:
        if outcome.trial.arm in CONTROLS or not _size(outcome):
            continue
        pair = of[id(outcome)], of[id(random[_choice(outcome)])]
        for label, name in enumerate(class_names):
            own = test_labels == label
            difference = paired_difference(*(hits[:, own].mean(axis=1) for hits in pair))
            rows.append(
                {
                    "arm": outcome.trial.arm,
                    "action": outcome.trial.action,
                    "frac": round(outcome.trial.frac, 6),
                    "label_name": name,
                    "n_test": int(own.sum()),
                    **_named("accuracy_vs_random", difference),
                }
            )
    return pd.DataFrame(rows, columns=CLASS_COLUMNS)


def _size(outcome: Outcome) -> int:
    return len(outcome.trial.removed[0])


def _choice(outcome: Outcome) -> tuple[int, str]:
    return _size(outcome), outcome.trial.action


def _per_seed(
    logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None
) -> dict[str, np.ndarray]:
    rows = [classification_metrics(each, labels, groups=groups) for each in logits]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def summary_metrics(outcome: Outcome) -> dict[str, float]:
    """One trial's figures under the names that MLflow shows."""
    figures: dict[str, float] = {}
    for metric, estimate in outcome.mean.items():
        figures |= _named(f"{metric}", estimate, mean_suffix="_mean")
    for control, differences in outcome.versus.items():
        for metric, estimate in differences.items():
            figures |= _named(f"{metric}_vs_{control}", estimate)
        for metric in outcome.judged:
            name = f"{metric}_vs_{control}"
            low, high = outcome.bootstrap[control][metric]
            figures |= {
                f"{name}_p": differences[metric].p,
                f"{name}_p_holm": outcome.holm[control][metric],
                f"{name}_bootstrap_low": low,
                f"{name}_bootstrap_high": high,
                f"{name}_detectable": outcome.detectable[control][metric],
            }
    return figures


_NOTHING = Estimate(np.nan, np.nan, np.nan, np.nan)
_JUDGEMENTS = ("p", "p_holm", "bootstrap_low", "bootstrap_high", "detectable")


def _named(name: str, estimate: Estimate, mean_suffix: str = "") -> dict[str, float]:
    return {
        f"{name}{mean_suffix}": estimate.mean,
        f"{name}_ci_low": estimate.ci_low,
        f"{name}_ci_high": estimate.ci_high,
    }


def comparison_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row a trial: arm, frac, action, n_removed, every summary metric, NaN where none applies."""
    table = pd.DataFrame(
        [
            {
                "arm": o.trial.arm,
                "frac": round(o.trial.frac, 6),
                "action": o.trial.action,
                "n_removed": _size(o),
                "n_seeds": len(o.trial.removed),
                **summary_metrics(o),
            }
            for o in outcomes
        ]
    )
    # Every column, also where nothing but baselines is compared.
    metrics, judged = list(outcomes[0].per_seed), outcomes[0].judged
    differences = [_named(f"{m}_vs_{c}", _NOTHING) for c in CONTROLS for m in metrics]
    judgements = [f"{m}_vs_{c}_{kind}" for c in CONTROLS for m in judged for kind in _JUDGEMENTS]
    columns = dict.fromkeys([*table, *(name for d in differences for name in d), *judgements])
    table = table.reindex(columns=list(columns))
    table["verdict"] = [verdict(row) for _, row in table.iterrows()]
    return table[FIRST_COLUMNS + [name for name in table if name not in FIRST_COLUMNS]]


def verdict(row: pd.Series, metric: str = "accuracy") -> str:
    """What a row's interval against random removal of the same size allows to say.

    An interval that excludes zero is not enough where many arms are compared: the p-value has to
    stay below 0.05 after Holm's adjustment too.
    """
    if row["arm"] in ("none", "random"):
        return "baseline"
    if not row["n_removed"]:
        return "removes nothing"
    low, high = row[f"{metric}_vs_random_ci_low"], row[f"{metric}_vs_random_ci_high"]
    if low <= 0 <= high:
        return "indistinguishable from random"
    if row[f"{metric}_vs_random_p_holm"] >= 0.05:
        return "not significant after Holm"
    return "better than random" if low > 0 else "worse than random"
