"""The evidence that the arms choose by: alignment, trust, loss and labels of every training example."""

from __future__ import annotations

import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.scores.alignment import AUTO, group_alignment, group_ids, group_weights
from attribution.scores.artifact import Scores


def gather_evidence(config: Config, data: ImageData, scores: Scores) -> pd.DataFrame:
    """All that an arm may look at, one row per training example in order of position.

    Nothing in it comes from the test split.

    Returns:
        The score artifact's table of training examples, with

        - alignment: under this run's groups and group weights, positive = helpful.
        - trust: low = suspect; equal to the alignment under other than the default groups or weights.
        - stored_trust: trust as the trak stage stored it, under any groups and weights.
        - group_id: group of each example, whole numbers; missing with groups=auto, which groups
          targets alone.

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
    evidence = scores.train.assign(alignment=alignment, stored_trust=scores.train["trust"])
    asked = {"groups": config.groups, "group_weights": config.group_weights}
    if asked != scores.metadata["alignment"]:
        # Whoever asks for other groups or weights wants D3M as it was published.
        evidence["trust"] = alignment
    if config.groups not in AUTO:
        evidence["group_id"] = group_ids(data.table("train"), config.groups)
    return evidence
