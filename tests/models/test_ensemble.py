"""What the checkpoints of an ensemble predict together, and the archive that keeps their logits."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy import toy_data

from attribution.errors import InputError
from attribution.models.checkpoints import subset_masks
from attribution.models.ensemble import Ensemble, label_quality

SIZES = {"train": 12, "validation": 7, "test": 4}
DATA = SimpleNamespace(rows=lambda split: range(SIZES[split]), class_names=("a", "b", "c"))


def made(masks: np.ndarray, classes: int = 3, n_validation: int = 7) -> Ensemble:
    rng = np.random.default_rng(0)
    m, n = masks.shape
    return Ensemble(
        masks,
        rng.normal(0, 3, (m, n, classes)).astype(np.float32),
        rng.normal(0, 3, (m, n_validation, classes)).astype(np.float32),
        rng.normal(0, 3, (m, 4, classes)).astype(np.float32),
    )


def loss_by_loops(logits: np.ndarray, label: int) -> float:
    values = [float(v) for v in logits]
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values)) - values[label]


def test_train_loss_is_the_mean_over_checkpoints_that_did_not_see_the_example() -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    labels = np.arange(12) % 3
    for i, found in enumerate(joint.loss("train", labels)):
        unseen = [m for m in range(4) if not joint.masks[m, i]]
        each = [loss_by_loops(joint.train_logits[m, i], labels[i]) for m in unseen]
        assert found == pytest.approx(sum(each) / len(each))
    assert joint.is_out_of_sample


def test_where_an_example_was_seen_by_all_the_loss_is_over_those_that_saw_it() -> None:
    masks = subset_masks(12, 4, 0.5, 0)
    masks[:, 5] = True
    joint = made(masks)
    labels = np.arange(12) % 3
    expected = [
        np.mean([loss_by_loops(joint.train_logits[m, i], labels[i]) for m in np.flatnonzero(s)])
        for i, s in enumerate(masks.T)
    ]
    np.testing.assert_allclose(joint.loss("train", labels), expected)
    assert not joint.is_out_of_sample


MASKS = {
    "each left out by some": subset_masks(12, 4, 0.5, 0),
    "one seen by all": subset_masks(12, 4, 0.5, 0) | (np.arange(12) == 5),
    "one seen by none, one by all": (np.arange(12) != 3) & (np.arange(24).reshape(2, 12) != 7),
    "all seen by all": np.ones((3, 12), bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_train_probabilities_are_means_over_the_checkpoints_whose_loss_counts(name: str) -> None:
    masks = MASKS[name]
    joint = made(masks)
    if not masks.all(axis=0).any():
        counted = ~masks
    elif masks.any(axis=0).all():
        counted = masks
    else:
        counted = np.ones_like(masks)
    found = joint.probabilities("train")
    for i in range(12):
        rows = [
            [math.exp(-loss_by_loops(joint.train_logits[m, i], label)) for label in range(3)]
            for m in range(len(masks))
            if counted[m, i]
        ]
        np.testing.assert_allclose(found[i], np.mean(rows, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_label_quality_is_the_probability_of_the_given_label() -> None:
    probabilities = made(MASKS["each left out by some"]).probabilities("train")
    labels = np.arange(12) % 3
    expected = [probabilities[i, label] for i, label in enumerate(labels)]
    np.testing.assert_allclose(label_quality(labels, probabilities), expected, rtol=1e-9)


def test_label_quality_puts_planted_flips_first() -> None:
    rng = np.random.default_rng(0)
    true, flipped = np.arange(200) % 4, rng.permutation(200) < 30
    logits = rng.normal(size=(200, 4)) + 6 * (np.arange(4) == true[:, None])
    odds = np.exp(logits)
    quality = label_quality((true + flipped) % 4, odds / odds.sum(axis=1, keepdims=True))
    assert ((quality >= 0) & (quality <= 1)).all()
    assert flipped[np.argsort(quality)[:30]].mean() > 0.95


@pytest.mark.parametrize(("split", "n"), [("validation", 7), ("test", 4)])
def test_loss_and_probabilities_of_other_splits_are_means_over_all_checkpoints(split, n) -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    labels, logits = np.arange(n) % 3, getattr(joint, f"{split}_logits")
    each = [[[loss_by_loops(row, c) for c in range(3)] for row in model] for model in logits]
    expected = np.mean(each, axis=0)[np.arange(n), labels]
    np.testing.assert_allclose(joint.loss(split, labels), expected)
    np.testing.assert_allclose(joint.probabilities(split), np.exp(-np.array(each)).mean(0))


def test_an_ensemble_kept_as_an_archive_is_loaded_as_it_was(tmp_path: Path) -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    np.savez(tmp_path / "logits.npz", **joint.arrays())
    loaded = Ensemble.load(tmp_path / "logits.npz", DATA)
    for name, array in joint.arrays().items():
        found = getattr(loaded, name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def archive(file: Path, **changes) -> Path:
    """An ensemble's archive of 4 models, 12, 7 and 4 examples and 3 classes, with other arrays."""
    np.savez(file, **(made(subset_masks(12, 4, 0.5, 0)).arrays() | changes))
    return file


