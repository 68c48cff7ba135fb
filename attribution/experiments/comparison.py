"""The comparison of arms: retrain every trial over paired seeds and compare the test results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.experiments import arms, contrasts
from attribution.experiments.arms import Trial
from attribution.experiments.metrics import headline
from attribution.experiments.outcome import Outcome, compare, random_control, warn
from attribution.experiments.statistics import mean_estimate
from attribution.experiments.verdicts import CONTROLS, headline_of, verdict
from attribution.models.retrain import Series, retrained_logits
from attribution.runtime.hashing import derive_seed
from attribution.scores.alignment import AUTO, check_groups, group_ids

CLASS_COLUMNS = [
    "arm", "action", "frac", "label_name", "n_test",
    "accuracy_vs_random", "accuracy_vs_random_ci_low", "accuracy_vs_random_ci_high",
]  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The result of the ablation stage.

    Attributes:
        outcomes: one per trial, `none` first.
        table: comparison.csv, one row per outcome (see comparison_table).
        contrasts: contrasts.csv (see contrast).
        per_class: per_class.csv (see class_effects).
        evidence: that the arms chose by (see gather_evidence).
    """

    outcomes: list[Outcome]
    table: pd.DataFrame
    contrasts: pd.DataFrame
    per_class: pd.DataFrame
    evidence: pd.DataFrame


def exported(config: Config, evidence: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The training examples that the arm to export keeps, by the names of arms.export_files.

    The arm chooses the same examples under every seed, so that scores are enough.
    """
    found = {}
    for name, frac in arms.export_files(config).items():
        count = 0 if frac is None else round(frac * len(evidence))
        trial = arms.make_trial(config.export_arm, count, frac, evidence, seeds=[0])
        found[name] = arms.kept_table(trial, evidence)
    return found


def check(config: Config, data: ImageData) -> None:
    """Refuse, before anything is trained, arms, shares, groups and contrasts that cannot be compared.

    Raises:
        InputError: names the parameter.
    """
    train = data.table("train")
    missing = []
    if config.groups in AUTO:
        missing.append("group_id")
    if not train["is_flipped"].any():
        missing.append("is_flipped")
    arms.check_arms(config.arm_names, missing)
    arms.check_fracs(config.fracs, data.labels("train"))
    check_groups(data.examples, config.groups)
    contrasts.pairs_of(config)


def compare_arms(config: Config, data: ImageData, evidence: pd.DataFrame, work: Path) -> Comparison:
    """Plan the trials, retrain each over paired seeds, and compare their test results.

    Args:
        work: folder of finished retrainings.
    """
    seeds = [derive_seed(config.seed, "retrain", s) for s in range(config.num_seeds)]
    trials = arms.plan_trials(config, evidence, seeds)
    logits = retrain(config, data, trials, seeds, work)
    labels, train_labels = data.labels("test"), data.labels("train")
    metric, _ = headline(config, train_labels, data.class_names)
    outcomes = compare(trials, logits, labels, judged_groups(config, data), metric)
    warn(outcomes, train_labels, data.class_names)
    contrasted = contrasts.contrast(outcomes, contrasts.pairs_of(config))
    classes = class_effects(outcomes, labels, data.class_names)
    table = comparison_table(outcomes)
    return Comparison(outcomes, table, contrasted, classes, evidence)


def judged_groups(config: Config, data: ImageData) -> np.ndarray | None:
    """The group of each test example, if groups are known that are not the labels.

    They are of the column `groups`; with a planted patch of its groups, which also judge arms that
    know nothing of them.
    """
    if config.groups not in ("label", *AUTO):
        return group_ids(data.table("test"), config.groups)
    is_planted = config.shortcut != "none"
    return group_ids(data.table("test"), "group") if is_planted else None


def retrain(
    config: Config, data: ImageData, trials: Sequence[Trial], seeds: Sequence[int], work: Path
) -> Iterator[np.ndarray]:
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
        control = random_control(outcome, outcomes)
        for label, name in enumerate(class_names):
            difference = mean_estimate(outcome.per_class[label] - control.per_class[label])
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
