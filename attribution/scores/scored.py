"""The result of the trak stage: scores, their tables, and what they say about the training set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.listing import folder_of
from attribution.data.splits import SPLITS, TARGETS
from attribution.errors import InputError
from attribution.models.checkpoints import Finetuned
from attribution.models.cross_fit import cross_fit
from attribution.models.ensemble import Ensemble, label_quality
from attribution.models.predict import losses, margins
from attribution.runtime.progress import say
from attribution.scores import alignment, stored_features
from attribution.scores.artifact import Scores, load_scores, write_scores
from attribution.scores.calibration import FEWEST, Calibration, calibrate, describe
from attribution.scores.features import Store, featurize
from attribution.scores.stored_features import StoredFeatures
from attribution.scores.suspects import suspects
from attribution.scores.trak import (
    TrakScores,
    check_gradients,
    check_proj_dim,
    predicted_margins,
    score,
    trust_of_unseen,
)


@dataclass(frozen=True)
class Scored:
    """Scores of a training set, from score_training_set or from the artifacts of an earlier run.

    Attributes:
        scores: the scores with their tables and metadata; hashes are added to what is written.
        suspects: the table of suspects.suspects.
        matrix: .npy file of the scores in the work folder; None for a loaded result.
        stores: features of each checkpoint in the work folder; empty for a loaded result.
        features: what `keep_features` asks to store, in the work folder; None where it asks for
            nothing, and for a loaded result.
        seconds: time that features and scores took; 0 for a loaded result.
    """

    scores: Scores
    suspects: pd.DataFrame
    matrix: Path | None = None
    stores: Sequence[Store] = ()
    features: StoredFeatures | None = None
    seconds: float = 0.0

    @classmethod
    def load(cls, scores: Path, suspects: Path) -> Scored:
        """Read the artifacts of an earlier run.

        Args:
            scores: folder of the score artifact.
            suspects: file suspects.csv.

        Raises:
            InputError: the score artifact is incomplete or damaged.
        """
        texts = (
            "example_id", "file_name", "split", "label", "suggested_label", "reasons",
            "near_duplicate_of",
        )  # fmt: skip
        table = pd.read_csv(suspects, dtype=dict.fromkeys(texts, str), keep_default_na=False)
        return cls(load_scores(scores), table)

    def write(self, folder: Path) -> None:
        """Write the artifact `scores` into a folder."""
        assert self.matrix is not None
        write_scores(folder / "scores", self.matrix, self.scores)

    def metrics(self) -> dict[str, float]:
        """Time taken, the share of training examples with negative alignment, and how suspects were sought."""
        gradients = len(self.stores) * sum(self.scores.values.shape)
        return {
            "seconds": self.seconds,
            "milliseconds_per_gradient": 1000 * self.seconds / gradients,
            "share_negative_alignment": float((self.scores.train["alignment"] < 0).mean()),
            **{f"suspects_{k}": v for k, v in self.scores.metadata["suspects"].items()},
        }

    def rankings(self) -> dict[str, np.ndarray]:
        """Rankings of the training examples by doubt, each (n_train,), low = suspect."""
        train = self.scores.train
        found = {name: train[name].to_numpy() for name in ("trust", "alignment", "label_quality")}
        return found | {name: -train[name].to_numpy() for name in ("loss", "self_influence")}


def check(config: Config, data: ImageData) -> None:
    """Refuse settings and models that cannot be scored, before anything is trained.

    Raises:
        InputError: see check_proj_dim and check_gradients; or cross_fit=yes with given checkpoints.
    """
    check_proj_dim(config, len(data.rows("train")))
    check_gradients(config, data.class_names)
    if config.cross_fit == "yes" and config.checkpoints:
        raise InputError(
            "cross_fit=yes: trains models, and checkpoints gives trained ones; leave one of them out"
        )
    if config.checkpoint_epochs and config.num_models < FEWEST:
        say(
            f"checkpoint_epochs={config.checkpoint_epochs}: the scores will have no unit; it takes "
            f"{FEWEST} independent runs (num_models), and epochs of one run are not"
        )


def score_training_set(
    config: Config, data: ImageData, finetuned: Finetuned, work: Path, origin: dict[str, Any]
) -> Scored:
    """Score every training example by an ensemble, and list the suspects.

    Args:
        finetuned: the ensemble, with the folders of its checkpoints.
        work: folder of unfinished features and scores. A second call continues from it.
        origin: fingerprints, versions and run ids, for the metadata.

    Raises:
        InputError: see featurize and score.
    """
    check_proj_dim(config, len(data.rows("train")))
    members, held_out = finetuned.members, None
    if members.is_out_of_sample:
        held_out = alignment.held_out_weights(members.masks, data.labels("train"))
    else:
        say(
            "trak: some examples were seen by every checkpoint: losses are in-sample, and suspects are "
            "sought in the training split alone"
        )
    start = time.monotonic()
    stores = featurize(config, data, finetuned.folders, work)
    calibration = _calibrate(config, data, members, stores)
    scale = calibration.scale if calibration else 1.0
    found = score(config, stores, work / "scores.npy", held_out, scale)
    seconds = time.monotonic() - start
    features = None
    length = sum(part.size for store in stores for part in store.features("train"))
    if stored_features.are_wanted(config, length):
        features = stored_features.write_features(work / "stored", stores, config, scale)
    targets = data.table(TARGETS).assign(loss=members.loss(TARGETS, data.labels(TARGETS)))
    splits = SPLITS[:1] if held_out is None else SPLITS
    probabilities = {split: members.probabilities(split) for split in splits}
    predictions = {s: _predictions(data, members, s, p) for s, p in probabilities.items()}
    train = _train_table(predictions["train"], found, targets)
    metadata = {
        "estimator": config.group("trak")
        | {"num_models": config.num_models, "checkpoint_epochs": config.checkpoint_epochs},
        **describe(calibration),
        "alignment": {"groups": "label", "group_weights": "exp_loss"},
        "loss_is_out_of_sample": members.is_out_of_sample,
        "data": config.group("data")
        | {"dataset": str(folder_of(config.dataset) or config.dataset)},
        "data_fingerprint": data.fingerprint,
        **origin,
    }
    others = [
        predictions[split].assign(trust=trust_of_unseen(config, stores, held_out, split))
        for split in SPLITS[1:]
        if held_out is not None  # else losses in sample and out of it would be compared
    ]
    table = pd.concat([train, *others], ignore_index=True)
    outputs = np.concatenate(list(probabilities.values()))
    metadata["suspects"] = {"examined": len(table)}
    if config.cross_fit == "yes":
        logits = cross_fit(config, data, work / "cross_fit")[:, : len(table)]
        table, outputs = _cross_fitted(table, outputs, logits, members.is_out_of_sample)
        accuracy = (logits.argmax(axis=2) == table["label"].to_numpy()).mean()
        metadata["suspects"]["cross_fit_accuracy"] = float(accuracy)
    listed = suspects(data, table, outputs, by_loss=config.cross_fit == "yes")
    scores = Scores(found.values, train, targets, metadata)
    return Scored(scores, listed, found.file, stores, features, seconds)


def _calibrate(
    config: Config, data: ImageData, members: Ensemble, stores: list[Store]
) -> Calibration | None:
    """Bring the scores into margins, as far as the checkpoints tell how; say so."""
    labels = data.labels(TARGETS)
    each = np.stack([margins(logits, labels) for logits in members.validation_logits])
    # The epochs of a run saw the same examples, so that they count as one.
    step = config.checkpoints_per_run
    measured = each.reshape(-1, step, len(labels)).mean(axis=1)
    found = calibrate(predicted_margins(config, stores, members.masks[::step]), measured)
    if found:
        interval = f"95 % interval {found.low:.3g} to {found.high:.3g}"
        say(f"trak: scores are in margins, by the factor {found.scale:.3g} ({interval})")
    else:
        say("trak: scores rank, but have no unit: these checkpoints do not tell it")
    return found


def _train_table(
    predictions: pd.DataFrame, found: TrakScores, targets: pd.DataFrame
) -> pd.DataFrame:
    """The score artifact's table of training examples, one row per row of the scores."""
    groups = alignment.group_ids(targets, "label")
    weights = alignment.group_weights(targets["loss"].to_numpy(), groups, "exp_loss")
    aligned = alignment.group_alignment(found.values, groups, weights)
    trust = found.held_out
    if trust is None:
        trust = alignment.unweighted(aligned, found.row_weight)
    return predictions.assign(
        alignment=aligned,
        row_weight=found.row_weight,
        trust=trust,
        self_influence=found.self_influence,
    )


