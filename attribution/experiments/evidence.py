"""The evidence that the arms choose by: alignment, trust, loss and labels of every training example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.scores.alignment import AUTO, group_alignment, group_ids, group_weights
from attribution.scores.artifact import Scores


@dataclass(frozen=True)
class Evidence:
    """What an arm may look at: arrays of shape (n_train,), in order of position.

    Nothing here comes from the test split.

    Attributes:
        alignment: under this run's groups and group weights, positive = helpful.
        trust: low = suspect; equal to the alignment under other than the default groups or weights.
        loss: ensemble loss in nats, from models that did not train on the example where possible.
        stored_trust: trust as the trak stage stored it, under any groups and weights.
        label_quality: by cleanlab, low = suspect.
        self_influence: high = suspect.
        predicted: label that the ensemble predicts, without having trained on the example where possible.
        true_labels: labels before any were flipped on purpose.
        groups: group of each example; None with groups=auto, which groups targets alone.
        is_flipped: whether the label was flipped on purpose; None if no label was.
    """

    labels: np.ndarray
    alignment: np.ndarray
    trust: np.ndarray
    loss: np.ndarray
    stored_trust: np.ndarray
    label_quality: np.ndarray
    self_influence: np.ndarray
    predicted: np.ndarray
    true_labels: np.ndarray
    groups: np.ndarray | None = None
    is_flipped: np.ndarray | None = None


def gather_evidence(config: Config, data: ImageData, scores: Scores) -> Evidence:
    """Collect the evidence from the scores and the data, under this run's groups and weights.

    Raises:
        InputError: the scores are of other examples than the data.
    """
    for table, split in ((scores.train, "train"), (scores.targets, "validation")):
        if list(table["example_id"]) != list(data.table(split)["example_id"]):
            raise InputError(f"scores: the {split} table does not have this data set's examples")
    # The column that `groups` names is in the data, and may be missing in the scores.
    groups = group_ids(data.table("validation"), config.groups, scores.values)
    losses = scores.targets["loss"].to_numpy()
    weights = group_weights(losses, groups, config.group_weights)
    alignment = group_alignment(scores.values, groups, weights)
    own_groups = None
    if config.groups not in AUTO:
        own_groups = group_ids(data.table("train"), config.groups)
    asked = {"groups": config.groups, "group_weights": config.group_weights}
    train = {name: column.to_numpy() for name, column in scores.train.items()}
    return Evidence(
        labels=data.labels("train"),
        alignment=alignment,
        # Whoever asks for other groups or weights wants D3M as it was published.
        trust=train["trust"] if asked == scores.metadata["alignment"] else alignment,
        loss=train["loss"],
        stored_trust=train["trust"],
        label_quality=train["label_quality"],
        self_influence=train["self_influence"],
        predicted=train["predicted_label"],
        groups=own_groups,
        is_flipped=train["is_flipped"] if train["is_flipped"].any() else None,
        true_labels=train["true_label"],
    )
