"""Is the attribution right? Predictions of each method, compared with models that were retrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.experiments.methods import (
    METHODS,
    Attribution,
    Subject,
    check_methods,
    penultimate_similarity,
)
from attribution.experiments.statistics import (
    Estimate,
    detection,
    mean_estimate,
    noise_ceiling,
    percentile_interval,
    predicted_margins,
    resampled,
    spearman,
)
from attribution.experiments.subset_bank import Bank, build_bank
from attribution.models.predict import margins
from attribution.models.retrain import Series, retrained_logits
from attribution.runtime.hashing import derive_seed
from attribution.scores.calibration import slope

DRAWS = 500  # of the bootstrap over subsets and targets
AGREEMENT = ("lds", "calibration_slope")  # what _agreement gives


@dataclass(frozen=True)
class Evaluation:
    """The result of the evaluate stage.

    Attributes:
        table: evaluation.csv, one row per method (see judge).
        brittleness: brittleness.csv (see brittleness), or None if it was not asked for.
        bank: the retrained models that the methods were compared with; None for a loaded result.
    """

    table: pd.DataFrame
    brittleness: pd.DataFrame | None
    bank: Bank | None = None


def check(config: Config, data: ImageData) -> None:
    """Refuse, before anything is trained, parameters that the stage cannot work with.

    Raises:
        InputError: names the parameter.
    """
    n_train = len(data.rows("train"))
    check_methods(config.method_names)
    if config.brittleness_targets == 1:
        raise InputError("brittleness_targets=1: an interval needs at least 2; use 0 to skip it")
    if config.brittleness_targets and config.brittleness_k >= n_train:
        raise InputError(
            f"brittleness_k={config.brittleness_k}: must be below the {n_train} training examples"
        )
    if not config.bank and round(config.alpha * n_train) < 2:
        raise InputError(
            f"alpha={config.alpha:g}: a subset needs 2 of the {n_train} training examples; use "
            f"{2 / n_train:.2g} or more"
        )


def count_retrainings(config: Config) -> tuple[int, int]:
    """How many models a new bank and the brittleness test need, trained by an earlier command or not.

    Those of the bank see the share `alpha` of the training set; those of the test see nearly all.
    """
    bank = 0 if config.bank else config.num_subsets * config.num_repeats
    targets = config.brittleness_targets
    # One model of everything, and for each target one without each of three sets of examples.
    return bank, 1 + 3 * targets if targets else 0


def evaluate(subject: Subject, bank: Bank | None, work: Path) -> Evaluation:
    """Judge every method by a bank and, if asked for, retrain without what supports single targets.

    Args:
        bank: None builds a new one.
        work: folder of finished retrainings.
    """
    config, data = subject.config, subject.data
    if bank is None:
        sizes = config.num_subsets, config.num_repeats, config.alpha
        bank = build_bank(config, data, *sizes, work)
    found = {name: METHODS[name](subject) for name in config.method_names}
    table = judge(found, bank, subject.scores.train["is_flipped"].to_numpy())
    if not config.brittleness_targets:
        return Evaluation(table, None, bank)
    nearest = np.concatenate(list(penultimate_similarity(subject, signed=False)))
    supports = {"trak": subject.scores.values, "nearest of the same label": nearest}
    return Evaluation(table, brittleness(config, data, supports, work), bank)


def judge(methods: Mapping[str, Attribution], bank: Bank, is_flipped: np.ndarray) -> pd.DataFrame:
    """One row per method: LDS, its share of the noise ceiling, calibration, detection of flips.

    Intervals (95 %) are percentile bootstraps over subsets and targets at once (LDS, slope) or over
    training examples (AUROC), with the same draws for every method. A figure that a method does not
    offer, or that is undefined, is NaN: LDS and slope are undefined if the scores predict one margin
    for every subset. A target whose measured margins are all equal counts in no mean.
    """
    actual = bank.margins.mean(axis=1)
    ceiling = float(np.nanmean(noise_ceiling(bank.margins))) if bank.repeats > 1 else np.nan
    rows = []
    for name, method in methods.items():
        row: dict[str, Any] = {"method": name}
        if method.values is not None:
            predicted = predicted_margins(method.values, bank.masks)
            drawn = [
                _agreement(predicted[part], actual[part])
                for part in resampled(len(actual), len(actual.T), DRAWS)
            ]
            figures = zip(AGREEMENT, _agreement(predicted, actual), *percentile_interval(drawn))
            for figure, value, low, high in figures:
                row |= Estimate(value, low, high, np.nan).columns(figure)
            row["lds_share_of_ceiling"] = row["lds"] / ceiling if ceiling else np.nan
        if method.trust is not None:
            row |= detection(is_flipped, method.trust)
        rows.append(row)
    columns = ["method", "lds", "lds_ci_low", "lds_ci_high", "lds_share_of_ceiling"]
    table = pd.DataFrame(rows).assign(noise_ceiling=ceiling)
    return table.reindex(columns=columns + [c for c in table if c not in columns])


def _agreement(predicted: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """LDS, the mean over targets, and calibration slope of (S, m) margins."""
    return float(np.nanmean(spearman(predicted, actual))), slope(predicted, actual)


def brittleness(
    config: Config, data: ImageData, supports: Mapping[str, np.ndarray], work: Path
) -> pd.DataFrame:
    """Retrain without the k training examples that support a target most; does its prediction flip?

    Targets are drawn at random from those that the model trained on everything classifies correctly.
    That model and the retrained ones share a seed.

    Args:
        supports: name to (n_train, n_targets) values; the k examples with the highest values in a
            target's column are removed. 'random' is added.

    Returns:
        One row per name: share of flipped predictions with a Wilson interval, and the mean change
        of the margin with a Student's t interval, over targets.

    Raises:
        InputError: the model classifies fewer than two targets correctly.
    """
    labels, n = data.labels(TARGETS), len(data.rows("train"))
    seed = derive_seed(config.seed, "brittleness")
    everything = Series("everything", [seed], np.ones((1, n), dtype=bool))
    (before,) = retrained_logits(config, data, [everything], TARGETS, work, "brittleness")
    rng = np.random.default_rng(seed)
    targets = _brittle_targets(config, before[0].argmax(axis=1) == labels, rng)
    removed = _supporting(supports, targets, config.brittleness_k, rng)
    series = [
        Series.without(f"without {name}", [seed] * len(targets), n, positions)
        for name, positions in removed.items()
    ]
    after = retrained_logits(config, data, series, TARGETS, work, "brittleness")
    old, own = margins(before[0], labels)[targets], labels[targets]
    rows = [
        {
            "removed": name,
            "k": config.brittleness_k,
            "targets": len(targets),
            **_fall(logits[np.arange(len(targets)), targets], own, old),
        }
        for name, logits in zip(removed, after, strict=True)
    ]
    return pd.DataFrame(rows)


def _brittle_targets(config: Config, is_right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw targets from those that are classified correctly."""
    correct = np.flatnonzero(is_right)
    if len(correct) < 2:
        raise InputError(
            f"brittleness_targets={config.brittleness_targets}: the model classifies {len(correct)} "
            "targets correctly, and an interval needs 2; train it longer, or use 0"
        )
    return rng.permutation(correct)[: config.brittleness_targets]


def _supporting(
    supports: Mapping[str, np.ndarray], targets: np.ndarray, k: int, rng: np.random.Generator
) -> dict[str, list[np.ndarray]]:
    """The k training examples that support each target most, by name, and k random ones."""
    found = {
        name: [np.argsort(-values[:, t], kind="stable")[:k] for t in targets]
        for name, values in supports.items()
    }
    n = len(next(iter(supports.values())))
    return found | {"random": [rng.choice(n, k, replace=False) for _ in targets]}


def _fall(logits: np.ndarray, labels: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """The share of flipped predictions and the change of the margins, with intervals."""
    flips = int((logits.argmax(axis=1) != labels).sum())
    low, high = binomtest(flips, len(labels)).proportion_ci(method="wilson")
    found = {"flipped": flips / len(labels), "flipped_ci_low": low, "flipped_ci_high": high}
    change = mean_estimate(margins(logits, labels) - before)
    return found | change.columns("margin_change")