def _cross_fitted(
    table: pd.DataFrame, probabilities: np.ndarray, logits: np.ndarray, is_out_of_sample: bool
) -> tuple[pd.DataFrame, np.ndarray]:
    """Mean of the ensemble's losses and probabilities with those by cross-fitting (docs/results.md).

    Args:
        probabilities: (n, C) of the ensemble.
        logits: (repeats, n, C) of cross_fit.
        is_out_of_sample: whether those of the ensemble are; otherwise cross-fitting counts alone.
    """
    labels, own = table["label"].to_numpy(), 0.5 if is_out_of_sample else 0.0
    loss = np.mean([losses(each, labels) for each in logits], axis=0)
    crossed = softmax(logits.astype(np.float64), axis=2).mean(axis=0)
    probabilities = own * probabilities + (1 - own) * crossed
    return table.assign(
        loss=own * table["loss"] + (1 - own) * loss,
        label_quality=label_quality(labels, probabilities),
        predicted_label=probabilities.argmax(axis=1),
    ), probabilities


def _predictions(
    data: ImageData, members: Ensemble, split: str, probabilities: np.ndarray
) -> pd.DataFrame:
    """The examples of a split, and what the ensemble makes of their labels."""
    labels = data.labels(split)
    return data.table(split).assign(
        loss=members.loss(split, labels),
        label_quality=label_quality(labels, probabilities),
        predicted_label=probabilities.argmax(axis=1),
    )
