"""The comparison of arms: retrain every trial over paired seeds and compare the test results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.experiments import arms, contrasts
from attribution.experiments.arms import Trial, trial_name
from attribution.experiments.evidence import Evidence, gather_evidence
from attribution.experiments.metrics import class_metrics, headline, image_worth
from attribution.experiments.statistics import (
    bootstrap_interval,
    detectable_effect,
    holm,
    mean_estimate,
    paired_difference,
)
from attribution.models.predict import classification_metrics
from attribution.models.retrain import Series, retrained_logits
from attribution.runtime.hashing import derive_seed
from attribution.scores.alignment import AUTO, check_groups, group_ids
from attribution.scores.artifact import Scores

CONTROLS = ("random", "none")
BETTER, WORSE = "better than random", "worse than random"
ACTED = {"remove": "removed", "relabel": "relabelled"}
CLASS_COLUMNS = [
    "arm", "action", "frac", "label_name", "n_test",
    "accuracy_vs_random", "accuracy_vs_random_ci_low", "accuracy_vs_random_ci_high",
]  # fmt: skip


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

    def limits(self, metric: str, least: float) -> dict[str, Any]:
        """What mean_estimate should know of a metric that is a share, or of its differences."""
        is_share = metric in self.worth
        return {"step": self.worth[metric], "within": (least, 1.0)} if is_share else {}

    def summarise(self) -> None:
        """Add the mean of every metric."""
        for metric, values in self.per_seed.items():
            estimate = mean_estimate(values, **self.limits(metric, 0))
            self.summary |= estimate.columns(metric, "_mean")

    def compare_with(self, name: str, control: Outcome) -> None:
        """Add the differences from a control, paired seed by seed; _p_holm stays open."""
        found = {
            metric: paired_difference(values, control.per_seed[metric], **self.limits(metric, -1))
            for metric, values in self.per_seed.items()
        }
        for metric, difference in found.items():
            self.summary |= difference.columns(f"{metric}_vs_{name}")
        for metric in self.judged:
            values = self.per_seed[metric] - control.per_seed[metric]
            low, high = bootstrap_interval(values)
            figures = {
                "p": found[metric].p,
                "p_holm": np.nan,
                "bootstrap_low": low,
                "bootstrap_high": high,
                "detectable": detectable_effect(float(values.std(ddof=1)), len(values)),
            }
            for figure, value in figures.items():
                self.summary[f"{metric}_vs_{name}_{figure}"] = value


@dataclass(frozen=True)
class Comparison:
    """The result of the ablation stage.

    Attributes:
        outcomes: one per trial, `none` first.
        table: comparison.csv, one row per outcome (see comparison_table).
        contrasts: contrasts.csv (see contrast).
        per_class: per_class.csv (see class_effects).
        train: the score artifact's table of training examples.
    """

    outcomes: list[Outcome]
    table: pd.DataFrame
    contrasts: pd.DataFrame
    per_class: pd.DataFrame
    train: pd.DataFrame
    evidence: Evidence

    def removed(self, trial: Trial) -> pd.DataFrame:
        """The examples that a trial removes (see removed_table)."""
        return arms.removed_table(trial, self.train, self.evidence)

    def removal_metrics(self, trial: Trial) -> dict[str, float]:
        """Removals per class, precision and recall of a trial (see arms.removal_metrics)."""
        n_flipped = int(self.train["is_flipped"].sum())
        return arms.removal_metrics(self.removed(trial), n_flipped, len(trial.removed))

    def kept(self, arm: str, frac: float | None) -> pd.DataFrame:
        """See Choice.kept."""
        return Choice([each.trial for each in self.outcomes], self.train).kept(arm, frac)


@dataclass(frozen=True)
class Choice:
    """What arms choose by scores, whether or not anything is retrained."""

    trials: list[Trial]
    train: pd.DataFrame

    def kept(self, arm: str, frac: float | None) -> pd.DataFrame:
        """The training examples that an arm keeps at a share; None if the arm takes no share.

        Shares that round to the same number of examples are one trial.
        """
        for trial in self.trials:
            is_asked_for = frac is None or trial.size == round(frac * len(self.train))
            if trial.arm == arm and trial.action == "remove" and is_asked_for:
                return arms.kept_table(trial, self.train)
        raise InputError(f"export_arm={arm}: this comparison removes nothing by it at frac={frac}")


def choose(config: Config, data: ImageData, scores: Scores) -> Choice:
    """What the arm to export removes; it chooses the same examples under every seed."""
    evidence = gather_evidence(config, data, scores)
    names = [config.export_arm]
    return Choice(arms.plan_trials(names, config.fracs, evidence, seeds=[0]), scores.train)


def check(config: Config, data: ImageData) -> None:
    """Refuse, before anything is trained, arms, shares, groups and contrasts that cannot be compared.

    Raises:
        InputError: names the parameter.
    """
    train = data.table("train")
    missing = []
    if config.groups == AUTO:
        missing.append("groups")
    if not train["is_flipped"].any():
        missing.append("is_flipped")
    arms.check_arms(config.arm_names, missing)
    arms.check_fracs(config.fracs, data.labels("train"))
    check_groups(data.examples, config.groups)
    contrasts.pairs_of(config)


def count_retrainings(config: Config, n_train: int) -> int:
    """How many models the comparison needs at most, trained by an earlier command or not."""
    return config.num_seeds * arms.count_trials(config, n_train)


def compare_arms(
    config: Config, data: ImageData, scores: Scores, evidence: Evidence, work: Path
) -> Comparison:
    """Plan the trials, retrain each over paired seeds, and compare their test results.

    Args:
        work: folder of finished retrainings.
    """
    seeds = [derive_seed(config.seed, "retrain", s) for s in range(config.num_seeds)]
    trials = arms.plan_trials(
        config.arm_names, config.fracs, evidence, seeds, arms.actions_of(config)
    )
    logits = retrain(config, data, trials, seeds, work)
    labels, train_labels = data.labels("test"), data.labels("train")
    metric, _ = headline(config, train_labels, data.class_names)
    outcomes = compare(trials, logits, labels, _test_groups(config, data), metric)
    warn(outcomes, train_labels, data.class_names)
    contrasted = contrast(outcomes, contrasts.pairs_of(config))
    classes = class_effects(outcomes, labels, data.class_names)
    table = comparison_table(outcomes)
    return Comparison(outcomes, table, contrasted, classes, scores.train, evidence)


def _test_groups(config: Config, data: ImageData) -> np.ndarray | None:
    """The group of each test example, if groups are a column other than the label."""
    if config.groups in ("label", AUTO):
        return None
    return group_ids(data.table("test"), config.groups)


def retrain(
    config: Config, data: ImageData, trials: Sequence[Trial], seeds: Sequence[int], work: Path
) -> Sequence[np.ndarray]:
    """Retrain every trial under every seed; each model predicts the test split once.

    Returns:
        One array per trial, (n_seeds, n_test, C) float32 test logits.
    """
    series = [_series(trial, seeds, data.labels("train")) for trial in trials]
    return retrained_logits(config, data, series, "test", work, "ablation")


def _series(trial: Trial, seeds: Sequence[int], labels: np.ndarray) -> Series:
    if trial.new_labels is None:
        return Series.without(trial.name, seeds, len(labels), trial.removed)
    changed = np.tile(labels, (len(seeds), 1))
    for row, positions, new in zip(changed, trial.removed, trial.new_labels, strict=True):
        row[positions] = new
    return Series(trial.name, seeds, np.ones(changed.shape, dtype=bool), changed)


def compare(
    trials: Sequence[Trial],
    test_logits: Sequence[np.ndarray],
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
                outcome.compare_with("random", _random_control(outcome, outcomes))
    for control in CONTROLS:
        for judged in none.judged:
            _adjust(outcomes, judged, control)
    return outcomes


def _adjust(
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


def contrast(outcomes: Sequence[Outcome], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Compare pairs of arms in the headline metric, in one Holm family with the differences from `random`.

    Returns:
        One row per pair of trials: their paired difference with interval, p and p_holm, and a verdict.
    """
    rows = contrasts.differences(outcomes, pairs)
    adjusted = _adjust(outcomes, outcomes[0].metric, "random", [row["p"] for row in rows])
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"] = p
        row["verdict"] = _judge(row["ci_low"], row["ci_high"], p, row["against"])
    return pd.DataFrame(rows, columns=contrasts.COLUMNS)


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
        change = f"{'fell' if after < before else 'rose'} from {before:.2f} to"
        if f"{before:.2f}" == f"{after:.2f}":
            change = "stayed at"
        outcome.warning = (
            f"{trial_name(trial.arm, 'remove', trial.frac)} {ACTED[trial.action]} {taken[worst]:.3g} "
            f"of the {sizes[worst]} training examples of '{class_names[worst]}'; the test accuracy of "
            f"that class {change} {after:.2f}."
        )


