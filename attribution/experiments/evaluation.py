"""Is the attribution right? What methods predict, against models that were really retrained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.dataset import TARGETS, ImageData
from attribution.errors import InputError
from attribution.experiments.methods import Attribution
from attribution.experiments.statistics import (
    detection,
    mean_estimate,
    noise_ceiling,
    percentile_interval,
    predicted_margins,
    resampled,
    slope,
    spearman,
)
from attribution.experiments.subset_bank import Bank
from attribution.models.predict import margins
from attribution.models.retrain import Series, retrained_logits
from attribution.runtime.hashing import derive_seed

DRAWS = 500


def judge(methods: Mapping[str, Attribution], bank: Bank, is_flipped: np.ndarray) -> pd.DataFrame:
    """One row a method: LDS, its share of the noise ceiling, calibration, detection of flips.

    Intervals (95 %) are percentile bootstraps over subsets and targets at once (LDS, ceiling,
    slope) or over training examples (AUROC), the same draws for every method. What a method does
    not offer is NaN, as is what is undefined: LDS and slope of scores that predict one margin for
    every subset. A target whose measured margins are all equal counts in no mean.
    """
    actual = bank.margins.mean(axis=1)
    predicted = {
        name: predicted_margins(method.values, bank.masks)
        for name, method in methods.items()
        if method.values is not None
    }
    ceiling = float(np.nanmean(noise_ceiling(bank.margins))) if bank.repeats > 1 else np.nan
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in methods}
    for name, values in predicted.items():
        lds = float(np.nanmean(spearman(values, actual)))
        rows[name] |= {"lds": lds, "lds_share_of_ceiling": lds / ceiling if ceiling else np.nan}
        rows[name]["calibration_slope"] = slope(values, actual)
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in predicted}
    for part in resampled(len(actual), len(actual.T), DRAWS):
        for name, values in predicted.items():
            pair = values[part], actual[part]
            drawn[name].append((float(np.nanmean(spearman(*pair))), slope(*pair)))
    for name, pairs in drawn.items():
        low, high = percentile_interval(pairs)
        for i, figure in enumerate(("lds", "calibration_slope")):
            rows[name] |= {f"{figure}_ci_low": low[i], f"{figure}_ci_high": high[i]}
    for name, method in methods.items():
        if method.trust is not None:
            rows[name] |= detection(is_flipped, method.trust)
    columns = ["method", "lds", "lds_ci_low", "lds_ci_high", "lds_share_of_ceiling"]
    table = pd.DataFrame(list(rows.values())).assign(noise_ceiling=ceiling)
    return table.reindex(columns=columns + [c for c in table if c not in columns])


def check_brittleness(config: Config, n_train: int) -> None:
    """Refuse, before anything is trained, what `brittleness` could make nothing of.

    Raises:
        InputError: one target, which has no interval, or more to remove than there is.
    """
    if config.brittleness_targets == 1:
        raise InputError("brittleness_targets=1: an interval needs at least 2; 0 leaves it out")
    if config.brittleness_targets and config.brittleness_k >= n_train:
        raise InputError(
            f"brittleness_k={config.brittleness_k}: must be below the {n_train} training examples"
        )


def check_alpha(config: Config, n_train: int) -> None:
    """Refuse, before anything is trained, subsets that no model can be trained on.

    Raises:
        InputError: fewer than two training examples in each.
    """
    if not config.bank and round(config.alpha * n_train) < 2:
        raise InputError(
            f"alpha={config.alpha:g}: a subset needs 2 of the {n_train} training examples; use "
            f"{2 / n_train:.2g} or more"
        )


def brittleness(
    config: Config, data: ImageData, supports: Mapping[str, np.ndarray], work: Path
) -> pd.DataFrame:
    """Retrain without the k training examples that support a target most; does its prediction flip?

    Targets are drawn at random among those that the same model trained on everything classifies
    correctly, so that one seed serves both sides of each pair.

    Args:
        supports: name to (n_train, n_targets) values, of which the highest k of a target's column
            are removed; 'random' is added.

    Returns:
        One row a choice: share of flipped predictions with a Wilson interval, and the mean change
        of the margin with Student's t interval, over targets.

    Raises:
        InputError: the model classifies fewer than two targets correctly.
    """
    from statsmodels.stats.proportion import proportion_confint

    k, labels = config.brittleness_k, data.labels(TARGETS)
    seed = derive_seed(config.seed, "brittleness")
    n = len(data.rows("train"))
    whole = Series("everything", [seed], np.ones((1, n), dtype=bool))
    (before,) = retrained_logits(config, data, [whole], TARGETS, work, "brittleness")
    rng = np.random.default_rng(seed)
    correct = np.flatnonzero(before[0].argmax(axis=1) == labels)
    if len(correct) < 2:
        raise InputError(
            f"brittleness_targets={config.brittleness_targets}: the model classifies {len(correct)} "
            "targets correctly, and an interval needs 2; train it longer, or use 0"
        )
    targets = rng.permutation(correct)[: config.brittleness_targets]
    choices = {
        name: [np.argsort(-values[:, t], kind="stable")[:k] for t in targets]
        for name, values in supports.items()
    }
    choices["random"] = [rng.choice(n, k, replace=False) for _ in targets]
    series = [
        Series.without(f"without {name}", [seed] * len(targets), n, removed)
        for name, removed in choices.items()
    ]
    after = retrained_logits(config, data, series, TARGETS, work, "brittleness")
    old = margins(before[0], labels)[targets]
    rows = []
    for name, logits in zip(choices, after, strict=True):
        own = logits[np.arange(len(targets)), targets]
        flips = int((own.argmax(axis=1) != labels[targets]).sum())
        low, high = proportion_confint(flips, len(targets), method="wilson")
        change = mean_estimate(margins(own, labels[targets]) - old)
        rows.append(
            {
                "removed": name,
                "k": k,
                "targets": len(targets),
                "flipped": flips / len(targets),
                "flipped_ci_low": low,
                "flipped_ci_high": high,
                "margin_change": change.mean,
                "margin_change_ci_low": change.ci_low,
                "margin_change_ci_high": change.ci_high,
            }
        )
    return pd.DataFrame(rows)
