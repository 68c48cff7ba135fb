"""Why did the model predict this? The training examples that raised and lowered a margin most."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from attribution.config import Config, nearest
from attribution.data import looks
from attribution.data.dataset import ImageData
from attribution.data.decoding import open_image, read_image
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.models.ensemble import Ensemble
from attribution.runtime.device import one_thread
from attribution.runtime.safe_files import regular
from attribution.scores import exact, stored_features
from attribution.scores.artifact import Scores
from attribution.scores.stored_features import StoredFeatures

DEFAULT_ERRORS = 6  # mistakes explained if no image, target or number of errors is given
LOW_CONFIDENCE = 0.95  # share of validation images of which the ensemble is more certain


@dataclass(frozen=True, eq=False)
class Explanation:
    """One prediction and the training examples behind it.

    Attributes:
        name: 'target 17', or the file name of an image.
        pixels: uint8 (size, size, 3), as the model saw them.
        label: class of the target; for an image, the class asked about. Scores are of its margin.
        predicted: class predicted by the ensemble.
        probability: mean probability of `predicted` over checkpoints.
        label_probability: mean probability of `label` over checkpoints.
        agreement: how many checkpoints predict the same, in words.
        helpful, harmful: training examples with a `score` column, above and below zero, the
            strongest first.
        in_margins: whether scores are changes of the margin, see calibration.calibrate.
        warnings: a line for each way in which an image is unlike the training data.
        measured: for exact scores, what training the model again has shown, in words.
    """

    name: str
    pixels: np.ndarray
    label: str
    predicted: str
    probability: float
    label_probability: float
    agreement: str
    helpful: pd.DataFrame
    harmful: pd.DataFrame
    in_margins: bool
    warnings: tuple[str, ...] = ()
    measured: str = ""

    @property
    def is_right(self) -> bool:
        return self.label == self.predicted

    @property
    def effect(self) -> str:
        """What the strongest score says, in words; empty where the scores have no unit."""
        shown = pd.concat([self.helpful, self.harmful], ignore_index=True)
        if not self.in_margins or shown.empty:
            return ""
        first = shown.loc[shown["score"].abs().idxmax()]
        side = "fall" if first["score"] > 0 else "rise"
        return (
            f"without training image {first['example_id']}, the margin (log-odds) of {self.label} "
            f"would {side} by about {abs(first['score']):.2g}{self.measured and '. '}{self.measured}"
        )

    def table(self) -> pd.DataFrame:
        """One row per example shown: the prediction, side, rank from 1, score, and train columns."""
        own = {
            "explained": self.name,
            "explained_label": self.label,
            "predicted": self.predicted,
            "probability": self.probability,
            "agreement": self.agreement,
            "effect": self.effect,
            "warnings": "\n".join(self.warnings),
        }
        parts = [
            part.assign(**own, side=side, rank=np.arange(1, len(part) + 1))
            for side, part in (("helpful", self.helpful), ("harmful", self.harmful))
        ]
        table = pd.concat(parts, ignore_index=True)
        first = [*own, "side", "rank", "score"]
        return table[first + [name for name in table if name not in first]]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the checkpoints say about an image.

    Attributes:
        name, pixels: as of Explanation.
        label: whose margin is explained.
        probabilities: (C,), means over checkpoints.
        votes: (M,) class that each checkpoint predicts.
        warnings: as of Explanation.
    """

    name: str
    pixels: np.ndarray
    label: int
    probabilities: np.ndarray
    votes: np.ndarray
    warnings: tuple[str, ...] = ()


def explain(
    config: Config,
    data: ImageData,
    scores: Scores,
    members: Ensemble,
    stored: StoredFeatures | None = None,
    checkpoints: Sequence[Path] = (),
) -> list[Explanation]:
    """Explain the image, the targets and the most confident mistakes that the config names.

    Args:
        members: logits of the checkpoints.
        stored: features of the training set; only for parameter `image`.
        checkpoints: from_pretrained folders, in order; only for parameter `image`.

    Raises:
        InputError: nothing is named, and the ensemble makes no mistake; a number that is no target; an
            image that cannot be read; or features that do not fit the checkpoints.
    """
    if config.exact == "yes":
        return explain_exactly(config, data, scores, members)
    found = []
    if stored:
        picture = read_picture(config)
        image = picture[1][None]
        with one_thread():  # for a single image, threads would mostly wait for one another
            each = stored_features.probabilities(config, checkpoints, image)[:, 0]
            own = _prediction(config, data, members, picture, each)
            labels = np.array([own.label])
            new = stored_features.new_features(config, checkpoints, image, labels)
        column = Scores(stored.scores(new), scores.train, pd.DataFrame(), scores.metadata)
        found.append(_explain(data, own, column, 0, config.num_examples))
    targets = _targets(config, data, members, bool(found))
    chosen = scores.select(targets)
    predictions = _predictions(data, members, targets)
    return found + [
        _explain(data, each, chosen, i, config.num_examples) for i, each in enumerate(predictions)
    ]


def _targets(config: Config, data: ImageData, members: Ensemble, found: bool) -> list[int]:
    """The targets and mistakes that the config names; mistakes where nothing is named or found."""
    errors, targets = config.errors, list(dict.fromkeys(config.target_numbers))
    _check_targets(targets, len(data.rows(TARGETS)))
    if not (errors or found or targets):
        errors = DEFAULT_ERRORS
    probabilities = members.probabilities("validation")
    mistakes = confident_mistakes(probabilities, data.labels(TARGETS), errors)
    targets += [target for target in mistakes if target not in targets]
    if not (found or targets):
        raise InputError(
            f"errors={errors}: the ensemble makes no mistake on the targets; name one, e.g. target=0"
        )
    return targets


