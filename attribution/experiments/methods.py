"""The methods that evaluate compares: TRAK, its variants, and cheaper ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.experiments.ekfac import ekfac_scores
from attribution.experiments.names import check_known
from attribution.models import classifier
from attribution.models.batches import batches_of
from attribution.models.predict import prediction_batch_size
from attribution.runtime.device import resolve_device
from attribution.runtime.npy_blocks import open_matrix, row_blocks, row_slices, write_matrix
from attribution.scores.artifact import Scores
from attribution.scores.features import Store, featurize
from attribution.scores.trak import score


@dataclass(frozen=True)
class Attribution:
    """The scores of a method, its ranking of training examples, or both.

    Attributes:
        values: (n_train, n_targets), positive = helpful; may be a memory map.
        trust: (n_train,), low = suspect.
    """

    values: np.ndarray | None = None
    trust: np.ndarray | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> Attribution:
        """Scores, with their mean over targets as the ranking."""
        means = [block.mean(axis=1, dtype=np.float64) for block in row_blocks(values)]
        return cls(values, np.concatenate(means))


@dataclass
class Subject:
    """The input of every method: the checkpoints behind the scores, the data, and a work folder."""

    config: Config
    data: ImageData
    checkpoints: Sequence[Path]
    scores: Scores
    work: Path

    @cached_property
    def stores(self) -> list[Store]:
        """Features of every checkpoint, computed once for all methods that need them."""
        return featurize(self.config, self.data, self.checkpoints, self.work)

    @cached_property
    def penultimate(self) -> list[list[np.ndarray]]:
        """Inputs of every checkpoint's last layer for train and targets, scaled to length one."""
        return [
            [_penultimate(self, folder, split) for split in ("train", TARGETS)]
            for folder in self.checkpoints
        ]

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> np.ndarray:
        """Write a score matrix from blocks of rows; returns it as a memory map."""
        file = self.work / f"{name}.npy"
        write_matrix(file, blocks, self.scores.values.shape)
        return open_matrix(file)


def trak(subject: Subject) -> Attribution:
    """TRAK scores as the trak stage stored them, and the trust score that harmful ranks by."""
    return Attribution(subject.scores.values, subject.scores.train["trust"].to_numpy())


def trak_unweighted(subject: Subject) -> Attribution:
    """TRAK without the factor 1 - p."""
    return _trak(subject, "none")


def trak_weighted(subject: Subject) -> Attribution:
    """TRAK with the factor 1 - p, the mean over all checkpoints."""
    return _trak(subject, "mean")


def _trak(subject: Subject, weight: str) -> Attribution:
    file = subject.work / weight / "scores.npy"
    file.parent.mkdir(exist_ok=True)
    config = replace(subject.config, loss_gradient_weight=weight)
    return Attribution.of(score(config, subject.stores, file).values)


def gradient_dot(subject: Subject) -> Attribution:
    """Dot product of the projected gradients of the margins, the mean over checkpoints (GradDot)."""
    return _gradients(subject, "gradient_dot", lambda x: x)


def gradient_cosine(subject: Subject) -> Attribution:
    """Cosine of the projected gradients of the margins, the mean over checkpoints (GradCos)."""
    return _gradients(subject, "gradient_cosine", _unit)


def _gradients(
    subject: Subject, name: str, scaled: Callable[[np.ndarray], np.ndarray]
) -> Attribution:
    targets = [scaled(np.concatenate(store.features(TARGETS))) for store in subject.stores]
    train = [row_blocks(*store.features("train")) for store in subject.stores]
    products = (
        sum(scaled(x) @ y.T for x, y in zip(blocks, targets, strict=True)) / len(targets)
        for blocks in zip(*train, strict=True)
    )
    return Attribution.of(subject.write(name, products))


def penultimate(subject: Subject) -> Attribution:
    """Cosine of the last layer's inputs, negated if labels differ; the mean over checkpoints."""
    return Attribution.of(subject.write("penultimate", penultimate_similarity(subject)))


def penultimate_similarity(subject: Subject, signed: bool = True) -> Iterator[np.ndarray]:
    """Blocks of rows (b, n_targets) of the similarity; unsigned, it is 0 if labels differ."""
    sides = subject.penultimate
    labels, own = subject.data.labels("train"), subject.data.labels(TARGETS)
    for rows in row_slices(len(labels), len(own)):
        same = labels[rows, None] == own
        factor = np.where(same, 1, -1 if signed else 0)
        yield sum(x[rows] @ y.T for x, y in sides) / len(sides) * factor


def _penultimate(subject: Subject, folder: Path, split: str) -> np.ndarray:
    device = resolve_device(subject.config.device)
    model = classifier.load(folder).to(device)
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    found: list[np.ndarray] = []
    hook = head.register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(1).cpu().numpy()))
    with torch.inference_mode():
        size = prediction_batch_size(subject.config)
        for images, _ in batches_of(subject.config, subject.data, split, size, device):
            model(images)
    hook.remove()
    return _unit(np.concatenate(found))


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, np.finfo(np.float32).tiny)


def loss(subject: Subject) -> Attribution:
    """Minus the ensemble's loss, from models that did not train on the example where possible."""
    return Attribution(trust=-subject.scores.train["loss"].to_numpy())


def confident(subject: Subject) -> Attribution:
    """Label quality by confident learning (cleanlab)."""
    return Attribution(trust=subject.scores.train["label_quality"].to_numpy())


def self_influence(subject: Subject) -> Attribution:
    """Minus each example's influence on its own margin."""
    return Attribution(trust=-subject.scores.train["self_influence"].to_numpy())


def random(subject: Subject) -> Attribution:
    """Normal noise: the floor that every method has to beat."""
    rng = np.random.default_rng(subject.config.seed)
    m = subject.scores.values.shape[1]
    blocks = (rng.standard_normal((len(b), m)) for b in row_blocks(subject.scores.values))
    return Attribution.of(subject.write("random", blocks))


def ekfac(subject: Subject) -> Attribution:
    """EK-FAC influence by kronfluence, the mean over checkpoints."""
    return Attribution.of(
        ekfac_scores(subject.config, subject.data, subject.checkpoints, subject.work / "ekfac")
    )


METHODS: dict[str, Callable[[Subject], Attribution]] = {
    f.__name__: f
    for f in (
        trak, trak_unweighted, trak_weighted, gradient_dot, gradient_cosine, penultimate, loss,
        confident, self_influence, random, ekfac,
    )
}  # fmt: skip
# Methods for which every checkpoint's gradients are computed once more.
FEATURISING = {"trak_unweighted", "trak_weighted", "gradient_dot", "gradient_cosine"}


def check_methods(names: Sequence[str]) -> None:
    """Refuse unknown methods, and one whose package is not installed.

    Raises:
        InputError: with the nearest valid names, or the package to install.
    """
    if not names:
        raise InputError(
            "methods: names none; leave the parameter out for all that need no extra package"
        )
    check_known("methods", names, METHODS)
    if "ekfac" in names and not find_spec("kronfluence"):
        raise InputError("methods=ekfac: needs kronfluence; pip install -e '.[benchmark]'")
