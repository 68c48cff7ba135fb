"""What `keep` and `labels` change: test accuracy with them and, for the same seeds, without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData, load_data
from attribution.experiments.statistics import mean_estimate
from attribution.models import classifier
from attribution.models.checkpoints import Checkpoint, run_name, train_checkpoints
from attribution.models.predict import classification_metrics, predict

CHANGE = "test_accuracy_change"


def is_measured(config: Config) -> bool:
    """Whether checkpoints are trained on a whole training set that somebody has cleaned."""
    is_cleaned = bool(config.keep or config.labels)
    return is_cleaned and config.subset_fraction == 1 and not config.checkpoints


def test_metrics(
    config: Config, data: ImageData, cleaned: Sequence[Checkpoint], work: Path
) -> dict[str, float]:
    """Train the same models on the training set before its cleaning, and test both.

    Args:
        data: cleaned; both kinds of models are tested on its test split.
        cleaned: the final weights of each training run on it.
        work: as of train_checkpoints.

    Returns:
        Test accuracy of each run, the means with and without the cleaning, and the mean of the
        paired differences; with two runs or more also its 95 % interval.
    """
    names = [run_name(config, r) for r in range(config.num_models)]
    config = dataclasses.replace(config, keep="", labels="", checkpoint_epochs="")
    before = load_data(config, data.listing)
    masks = np.ones((config.num_models, len(before.rows("train"))), dtype=bool)
    trained = train_checkpoints(config, before, masks, work)
    models = (classifier.load(checkpoint.folder) for checkpoint in trained)
    without = _accuracy([predict(config, model, data, "test") for model in models], data)
    own = _accuracy([run.logits["test"] for run in cleaned], data)
    found = {f"{name}/test_accuracy": value for name, value in zip(names, own, strict=True)}
    found |= {
        "test_accuracy_mean": own.mean(),
        "test_accuracy_uncleaned_mean": without.mean(),
        CHANGE: (own - without).mean(),
    }
    if config.num_models > 1:
        found |= mean_estimate(own - without).columns(CHANGE)
    return {name: float(value) for name, value in found.items()}


def _accuracy(logits: Iterable[np.ndarray], data: ImageData) -> np.ndarray:
    """Test accuracy of each model, (n_models,)."""
    labels = data.labels("test")
    return np.array([classification_metrics(each, labels)["accuracy"] for each in logits])


def sentences(found: dict[str, float], config: Config, n_train: int) -> list[str]:
    """The metrics of test_metrics in words, and what they cannot say."""
    what = " and ".join(name for name in ("keep", "labels") if getattr(config, name))
    seeds = f"{config.num_models} seed{'s' if config.num_models > 1 else ''}"
    lines = [
        f"test accuracy: {found['test_accuracy_mean']:.4f} trained on the {n_train:,} examples with "
        f"{what}; {found['test_accuracy_uncleaned_mean']:.4f} without {what} ({seeds})"
    ]
    if config.num_models == 1:
        lines.append(
            "The difference of two models is partly chance; --num_models 5 gives an interval."
        )
    else:
        low, high = found[f"{CHANGE}_ci_low"], found[f"{CHANGE}_ci_high"]
        lines.append(f"difference: {found[CHANGE]:+.4f} (95 % interval {low:+.4f} to {high:+.4f})")
    return lines
