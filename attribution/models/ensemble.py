"""The checkpoints that scores are averaged over: their masks, their training, their joint loss."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError, reason
from attribution.models import classifier
from attribution.models.predict import classification_metrics, losses, predict
from attribution.models.train import train
from attribution.runtime.device import resolve_device
from attribution.runtime.hashing import derive_seed
from attribution.runtime.parallel import (
    Files,
    parallel_map,
    read_folder,
    resolve_jobs,
    write_folder,
)
from attribution.runtime.progress import progress
from attribution.runtime.safe_files import is_bool, read_arrays, read_json


def subset_masks(n: int, num_models: int, fraction: float, seed: int) -> np.ndarray:
    """Which training examples each checkpoint sees, (num_models, n) bool, each row floor(f n) many.

    Consecutive checkpoints leave out disjoint parts of one random permutation, as in repeated
    cross-validation: with fraction 0.5 and an even number of checkpoints every example is out of
    sample for half of them.
    """
    masks = np.ones((num_models, n), dtype=bool)
    size = n - max(1, math.floor(fraction * n + 1e-9))
    if size == 0:
        return masks
    folds = -(-n // size)  # the last fold wraps around where size does not divide n
    for m in range(num_models):
        rng = np.random.default_rng(derive_seed(seed, "subset", m // folds))
        start = (m % folds) * size
        left_out = rng.permutation(n).take(range(start, start + size), mode="wrap")
        masks[m, left_out] = False
    return masks


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk with what it said about train and validation."""

    folder: Path
    history: list[dict[str, float]]
    train_logits: np.ndarray
    validation_logits: np.ndarray


def train_checkpoints(
    config: Config, data: ImageData, masks: np.ndarray, work: Path
) -> list[Checkpoint]:
    """Train (or pick up from `work`) one checkpoint a row of masks, (num_models, n_train)."""
    folders = [work / f"{m:03d}" for m in range(len(masks))]
    missing = [m for m, folder in enumerate(folders) if not _is_whole(folder, data)]
    tasks = [(derive_seed(config.seed, "checkpoint", m), masks[m]) for m in missing]
    names = [f"checkpoint {folders[m].name}" for m in missing]
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, len(folders))
    with progress("finetune: checkpoints", len(folders), len(folders) - len(tasks)) as advance:
        results = parallel_map(_train_checkpoint, tasks, jobs, (config, data), config, names)
        for index, files in results:
            write_folder(folders[missing[index]], files)
            advance()
    return [_read_checkpoint(folder) for folder in folders]


