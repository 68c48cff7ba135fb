"""The test results of a trial: its metrics under each seed, and its differences from the controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attribution.experiments.arms import Trial, trial_name
from attribution.experiments.metrics import bounds, class_metrics, image_worth
from attribution.experiments.statistics import (
    bootstrap_interval,
    detectable_effect,
    holm,
    mean_estimate,
)
from attribution.experiments.verdicts import CONTROLS, judged_metrics
from attribution.models.predict import classification_metrics

ACTED = {"remove": "removed", "relabel": "relabelled"}


@dataclass
class Outcome:
    """The test results of one trial.

    Attributes:
        per_seed: metric name to (n_seeds,) values.
        per_class: (n_classes, n_seeds) accuracy of each class.
        summary: the figures that MLflow and comparison.csv show, by name. METRIC_mean is the mean
            over seeds and METRIC_vs_CONTROL the mean paired difference, each with its interval
            (_ci_low, _ci_high). The differences of judged metrics also have _p, _p_holm (adjusted
            over all trials with that control), a bootstrap interval (_bootstrap_low,
            _bootstrap_high), and _detectable (the smallest difference found with 80 % power).
        metric: the headline: verdicts are of it.
        n_test: test examples.
        worth: what one of them can change each metric that is a share by (see image_worth).
        warning: a sentence, if the trial takes most of a class.
    """

    trial: Trial
    per_seed: dict[str, np.ndarray]
    per_class: np.ndarray
    summary: dict[str, float] = field(default_factory=dict)
    metric: str = "accuracy"
    n_test: int = 0
    worth: dict[str, float] = field(default_factory=dict)
    warning: str | None = None

    @property
    def judged(self) -> list[str]:
        """Metrics with p-values; worst_group_accuracy exists if `groups` is a column."""
        return [name for name in judged_metrics(self.metric) if name in self.per_seed]

    def limits(self, metric: str, is_difference: bool = False) -> dict[str, Any]:
        """What mean_estimate should know of a metric, or of its differences."""
        return {"step": self.worth.get(metric, 0.0), "within": bounds(metric, is_difference)}

    def summarise(self) -> None:
        """Add the mean of every metric."""
        for metric, values in self.per_seed.items():
            estimate = mean_estimate(values, **self.limits(metric))
            self.summary |= estimate.columns(metric, "_mean")

    def compare_with(self, name: str, control: Outcome) -> None:
        """Add the differences from a control, paired seed by seed; _p_holm stays open."""
        for metric, values in self.per_seed.items():
            differences, stem = values - control.per_seed[metric], f"{metric}_vs_{name}"
            found = mean_estimate(differences, **self.limits(metric, True))
            self.summary |= found.columns(stem)
            if metric in self.judged:
                low, high = bootstrap_interval(differences)
                spread = float(differences.std(ddof=1))
                self.summary |= {
                    f"{stem}_p": found.p,
                    f"{stem}_p_holm": np.nan,
                    f"{stem}_bootstrap_low": low,
                    f"{stem}_bootstrap_high": high,
                    f"{stem}_detectable": detectable_effect(spread, len(differences)),
                }


def compare(
    trials: Sequence[Trial],
    test_logits: Iterable[np.ndarray],
    test_labels: np.ndarray,
    test_groups: np.ndarray | None = None,
    metric: str = "accuracy",
) -> list[Outcome]:
    """Compare every trial with `none` and with the `random` trial of the same size and action.

    Args:
        test_logits: one array per trial, (n_seeds, n_test, C); seeds in the same order.
        test_groups: (n_test,) whole numbers, if the worst group's accuracy is wanted.
        metric: the headline.
    """
    outcomes = [
        _outcome(trial, logits, test_labels, test_groups, metric)
        for trial, logits in zip(trials, test_logits, strict=True)
    ]
    (none,) = (each for each in outcomes if each.trial.arm == "none")
    for outcome in outcomes:
        outcome.summarise()
        if outcome.trial.size and outcome is not none:
            outcome.compare_with("none", none)
            if outcome.trial.arm != "random":
                outcome.compare_with("random", random_control(outcome, outcomes))
    for control in CONTROLS:
        for judged in none.judged:
            adjust(outcomes, judged, control)
    return outcomes


def _outcome(
    trial: Trial, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, metric: str
) -> Outcome:
    rows = [
        classification_metrics(each, labels, groups=groups) | class_metrics(labels, each)
        for each in logits
    ]
    is_right = logits.argmax(axis=2) == labels
    return Outcome(
        trial,
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
        np.array([is_right[:, labels == c].mean(axis=1) for c in range(logits.shape[2])]),
        metric=metric,
        n_test=len(labels),
        worth=image_worth(labels, groups),
    )


def random_control(outcome: Outcome, outcomes: Sequence[Outcome]) -> Outcome:
    """The random trial of the same size and action."""
    wanted = "random", outcome.trial.size, outcome.trial.action
    (control,) = (
        each for each in outcomes if (each.trial.arm, each.trial.size, each.trial.action) == wanted
    )
    return control


def adjust(
    outcomes: Sequence[Outcome], metric: str, control: str, more: Sequence[float] = ()
) -> list[float]:
    """Adjust the p-values of a metric's differences from a control, in one family with `more`.

    Returns:
        The adjusted `more`.
    """
    name = f"{metric}_vs_{control}_p"
    family = [each for each in outcomes if name in each.summary]
    adjusted = holm([*(each.summary[name] for each in family), *more])
    for outcome, p in zip(family, adjusted, strict=False):
        outcome.summary[f"{name}_holm"] = p
    return adjusted[len(family) :]


def warn(outcomes: Sequence[Outcome], train_labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Set the warning of each trial that takes at least half of a class, and far more than of all.

    Far more is twice its share of all examples, or halfway from that share to all.
    """
    (none,) = (each for each in outcomes if each.trial.arm == "none")
    sizes = np.bincount(train_labels, minlength=len(class_names))
    for outcome in outcomes:
        trial = outcome.trial
        chosen = train_labels[np.concatenate(trial.removed)]
        taken = np.bincount(chosen, minlength=len(sizes)) / len(trial.removed)
        worst = int((taken / np.maximum(sizes, 1)).argmax())
        frac = trial.size / len(train_labels)
        if taken[worst] < sizes[worst] * max(0.5, min(2 * frac, (1 + frac) / 2)):
            continue
        before, after = (each.per_class[worst].mean() for each in (none, outcome))
        outcome.warning = (
            f"{trial_name(trial.arm, 'remove', trial.frac)} {ACTED[trial.action]} {taken[worst]:.3g} "
            f"of the {sizes[worst]} training examples of '{class_names[worst]}'; the test accuracy of "
            f"that class went from {before:.2f} to {after:.2f}."
        )