def explain_exactly(
    config: Config, data: ImageData, scores: Scores, members: Ensemble
) -> list[Explanation]:
    """Explain the predictions of the best checkpoint by its exact derivatives (scores/exact.py).

    Args:
        scores: for its table of training examples.

    Raises:
        InputError: as explain and exact.Run.of do.
    """
    m = members.best(data.labels(TARGETS))
    members, run = members.only(m), exact.Run.of(config, data, members, m)
    found = []
    if config.image:
        picture = read_picture(config)
        found.append(_prediction(config, data, members, picture, run.probabilities(picture[1])))
    found += _predictions(data, members, _targets(config, data, members, bool(found)))
    inputs = run.received(np.stack([each.pixels for each in found]))
    labels = torch.tensor([each.label for each in found])
    values = run.derivatives(inputs, labels)
    columns = Scores(values, scores.train, pd.DataFrame(), {"calibration": True})
    shown = [_explain(data, each, columns, i, config.num_examples) for i, each in enumerate(found)]
    parts = [each.helpful["position"].to_numpy() for each in shown]
    words = exact.findings(run, values, parts, inputs, labels)
    return [replace(each, measured=own) for each, own in zip(shown, words, strict=True)]


def confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """Positions of the first `count` misclassified examples, the most confident mistake first.

    Args:
        probabilities: (n, C).
        labels: (n,).
    """
    predicted = probabilities.argmax(1)
    order = np.argsort(-probabilities.max(1), kind="stable")
    return [int(i) for i in order if predicted[i] != labels[i]][:count]


def _predictions(data: ImageData, members: Ensemble, targets: list[int]) -> list[Prediction]:
    pixels, rows = data.pixels(), data.rows(TARGETS)
    labels, probabilities = data.labels(TARGETS), members.probabilities("validation")
    votes = members.validation_logits.argmax(axis=2)
    return [
        Prediction(
            f"target {t}", np.array(pixels[rows[t]]), labels[t], probabilities[t], votes[:, t]
        )
        for t in targets
    ]


def _prediction(
    config: Config,
    data: ImageData,
    members: Ensemble,
    picture: tuple[tuple[int, int], np.ndarray],
    each: np.ndarray,
) -> Prediction:
    """The prediction of the image of parameter `image`, and how the image is unlike the training data.

    Args:
        picture: from read_picture.
        each: probabilities of each checkpoint, (M, C).
    """
    mean = each.mean(axis=0)
    label = data.class_names.index(config.label) if config.label else int(mean.argmax())
    warnings = looks.unlike(data, *picture) + _doubts(mean.max(), members)
    name, votes = Path(config.image).name, each.argmax(axis=1)
    return Prediction(name, picture[1], label, mean, votes, tuple(warnings))


def _doubts(probability: float, members: Ensemble) -> list[str]:
    """A line if the ensemble is less certain than of nearly all validation examples."""
    usual = members.probabilities("validation").max(axis=1)
    surer = (usual > probability).mean()
    if surer < LOW_CONFIDENCE:
        return []
    return [
        f"low confidence: {probability:.2f}; the models are more certain of "
        f"{100 * surer:.0f} % of the validation images"
    ]


def check(config: Config, data: ImageData) -> None:
    """Refuse parameters that cannot be explained, before anything is trained.

    Raises:
        InputError: an unknown target or class, an image that cannot be read, an image with
            keep_features=no, or a label without an image.
    """
    if config.exact == "yes":
        exact.check(config, data)
    _check_targets(config.target_numbers, len(data.rows(TARGETS)))
    if config.label and config.label not in data.class_names:
        raise InputError(
            f"label={config.label}: no such class; {nearest(config.label, data.class_names)}"
        )
    if config.label and not config.image:
        raise InputError(
            f"label={config.label}: only used with an image (targets have labels of their own); "
            "add image=FILE or leave label out"
        )
    if config.image:
        read_picture(config)
        if config.keep_features == "no" and config.exact == "no":
            raise InputError(
                "keep_features=no: image needs stored features; make the scores with "
                "keep_features=yes"
            )


def _check_targets(targets: list[int], count: int) -> None:
    for target in targets:
        if not 0 <= target < count:
            raise InputError(f"target={target}: must be from 0 to {count - 1}")


def read_picture(config: Config) -> tuple[tuple[int, int], np.ndarray]:
    """The image of parameter `image`: width and height in its file, and its pixels.

    Pixels are uint8 (size, size, 3), prepared like the data set's images.

    Raises:
        InputError: the file is missing or cannot be decoded.
    """
    try:
        content = regular(Path(config.image).expanduser()).read_bytes()
        pixels = np.array(read_image(content, config.image_size))
        return open_image(io.BytesIO(content)).size, pixels
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"image={config.image}: cannot be read ({why})") from None


def _explain(
    data: ImageData, prediction: Prediction, scores: Scores, target: int, k: int
) -> Explanation:
    """Explain a prediction by a column of the scores.

    Each side shows up to k examples: the most helpful with a score above zero, the most harmful below.
    """
    label, probabilities, votes = prediction.label, prediction.probabilities, prediction.votes
    predicted = int(probabilities.argmax())
    agreeing, name = (votes == predicted).sum(), data.class_names[predicted]
    top, bottom = scores.top(target, k), scores.bottom(target, k)
    return Explanation(
        prediction.name,
        prediction.pixels,
        data.class_names[label],
        name,
        float(probabilities[predicted]),
        float(probabilities[label]),
        f"{agreeing} of {len(votes)} checkpoints say {name}",
        top[top["score"] > 0],
        bottom[bottom["score"] < 0],
        in_margins=bool(scores.metadata.get("calibration")),
        warnings=prediction.warnings,
    )