def _train_checkpoint(config: Config, data: ImageData, seed: int, keep: np.ndarray) -> Files:
    """Train one; what _read_checkpoint reads comes back as content: workers may share no disk."""
    trained = train(config, data, seed, keep)
    normalisation = classifier.normalisation(config.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier.save(trained.model, folder / "model", config.image_size, *normalisation)
        (folder / "history.json").write_text(json.dumps(trained.history))
        logits = {s: predict(config, trained.model, data, s) for s in ("train", "validation")}
        np.savez(folder / "logits.npz", allow_pickle=False, **logits)
        return read_folder(folder)


def _read_checkpoint(folder: Path) -> Checkpoint:
    arrays = read_arrays(folder / "logits.npz", ("train", "validation"))
    return Checkpoint(folder / "model", read_json(folder / "history.json"), *arrays)


def _is_whole(folder: Path, data: ImageData) -> bool:
    """Whether an earlier run finished this checkpoint; what is there and damaged is taken away."""
    if not folder.exists():
        return False
    try:
        found = _read_checkpoint(folder)
        classifier.load(found.folder)
        logits = found.train_logits, found.validation_logits
        wanted = [(len(data.rows(s)), len(data.class_names)) for s in ("train", "validation")]
        if [each.shape for each in logits] == wanted and all(np.isfinite(x).all() for x in logits):
            return True
    except Exception:  # numpy, json and zipfile raise many kinds on damaged files
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


@dataclass(frozen=True)
class Ensemble:
    """What all checkpoints together say.

    Attributes:
        masks: (M, n_train) bool, which examples each checkpoint saw.
        train_logits: (M, n_train, C) float32.
        validation_logits: (M, n_validation, C) float32.
    """

    masks: np.ndarray
    train_logits: np.ndarray
    validation_logits: np.ndarray

    @classmethod
    def of(cls, masks: np.ndarray, checkpoints: list[Checkpoint]) -> Ensemble:
        """Stack what the checkpoints said."""
        return cls(
            masks,
            np.stack([c.train_logits for c in checkpoints]),
            np.stack([c.validation_logits for c in checkpoints]),
        )

    @classmethod
    def load(cls, file: Path) -> Ensemble:
        """Read the arrays that arrays() gave.

        Raises:
            InputError: the file holds anything else, or a logit that is not finite.
        """
        try:
            found = cls(*read_arrays(file, ("masks", "train_logits", "validation_logits")))
            found._check()
        except Exception as error:  # numpy and zipfile raise many kinds on broken files
            raise InputError(f"logits={file}: cannot be read ({reason(error)})") from None
        return found

    def _check(self) -> None:
        logits = self.train_logits, self.validation_logits
        shapes = [self.masks.shape, *(each.shape for each in logits)]
        (train, validation), masks = (each.shape for each in logits), self.masks
        if not (
            [len(s) for s in shapes] == [2, 3, 3]
            and masks.shape == train[:2]
            and (len(masks), train[2]) == (validation[0], validation[2])
            and train[2] >= 2
            and masks.size
        ):
            raise ValueError(f"shapes {shapes} do not fit one another")
        if not is_bool(masks) or any(each.dtype.kind != "f" for each in logits):
            raise ValueError("holds other types than truth values and real numbers")
        if not all(np.isfinite(each).all() for each in logits):
            raise ValueError("a logit is not finite")

    def _check_labels(self, labels: np.ndarray, logits: np.ndarray) -> None:
        """Refuse data that these logits are not of."""
        if len(labels) != logits.shape[1] or labels.max() >= logits.shape[2]:
            raise InputError(
                f"logits: are of {logits.shape[1]} examples and {logits.shape[2]} classes, "
                f"the data has {len(labels)} and {labels.max() + 1}"
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """The content, to be kept as an .npz file."""
        return {
            "masks": self.masks,
            "train_logits": self.train_logits,
            "validation_logits": self.validation_logits,
        }

    @property
    def is_out_of_sample(self) -> bool:
        """Whether every training example was left out by some checkpoint."""
        return not self.masks.all(axis=0).any()

    def train_loss(self, labels: np.ndarray) -> np.ndarray:
        """Mean loss in nats of each training example, (n_train,).

        The mean is over the checkpoints that did not see the example. Where some example was seen
        by all, it is over those that did see it, for every example: a mean over both kinds would
        rank examples by how often they happened to be left out.
        """
        self._check_labels(labels, self.train_logits)
        each = np.stack([losses(logits, labels) for logits in self.train_logits])
        counted = self._counted()
        return np.where(counted, each, 0).sum(axis=0) / counted.sum(axis=0)

    def train_probabilities(self) -> np.ndarray:
        """Mean probabilities of each training example, (n_train, C), of the same checkpoints."""
        from scipy.special import softmax

        counted = self._counted()
        total = sum(
            softmax(logits.astype(np.float64), axis=1) * used[:, None]
            for logits, used in zip(self.train_logits, counted, strict=True)
        )
        return total / counted.sum(axis=0)[:, None]

    def _counted(self) -> np.ndarray:
        """Which checkpoints speak of each training example, (M, n_train) bool."""
        counted = ~self.masks if self.is_out_of_sample else self.masks
        if not counted.any(axis=0).all():  # seen by all, or by none: too few checkpoints
            counted = np.ones_like(self.masks)
        return counted

    def validation_probabilities(self) -> np.ndarray:
        """Mean probabilities of each target over the checkpoints, (n_validation, C)."""
        return np.exp(_mean_log_probability(self.validation_logits))

    def validation_loss(self, labels: np.ndarray) -> np.ndarray:
        """Mean loss in nats of each target over the checkpoints, (n_validation,)."""
        self._check_labels(labels, self.validation_logits)
        return np.mean([losses(logits, labels) for logits in self.validation_logits], axis=0)

    def best(self, labels: np.ndarray) -> int:
        """The checkpoint with the lowest mean loss on the targets."""
        return int(np.argmin([losses(logits, labels).mean() for logits in self.validation_logits]))

    def metrics(self, data: ImageData) -> dict[str, float]:
        """Validation metrics: their mean over checkpoints, and those of the averaged prediction."""
        labels = data.labels("validation")
        each = [classification_metrics(logits, labels) for logits in self.validation_logits]
        mean = {f"validation_{k}_mean": float(np.mean([m[k] for m in each])) for k in each[0]}
        joint = classification_metrics(_mean_log_probability(self.validation_logits), labels)
        return mean | {f"ensemble_validation_{k}": v for k, v in joint.items()}


def label_quality(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """cleanlab's label quality, (n,) in [0, 1], low = suspect (Northcutt et al. 2021).

    By self-confidence, its default: subtracting class thresholds first made it worse on Food-101
    with planted flips (AUROC .916 in place of .949).

    Args:
        probabilities: (n, C), out of sample.
    """
    from cleanlab.rank import get_label_quality_scores

    return get_label_quality_scores(labels, probabilities, method="self_confidence")


def label_issues(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """What confident learning takes for label errors, (n,) bool (Northcutt et al. 2021).

    Those that are counted off the diagonal of the confident joint, pruned by noise rate.

    Args:
        probabilities: (n, C), out of sample.
    """
    from cleanlab.filter import find_label_issues

    return find_label_issues(labels, probabilities, n_jobs=1)


def _mean_log_probability(logits: np.ndarray) -> np.ndarray:
    """Log of the mean probability over models, (n, C)."""
    from scipy.special import log_softmax, logsumexp

    return logsumexp(log_softmax(logits.astype(np.float64), axis=2), axis=0) - np.log(len(logits))
