"""Effect of precision and projector on quality: correlation with float32 scores, and LDS."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from attribution.config import resolve
from attribution.data.dataset import load_data
from attribution.experiments import statistics
from attribution.experiments.subset_bank import build_bank
from attribution.models.checkpoints import subset_masks, train_checkpoints
from attribution.models.train import training_key
from attribution.runtime.device import resolve_device, resolve_precision
from attribution.runtime.hashing import digest
from attribution.scores.features import featurize
from attribution.scores.trak import score
from benchmarks.common import add_data_options, data_settings

VARIANTS = {
    "sketch, float32": {"feature_precision": "float32", "projector": "sketch"},
    "sketch, bfloat16": {"feature_precision": "bfloat16", "projector": "sketch"},
    "sketch, float32, other signs": {"feature_precision": "float32", "seed": 1},
    "dense normal, float32": {"feature_precision": "float32", "projector": "normal"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    add_data_options(parser)
    parser.add_argument("--proj_dim", type=int, default=512)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--subsets", type=int, default=50, help="random halves to retrain on")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Score every variant on the same checkpoints, targets and retrained subsets.

    `difference` is of LDS from the first variant, paired by target, with a 95 % bootstrap interval
    over targets and subsets.
    """

    sizes = {"num_models": options.checkpoints, "proj_dim": options.proj_dim}
    config = resolve(data_settings(options) | sizes)
    for name in options.variants:  # refuse before training
        precision = VARIANTS[name]["feature_precision"]
        resolve_precision(precision, resolve_device(config.device), "feature_precision")
    data = load_data(config)
    work = Path(options.cache_dir) / f"precision-{data.fingerprint[:12]}"
    n = len(data.rows("train"))
    masks = subset_masks(n, config.num_models, config.subset_fraction, config.seed)
    settings = digest(training_key(config, data), config.num_models)[:12]
    folders = [c.folder for c in train_checkpoints(config, data, masks, work / settings)]
    bank = build_bank(config, data, options.subsets, 1, 0.5, work / "bank")
    margins = bank.margins.mean(axis=1)
    setting = f"{Path(config.dataset).name}, n {n}, k {config.proj_dim}, {len(folders)} checkpoints"
    rows, first = [], None
    for name in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            own, place = replace(config, **VARIANTS[name]), Path(folder)
            scores = score(own, featurize(own, data, folders, place), place / "scores.npy")
            seconds, values = time.perf_counter() - start, np.array(scores.values)
        first = values if first is None else first
        difference = lds_difference(values, first, bank.masks, margins)
        row = {"setting": setting, "side": name, "seconds": seconds}
        row["pearson"] = float(np.corrcoef(values.ravel(), first.ravel())[0, 1])
        row["lds"] = float(np.nanmean(statistics.lds(values, bank.masks, margins)))
        row |= dict(zip(("difference", "ci_low", "ci_high"), difference, strict=True))
        rows.append(row)
    return rows


def lds_difference(
    values: np.ndarray, control: np.ndarray, masks: np.ndarray, margins: np.ndarray
) -> tuple[float, float, float]:
    """Mean LDS of scores (n, m) minus that of a control, for the same targets and subsets.

    The 95 % interval is a percentile bootstrap over subsets and targets; values are ranked within
    each draw.
    """
    sides = [statistics.predicted_margins(side, masks) for side in (values, control)]

    def difference(*part: Any) -> float:
        a, b = (statistics.spearman(side[part], margins[part]) for side in sides)
        return float(np.nanmean(a - b))

    draws = statistics.resampled(len(margins), len(margins.T), 1000)
    low, high = statistics.percentile_interval([difference(*part) for part in draws])
    return difference(slice(None)), float(low), float(high)
