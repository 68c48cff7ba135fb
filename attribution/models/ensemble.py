"""What the checkpoints of an ensemble predict together: losses, probabilities, suspected labels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.errors import InputError, reason
from attribution.models.predict import classification_metrics, losses
from attribution.runtime.safe_files import is_bool, read_arrays


@dataclass(frozen=True)
class Ensemble:
    """The training examples and the logits of every checkpoint.

    Attributes:
        masks: (M, n_train) bool, which examples each checkpoint saw.
        train_logits: (M, n_train, C) float32.
        validation_logits: (M, n_validation, C) float32.
        test_logits: (M, n_test, C) float32.
    """

    masks: np.ndarray
    train_logits: np.ndarray
    validation_logits: np.ndarray
    test_logits: np.ndarray

    @classmethod
    def load(cls, file: Path, data: ImageData) -> Ensemble:
        """Read an .npz file of arrays(), of models of this data.

        Raises:
            InputError: the file holds anything else, or a logit that is not finite.
        """
        try:
            found = cls(*read_arrays(file, [f.name for f in dataclasses.fields(cls)]))
            found._check(data)
        except Exception as error:  # numpy and zipfile raise many kinds on broken files
            raise InputError(f"logits={file}: cannot be read ({reason(error)})") from None
        return found

    def _check(self, data: ImageData) -> None:
        logits = [self.train_logits, self.validation_logits, self.test_logits]
        count = len(self.masks)
        shapes = [self.masks.shape, *(each.shape for each in logits)]
        wanted = [(count, len(data.rows(split)), len(data.class_names)) for split in SPLITS]
        if not count or shapes != [wanted[0][:2], *wanted]:
            raise ValueError(f"shapes {shapes} do not fit the data")
        if not is_bool(self.masks) or any(each.dtype.kind != "f" for each in logits):
            raise ValueError("masks must be truth values, and logits real numbers")
        if not all(np.isfinite(each).all() for each in logits):
            raise ValueError("a logit is not finite")

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the content, to be kept as an .npz file."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def only(self, m: int) -> Ensemble:
        """Return the ensemble of checkpoint m alone."""
        return Ensemble(*(each[m : m + 1] for each in self.arrays().values()))

    @property
    def is_out_of_sample(self) -> bool:
        """Whether every training example was left out by at least one checkpoint."""
        return not self.masks.all(axis=0).any()

    def loss(self, split: str, labels: np.ndarray) -> np.ndarray:
        """Return the mean loss in nats of each example of a split, (n,).

        For training examples the mean is over the checkpoints that did not see the example. If some
        example was seen by all, it is over those that saw the example, for all examples: a mean over
        both kinds would rank examples by how often they were left out.
        """
        logits, counted = self._logits(split)
        each = np.stack([losses(own, labels) for own in logits])
        return np.where(counted, each, 0).sum(axis=0) / counted.sum(axis=0)

    def probabilities(self, split: str) -> np.ndarray:
        """Return the mean probabilities (n, C) of a split's examples, over the same checkpoints."""
        logits, counted = self._logits(split)
        total = sum(
            softmax(own.astype(np.float64), axis=1) * used[:, None]
            for own, used in zip(logits, counted, strict=True)
        )
        return total / counted.sum(axis=0)[:, None]

    def _logits(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a split's logits (M, n, C), and which checkpoints count for each example, (M, n)."""
        if split == "train":
            return self.train_logits, self._counted()
        logits = {"validation": self.validation_logits, "test": self.test_logits}[split]
        return logits, np.ones(logits.shape[:2], bool)

    def _counted(self) -> np.ndarray:
        """Return which checkpoints count for each training example, (M, n_train) bool."""
        counted = ~self.masks if self.is_out_of_sample else self.masks
        if not counted.any(axis=0).all():  # too few checkpoints: some example has none
            counted = np.ones_like(self.masks)
        return counted

    def best(self, labels: np.ndarray) -> int:
        """Return the number of the checkpoint with the lowest mean loss on the targets."""
        return int(np.argmin([losses(logits, labels).mean() for logits in self.validation_logits]))

    def metrics_of_each(self, labels: np.ndarray) -> list[dict[str, float]]:
        """Return the validation metrics of each checkpoint."""
        return [classification_metrics(logits, labels) for logits in self.validation_logits]

    def metrics(self, data: ImageData) -> dict[str, float]:
        """Return validation metrics: means over checkpoints, and those of the averaged prediction."""
        labels = data.labels("validation")
        each = self.metrics_of_each(labels)
        mean = {f"validation_{k}_mean": float(np.mean([m[k] for m in each])) for k in each[0]}
        joint = classification_metrics(_mean_log_probability(self.validation_logits), labels)
        return mean | {f"ensemble_validation_{k}": v for k, v in joint.items()}


def label_quality(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return cleanlab's label quality, (n,) in [0, 1], low = suspect (Northcutt et al. 2021).

    By self-confidence, which is its default: subtracting class thresholds first made it worse on
    Food-101 with planted flips (AUROC .916 against .949).

    Args:
        probabilities: (n, C), out of sample.
    """
    from cleanlab.rank import get_label_quality_scores

    return get_label_quality_scores(labels, probabilities, method="self_confidence")


def label_issues(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return which labels confident learning takes for errors, (n,) bool (Northcutt et al. 2021).

    These are the examples off the diagonal of the confident joint, pruned by noise rate.

    Args:
        probabilities: (n, C), out of sample.
    """
    from cleanlab.filter import find_label_issues

    return find_label_issues(labels, probabilities, n_jobs=1)


def _mean_log_probability(logits: np.ndarray) -> np.ndarray:
    """Return the log of the mean probability over models, (n, C)."""
    return logsumexp(log_softmax(logits.astype(np.float64), axis=2), axis=0) - np.log(len(logits))
