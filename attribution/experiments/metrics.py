"""The test metrics that an ablation may compare arms by: a metric is added here alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from attribution.config import Config

MOST_RATIO = 3  # of the largest to the smallest class, up to which plain accuracy is compared


@dataclass(frozen=True)
class Metric:
    """A share from 0 to 1; more is better.

    Attributes:
        words: its name in titles and sentences.
        worth: what one test image can change it by, given the test images of each class present.
        of: its value, given labels (n,) and logits (n, C); None for a metric of classification_metrics.
        for_classes: the only number of classes that it exists for.
    """

    words: str
    worth: Callable[[np.ndarray], float]
    of: Callable[[np.ndarray, np.ndarray], float] | None = None
    for_classes: int | None = None


def _balanced_accuracy(labels: np.ndarray, logits: np.ndarray) -> float:
    # scikit-learn's balanced_accuracy_score, without its warning of predicted classes without images.
    return recall_score(labels, logits.argmax(1), labels=np.unique(labels), average="macro")


def _macro_f1(labels: np.ndarray, logits: np.ndarray) -> float:
    return f1_score(labels, logits.argmax(1), average="macro", zero_division=0)


def _auroc(labels: np.ndarray, logits: np.ndarray) -> float:
    return roc_auc_score(labels, logits[:, 1] - logits[:, 0])


def _mean_of_classes(counts: np.ndarray) -> float:
    return 1 / (len(counts) * counts.min())


METRICS = {
    "accuracy": Metric("accuracy", lambda counts: 1 / counts.sum()),
    "balanced_accuracy": Metric("balanced accuracy", _mean_of_classes, _balanced_accuracy),
    "macro_f1": Metric("macro F1", _mean_of_classes, _macro_f1),
    "worst_class_accuracy": Metric("worst class accuracy", lambda counts: 1 / counts.min()),
    "worst_group_accuracy": Metric("worst group accuracy", lambda counts: 1 / counts.min()),
    "auroc": Metric("AUROC", lambda counts: 1 / counts.prod(), _auroc, for_classes=2),
}


def bounds(metric: str, is_difference: bool = False) -> tuple[float, float]:
    """The least and the largest value of a metric, or of its differences: those of METRICS are shares."""
    if metric not in METRICS:
        return -np.inf, np.inf
    return (-1.0 if is_difference else 0.0), 1.0


def class_metrics(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """The metrics that classification_metrics does not have, by scikit-learn."""
    n_classes = len(np.unique(labels))
    return {
        name: float(metric.of(labels, logits))
        for name, metric in METRICS.items()
        if metric.of and metric.for_classes in (None, n_classes)
    }


def image_worth(labels: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    """What one test image can change each metric by."""
    ids = {"worst_group_accuracy": labels if groups is None else groups}
    counts = {name: np.unique(ids.get(name, labels), return_counts=True)[1] for name in METRICS}
    return {name: float(metric.worth(counts[name])) for name, metric in METRICS.items()}


def headline(config: Config, labels: np.ndarray, class_names: tuple[str, ...]) -> tuple[str, str]:
    """The metric that differences and verdicts are of; if that is not accuracy, a sentence on why.

    Args:
        labels: of the training split.
    """
    name = {"worst_class": "worst_class_accuracy"}.get(config.metric, config.metric)
    counts = np.bincount(labels, minlength=len(class_names))
    why = f"metric={config.metric}"
    if name == "auto":
        is_even = counts.max() <= MOST_RATIO * counts.min()
        name = "accuracy" if is_even else "balanced_accuracy"
        largest, smallest = (class_names[i] for i in (counts.argmax(), counts.argmin()))
        why = (
            f"of '{largest}' there are {counts.max():,} training images, of '{smallest}' "
            f"{counts.min():,} (--metric accuracy for plain accuracy)"
        )
    if name == "accuracy":
        return name, ""
    return name, f"Differences and verdicts are of {METRICS[name].words}: {why}."
