"""The bank of models retrained on subsets: what it holds, and what is refused when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from toy import toy_config, toy_data

from attribution.errors import InputError
from attribution.experiments.subset_bank import build_bank, load_bank
from attribution.models import retrain as retraining
from attribution.models.predict import margins, predict
from attribution.models.train import train_stacked
from attribution.runtime.hashing import derive_seed
from attribution.tracking.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_margins_are_those_of_models_that_saw_the_subset(tmp_path: Path) -> None:
    data, config = toy_data(tmp_path / "data", n_train=20, n_other=6), toy_config(epochs=1)
    bank = build_bank(config, data, 2, 2, 0.5, tmp_path)
    assert bank.masks.shape == (2, 20)
    assert bank.masks.sum(axis=1).tolist() == [10, 10]
    assert bank.margins.shape == (2, 2, 6)
    seeds = [derive_seed(0, "bank", s, 0) for s in range(2)]
    _, model = train_stacked(config, data, seeds, bank.masks)
    expected = margins(predict(config, model, data, "validation"), data.labels("validation"))
    np.testing.assert_array_equal(bank.margins[1, 0], expected)


def test_a_larger_bank_trains_only_what_is_new(tmp_path: Path, monkeypatch) -> None:
    data, config = toy_data(tmp_path / "data", n_train=20, n_other=6), toy_config(epochs=1)
    monkeypatch.setattr(retraining, "STACK", 2)
    small = build_bank(config, data, 2, 1, 0.5, tmp_path)
    trained, original = [], retraining._retrain
    monkeypatch.setattr(
        retraining, "_retrain", lambda *task: trained.extend(task[2].seeds) or original(*task)
    )
    large = build_bank(config, data, 3, 2, 0.5, tmp_path)
    assert len(trained) == 4
    np.testing.assert_array_equal(large.masks[:2], small.masks)
    np.testing.assert_array_equal(large.margins[:2, :1], small.margins)


# The bank on disk


@pytest.fixture
def kept(tmp_path: Path):
    data, config = toy_data(tmp_path / "data", n_train=20, n_other=6), toy_config(epochs=1)
    bank = build_bank(config, data, 10, 1, 0.5, tmp_path / "work")
    folder = tmp_path / "bank"
    folder.mkdir()
    bank.save(folder, config, data)
    return bank, folder, config, data


def test_a_bank_that_was_saved_is_read_back_whatever_the_seed(kept) -> None:
    bank, folder, config, data = kept
    for seed in (0, 7):
        found = load_bank(str(folder), toy_config(epochs=1, seed=seed), data)
        np.testing.assert_array_equal(found.masks, bank.masks)
        np.testing.assert_array_equal(found.margins, bank.margins)
    spec = json.loads((folder / "spec.json").read_text())
    assert (spec["num_subsets"], spec["num_repeats"], spec["alpha"]) == (10, 1, 0.5)


def test_a_bank_for_something_else_is_refused(kept, tmp_path: Path) -> None:
    _, folder, config, data = kept
    other = toy_data(tmp_path / "other", n_train=22, n_other=6)
    for settings, examples in ((toy_config(epochs=2), data), (config, other)):
        with pytest.raises(InputError, match="^bank=.*was built for other data"):
            load_bank(str(folder), settings, examples)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "masks.npy").unlink(),
        lambda f: (f / "spec.json").write_text("{"),
        lambda f: np.save(f / "masks.npy", np.array([{}], object), allow_pickle=True),
        lambda f: np.save(f / "margins.npy", np.zeros((10, 1, 5))),
        lambda f: np.save(f / "margins.npy", np.full((10, 1, 6), np.nan)),
        lambda f: np.save(f / "masks.npy", np.ones((10, 20))),
        lambda f: np.save(f / "masks.npy", np.full((10, 20), 2, np.uint8).view(bool)),
        lambda f: np.save(f / "masks.npy", np.ones((1, 20), bool)),
        lambda f: np.save(f / "margins.npy", np.zeros((10, 0, 6))),
        lambda f: np.save(f / "margins.npy", np.zeros((10, 1, 6), int)),
        lambda f: (f / "spec.json").write_text("[]"),
        lambda f: (f / "spec.json").write_text("[" * 100_000),
        lambda f: ((f / "spec.json").unlink(), os.mkfifo(f / "spec.json")),
    ],
)
def test_a_damaged_bank_is_refused_in_one_line(kept, damage) -> None:
    _, folder, config, data = kept
    damage(folder)
    with pytest.raises(InputError, match="^bank=") as caught:
        load_bank(str(folder), config, data)
    assert "\n" not in str(caught.value)


def test_another_bank_in_the_same_folder_is_another_input(tmp_path) -> None:
    data, keys = toy_data(tmp_path / "data"), []
    for value in (0.0, 0.0, 1.0):
        for name in ("masks", "margins"):
            np.save(tmp_path / f"{name}.npy", np.full(3, value))
        keys.append(fingerprint("evaluate", toy_config(bank=str(tmp_path)), data))
    assert keys[0] == keys[1] != keys[2]
