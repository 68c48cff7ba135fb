"""Cross-fitting: nobody is predicted by a model that saw it, units stay together, work is resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.models import cross_fit as module
from attribution.models import retrain
from attribution.models.cross_fit import FOLDS, REPEATS, cross_fit, draw_folds

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 99))
def test_every_fold_has_its_share_of_each_class_as_in_sklearn(listed, seed) -> None:
    labels = np.array([*range(4), *listed] * 5)
    folds = draw_folds(labels, np.arange(len(labels)).astype(str), seed, 0)
    ours = pd.crosstab(folds, labels).to_numpy()
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels)
    theirs = np.array([np.bincount(labels[test], minlength=4) for _, test in split])
    np.testing.assert_array_equal(np.sort(ours, axis=0), np.sort(theirs, axis=0))


def test_units_stay_together_and_every_repeat_draws_anew() -> None:
    rng = np.random.default_rng(0)
    units, labels = rng.integers(0, 40, 200).astype(str), rng.integers(0, 3, 200)
    drawn = [draw_folds(labels, units, 0, repeat) for repeat in range(3)]
    for folds in drawn:
        table = pd.DataFrame({"unit": units, "fold": folds})
        assert (table.groupby("unit")["fold"].nunique() == 1).all()
    assert not any(np.array_equal(drawn[0], other) for other in drawn[1:])


def shuffled(data: ImageData, rng: np.random.Generator) -> ImageData:
    """The same images with the splits in disorder, one of them left out."""
    split = rng.permutation(data.examples["split"].to_numpy())
    split[5] = "left out"
    examples = data.examples.assign(split=split)
    return dataclasses.replace(data, examples=examples, fingerprint="shuffled")


def test_each_image_s_logits_are_of_a_model_that_was_trained_without_it(
    tmp_path: Path, monkeypatch
) -> None:
    """Models that tell of each image its row, and whether they saw it."""
    data = shuffled(toy_data(tmp_path / "data", 20, 6), np.random.default_rng(0))
    seen: list[np.ndarray] = []

    def telling(config, pooled, series, split, work, stage):
        rows = pooled.rows(split)
        seen.append(series[0].keep)
        return iter([np.stack([[*zip(rows, keep, strict=True)] for keep in series[0].keep])])

    monkeypatch.setattr(module, "retrained_logits", telling)
    found = cross_fit(toy_config(), data, tmp_path)
    rows = np.concatenate([data.rows(split) for split in SPLITS])
    assert found.shape == (REPEATS, 31, 2) and 5 not in rows
    assert (found[:, :, 0] == rows).all() and not found[:, :, 1].any()
    assert set(seen[0].sum(axis=1)) == {24}  # 31 less 7: equally many, as stacks need


@pytest.mark.slow
def test_random_labels_are_predicted_at_chance_and_true_ones_well(tmp_path: Path) -> None:
    """A model that had seen an image would know its label by heart."""
    data, config = toy_data(tmp_path / "data", 36, 12), toy_config(epochs=6)
    true = data.examples["label"].to_numpy()
    assert (cross_fit(config, data, tmp_path / "true").argmax(2) == true).mean() > 0.9
    labels = np.random.default_rng(1).permutation(true)
    noise = dataclasses.replace(
        data, examples=data.examples.assign(label=labels), fingerprint="noise"
    )
    correct = cross_fit(config, noise, tmp_path / "noise").argmax(2) == labels
    assert correct.mean() < 0.5 + 4 * 0.5 / np.sqrt(60)


def test_what_is_finished_is_not_trained_again(tmp_path: Path, monkeypatch) -> None:
    data, config = toy_data(tmp_path / "data", 20, 5), toy_config(epochs=1, patience=2)
    whole = cross_fit(config, data, tmp_path / "whole")
    original, done = retrain._retrain, []

    def stopping(*args):
        if done:
            raise KeyboardInterrupt
        done.append(len(args[2]))
        return original(*args)

    monkeypatch.setattr(retrain, "_retrain", stopping)
    with pytest.raises(KeyboardInterrupt):
        cross_fit(config, data, tmp_path / "work")
    trained: list[int] = []
    monkeypatch.setattr(retrain, "_retrain", lambda *a: trained.append(len(a[2])) or original(*a))
    np.testing.assert_array_equal(cross_fit(config, data, tmp_path / "work"), whole)
    assert sum(done) and sum(done + trained) == FOLDS * REPEATS


def test_copies_and_images_of_one_value_of_split_by_share_a_unit(tmp_path: Path) -> None:
    data = toy_data(tmp_path, 4, 1)
    ids = ["a" * 16, "a" * 16 + "-1", "b" * 16, "c" * 16, "d" * 16, "d" * 16 + "-1"]
    data = dataclasses.replace(data, examples=data.examples.assign(example_id=ids))
    assert pd.factorize(data.units())[0].tolist() == [0, 0, 1, 2, 3, 3]
    digests = [letter * 40 for letter in "aabcdd"]
    table = pd.DataFrame({"digest": digests, "unit": ["x", "x", "y", "x", "z", "z"]})
    listed = dataclasses.replace(data, listing=SimpleNamespace(table=table))
    assert listed.units().tolist() == ["x", "x", "y", "x", "z", "z"]