def _random_control(outcome: Outcome, outcomes: Sequence[Outcome]) -> Outcome:
    """The random trial of the same size and action."""
    wanted = "random", outcome.trial.size, outcome.trial.action
    (control,) = (
        each for each in outcomes if (each.trial.arm, each.trial.size, each.trial.action) == wanted
    )
    return control


def class_effects(
    outcomes: Sequence[Outcome], test_labels: np.ndarray, class_names: Sequence[str]
) -> pd.DataFrame:
    """Effect of each trial on each class's test accuracy, compared with its `random` trial.

    Returns:
        One row per trial and class, with the paired difference `accuracy_vs_random` and its
        unadjusted 95 % interval.
    """
    rows = []
    for outcome in outcomes:
        trial = outcome.trial
        if trial.arm in CONTROLS or not trial.size:
            continue
        control = _random_control(outcome, outcomes)
        for label, name in enumerate(class_names):
            difference = paired_difference(outcome.per_class[label], control.per_class[label])
            n_test = int((test_labels == label).sum())
            cells = difference.columns("accuracy_vs_random").values()
            rows.append((trial.arm, trial.action, round(trial.frac, 6), name, n_test, *cells))
    return pd.DataFrame(rows, columns=CLASS_COLUMNS)


def comparison_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row per trial: arm, frac, action, n_removed, every figure of its summary (or NaN), verdict.

    The last columns are the headline metric, the test examples, what one of them can change that
    metric by, and the warning.
    """
    table = pd.DataFrame(
        [
            {
                "arm": each.trial.arm,
                "frac": round(each.trial.frac, 6),
                "action": each.trial.action,
                "n_removed": each.trial.size,
                "n_seeds": len(each.trial.removed),
                **each.summary,
                "metric": each.metric,
                "n_test": each.n_test,
                "image_worth": each.worth.get(each.metric),
                "warning": each.warning,
            }
            for each in outcomes
        ]
    )
    # The columns exist even if no arm is compared with random.
    versus_random = [name.replace("_vs_none", "_vs_random") for name in table]
    table = table.reindex(columns=list(dict.fromkeys([*table, *versus_random])))
    table["verdict"] = [verdict(row) for _, row in table.iterrows()]
    # The columns that MLflow's table view shows without scrolling.
    metric = headline_of(table)
    first = ["arm", "frac", f"{metric}_mean", f"{metric}_vs_random", "verdict"]
    return table[first + [name for name in table if name not in first]]


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
    return _judge(row[f"{versus}_ci_low"], row[f"{versus}_ci_high"], row[f"{versus}_p_holm"])


def _judge(low: float, high: float, p_holm: float, control: str = "random") -> str:
    if low <= 0 <= high:
        return f"indistinguishable from {control}"
    if p_holm >= 0.05:
        return "not significant after Holm"
    return f"{'better' if low > 0 else 'worse'} than {control}"
