"""Copies of targets among the training examples: the right label helps most, a wrong one hurts most."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.models.checkpoints import subset_masks, train_checkpoints
from attribution.scores.features import featurize
from attribution.scores.trak import score

COPIES = 12


def with_copies(data: ImageData) -> tuple[ImageData, np.ndarray]:
    """Two copies of some targets more in training: first with their label, then with a wrong one."""
    validation = data.rows("validation")
    chosen = validation[np.random.default_rng(0).choice(len(validation), 2 * COPIES, replace=False)]
    copies = data.examples.iloc[chosen].assign(split="train")
    wrong = np.arange(2 * COPIES) >= COPIES
    copies["label"] = np.where(wrong, (copies["label"] + 1) % 10, copies["label"])
    examples = pd.concat([data.examples, copies], ignore_index=True)
    pixels = np.concatenate([data.pixels(), data.pixels()[chosen]])
    planted = dataclasses.replace(
        data, examples=examples, resident=pixels, fingerprint=f"{data.fingerprint} with copies"
    )
    return planted, np.searchsorted(validation, chosen)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[str, np.ndarray]:
    """How many training examples beat each copy, from the helpful and from the harmful end."""
    folder = tmp_path_factory.mktemp("copies")
    config = resolve({"num_models": 2, "label_noise": 0.0, "cache_dir": str(folder), "jobs": 1})
    data, targets = with_copies(load_data(config))
    n = len(data.rows("train"))
    masks = subset_masks(n, 2, 0.5, 0)  # each copy is seen by one of them
    folders = [c.folder for c in train_checkpoints(config, data, masks, folder / "checkpoints")]
    stores = featurize(config, data, folders, folder / "features")
    own, found = n - 2 * COPIES + np.arange(2 * COPIES), {}  # the copies are the last examples
    for weight in ("none", "mean"):
        weighted = dataclasses.replace(config, loss_gradient_weight=weight)
        values = score(weighted, stores, folder / f"{weight}.npy").values
        found[weight, "top"] = (values[:, targets] > values[own, targets]).sum(axis=0)
        found[weight, "bottom"] = (values[:, targets] < values[own, targets]).sum(axis=0)
    return found


@pytest.mark.slow
def test_a_mislabelled_copy_of_a_target_is_among_its_most_harmful(ranks) -> None:
    for weight in ("none", "mean"):
        assert (ranks[weight, "bottom"][COPIES:] < 3).mean() >= 0.9, ranks[weight, "bottom"]


@pytest.mark.slow
def test_a_copy_of_a_target_is_among_its_most_helpful(ranks) -> None:
    """Without the factor 1 - p, which takes from what is learned easily."""
    assert (ranks["none", "top"][:COPIES] < 3).mean() >= 0.9, ranks["none", "top"]
    assert np.median(ranks["mean", "top"][:COPIES]) < 10
