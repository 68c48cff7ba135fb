"""Why did the model predict this? The training examples that raised and lowered one margin most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from attribution.config import Config, nearest
from attribution.data.dataset import ImageData
from attribution.data.decoding import read_image
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.models.ensemble import Ensemble
from attribution.runtime.safe_files import regular
from attribution.scores import stored_features
from attribution.scores.artifact import Scores

DEFAULT_ERRORS = 6  # mistakes that are explained if nothing is named


@dataclass(frozen=True, eq=False)
class Explanation:
    """One prediction with what it was made from.

    Attributes:
        name: 'target 17', or the file name of a picture.
        pixels: uint8 (size, size, 3), as the model saw it.
        label: its class; of a picture the class that was asked about. Scores are of its margin.
        predicted, probability: by the ensemble, the mean over checkpoints.
        label_probability: of `label`.
        helpful, harmful: training examples with a `score` column, above and below zero, the
            strongest first.
    """

    name: str
    pixels: np.ndarray
    label: str
    predicted: str
    probability: float
    label_probability: float
    helpful: pd.DataFrame
    harmful: pd.DataFrame

    @property
    def is_right(self) -> bool:
        return self.label == self.predicted

    def table(self) -> pd.DataFrame:
        """One row an example shown: of what, whether helpful, rank from 1, and the train columns."""
        own = {
            "explained": self.name,
            "explained_label": self.label,
            "predicted": self.predicted,
            "probability": self.probability,
        }
        parts = [
            part.assign(**own, side=side, rank=np.arange(1, len(part) + 1))
            for side, part in (("helpful", self.helpful), ("harmful", self.harmful))
        ]
        table = pd.concat(parts, ignore_index=True)
        first = [*own, "side", "rank", "score"]
        return table[first + [name for name in table if name not in first]]


def confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """Numbers of the misclassified examples, the one with the highest wrong probability first.

    Args:
        probabilities: (n, C).
        labels: (n,).

    Raises:
        InputError: they are of other data.
    """
    if len(probabilities) != len(labels):
        raise InputError(f"logits: are of {len(probabilities)} targets, the data has {len(labels)}")
    predicted = probabilities.argmax(1)
    order = np.argsort(-probabilities.max(1), kind="stable")
    return [int(i) for i in order if predicted[i] != labels[i]][:count]


def explain(
    config: Config,
    data: ImageData,
    scores: Scores,
    members: Ensemble,
    stored: stored_features.StoredFeatures | None = None,
    checkpoints: list[Path] | None = None,
) -> list[Explanation]:
    """Explain the picture, the targets and the most confident mistakes that the parameters name.

    Args:
        members: of the ensemble that was scored.
        stored, checkpoints: features and folders of the ensemble, for parameter `image` alone.

    Raises:
        InputError: nothing was named, and the ensemble makes no mistake on targets.
    """
    found, targets = [], list(dict.fromkeys(config.target_numbers))
    if stored and checkpoints:
        found.append(explain_picture(config, data, scores, stored, checkpoints))
    probabilities = members.validation_probabilities()
    errors = config.errors or (0 if found or targets else DEFAULT_ERRORS)
    mistakes = confident_mistakes(probabilities, data.labels(TARGETS), errors)
    targets += [target for target in mistakes if target not in targets]
    if not (found or targets):
        raise InputError(f"errors={errors}: the ensemble makes no mistake on targets; use target=0")
    return found + explain_targets(data, scores, probabilities, targets, config.num_examples)


def explain_targets(
    data: ImageData, scores: Scores, probabilities: np.ndarray, targets: list[int], k: int
) -> list[Explanation]:
    """Read the columns of these targets.

    Args:
        probabilities: (n_targets, C) by the ensemble.
        k: examples on each side.

    Raises:
        InputError: no such target.
    """
    _check_targets(targets, len(scores.targets))
    chosen, pixels, rows = scores.select(targets), data.pixels(), data.rows(TARGETS)
    labels = data.labels(TARGETS)
    return [
        _explain(
            f"target {target}",
            np.array(pixels[rows[target]]),
            int(labels[target]),
            probabilities[target],
            data.class_names,
            _sides(chosen, i, k),
        )
        for i, target in enumerate(targets)
    ]


def explain_picture(
    config: Config,
    data: ImageData,
    scores: Scores,
    stored: stored_features.StoredFeatures,
    checkpoints: list[Path],
) -> Explanation:
    """Score the training set on the picture of parameter `image`, by the features that were stored.

    Raises:
        InputError: it cannot be decoded, or `label` is no class.
    """
    pixels = read_picture(config)[None]
    torch.set_num_threads(1)  # on so little work two would spend their time waiting for each other
    probabilities = stored_features.probabilities(config, checkpoints, pixels)[0]
    label = int(probabilities.argmax())
    if config.label:
        label = data.class_names.index(config.label)
    new = stored_features.new_features(config, checkpoints, pixels, np.array([label]))
    column = Scores(stored.scores(new), scores.train, pd.DataFrame(), scores.metadata)
    sides = _sides(column, 0, config.num_examples)
    name = Path(config.image).name
    return _explain(name, pixels[0], label, probabilities, data.class_names, sides)


def check(config: Config, data: ImageData) -> None:
    """Refuse what could not be explained, before anything is trained.

    Raises:
        InputError: no such target or class, a picture that cannot be decoded or that nothing would
            be kept for, or a class without a picture.
    """
    _check_targets(config.target_numbers, len(data.rows(TARGETS)))
    if config.label and config.label not in data.class_names:
        raise InputError(
            f"label={config.label}: no such class; {nearest(config.label, data.class_names)}"
        )
    if config.label and not config.image:
        raise InputError(
            f"label={config.label}: is the class asked about for a picture, and targets have their "
            "own; name an image, or leave it out"
        )
    if config.image:
        read_picture(config)
        if config.keep_features == "no":
            raise InputError(
                "keep_features=no: image needs stored features; make the scores with "
                "keep_features=yes"
            )


def _check_targets(targets: list[int], count: int) -> None:
    for target in targets:
        if not 0 <= target < count:
            raise InputError(f"target={target}: must be from 0 to {count - 1}")


def read_picture(config: Config) -> np.ndarray:
    """The picture of parameter `image`, uint8 (size, size, 3), prepared as the data set's are.

    Raises:
        InputError: it is not there, or cannot be decoded.
    """
    try:
        file = regular(Path(config.image).expanduser())
        return np.array(read_image(file.read_bytes(), config.image_size))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"image={config.image}: cannot be read ({why})") from None


def _sides(scores: Scores, target: int, k: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The k most helpful and the k most harmful examples, or as many as have that sign."""
    top, bottom = scores.top(target, k), scores.bottom(target, k)
    return top[top["score"] > 0], bottom[bottom["score"] < 0]


def _explain(
    name: str,
    pixels: np.ndarray,
    label: int,
    probabilities: np.ndarray,
    class_names: tuple[str, ...],
    sides: tuple[pd.DataFrame, pd.DataFrame],
) -> Explanation:
    predicted = int(probabilities.argmax())
    return Explanation(
        name,
        pixels,
        class_names[label],
        class_names[predicted],
        float(probabilities[predicted]),
        float(probabilities[label]),
        *sides,
    )