@pytest.mark.parametrize(
    "spoil",
    {
        "text": lambda f: f.write_bytes(b"text"),
        "empty": lambda f: f.write_bytes(b""),
        "truncated": lambda f: f.write_bytes(archive(f).read_bytes()[:500]),
        "an array missing": lambda f: np.savez(f, masks=np.ones((4, 12), bool)),
        "compressed": lambda f: np.savez_compressed(f, **made(subset_masks(12, 4, 1, 0)).arrays()),
        "pickled objects": lambda f: archive(f, masks=np.full((4, 12), {}, object)),
        "masks of numbers": lambda f: archive(f, masks=np.ones((4, 12))),
        "masks of neither": lambda f: archive(f, masks=np.full((4, 12), 2, np.uint8).view(bool)),
        "other models": lambda f: archive(f, masks=np.ones((3, 12), bool)),
        "other examples": lambda f: archive(f, masks=np.ones((4, 11), bool)),
        "whole numbers": lambda f: archive(f, train_logits=np.ones((4, 12, 3), int)),
        "one class": lambda f: archive(
            f, train_logits=np.ones((4, 12, 1)), validation_logits=np.ones((4, 5, 1)),
            test_logits=np.ones((4, 4, 1)),
        ),
        "no models": lambda f: archive(
            f, masks=np.ones((0, 12), bool), train_logits=np.ones((0, 12, 3)),
            validation_logits=np.ones((0, 5, 3)), test_logits=np.ones((0, 4, 3)),
        ),
        "NaN": lambda f: archive(f, train_logits=np.full((4, 12, 3), np.nan)),
        "infinite": lambda f: archive(f, validation_logits=np.full((4, 7, 3), np.inf)),
        "other data": lambda f: archive(f, test_logits=np.ones((4, 5, 3))),
        "other classes": lambda f: archive(f, test_logits=np.ones((4, 4, 2))),
        "a pipe": os.mkfifo,
    }.values(),
)  # fmt: skip
def test_logits_that_are_none_are_refused_in_one_line(tmp_path: Path, spoil) -> None:
    file = tmp_path / "logits.npz"
    spoil(file)
    with pytest.raises(InputError, match=f"^logits={file}: cannot be read") as caught:
        Ensemble.load(file, DATA)
    assert "\n" not in str(caught.value)


def test_a_bomb_of_an_archive_takes_no_memory(tmp_path: Path) -> None:
    """A compressed gigabyte of zeros is a megabyte; its header claims a petabyte more."""
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (1 << 48,)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(tmp_path / "logits.npz", "w") as file:
        for name in ("masks", "train_logits", "validation_logits", "test_logits"):
            file.writestr(f"{name}.npy", header.getvalue() + bytes(100))
    with pytest.raises(InputError, match="^logits="):
        Ensemble.load(tmp_path / "logits.npz", DATA)


def test_the_joint_prediction_is_the_mean_of_probabilities(tmp_path: Path) -> None:
    data = toy_data(tmp_path, n_train=4, n_other=3)
    joint = made(np.ones((5, 4), dtype=bool), classes=2, n_validation=3)
    labels = data.labels("validation")
    odds = np.exp(joint.validation_logits.astype(float))
    mean = (odds / odds.sum(axis=2, keepdims=True)).mean(axis=0)
    metrics = joint.metrics(data)
    right = mean[np.arange(3), labels]
    assert metrics["ensemble_validation_log_loss"] == pytest.approx(-np.log(right).mean())
    assert metrics["ensemble_validation_accuracy"] == pytest.approx(np.mean(right > 0.5))
    each = [(logits.argmax(axis=1) == labels).mean() for logits in joint.validation_logits]
    assert metrics["validation_accuracy_mean"] == pytest.approx(np.mean(each))


def test_an_ensemble_that_is_certain_has_finite_losses_and_probabilities() -> None:
    logits = np.array([[[1e4, 0], [0, 1e4]]], np.float32)
    joint = Ensemble(np.array([[False, False]]), logits, logits, logits)
    assert joint.loss("train", np.array([0, 0])).tolist() == [0, 1e4]
    assert joint.loss("validation", np.array([1, 1])).tolist() == [1e4, 0]
    assert joint.probabilities("train").tolist() == [[1, 0], [0, 1]]
    assert label_quality(np.array([0, 0]), joint.probabilities("train")).tolist() == [1, 0]
