"""The bank of retrained subset models, and the figures that are read off it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from toy import toy_config, toy_data

from attribution.experiments.statistics import lds, noise_ceiling
from attribution.experiments.subset_bank import build_bank
from attribution.models import retrain as retraining
from attribution.models.predict import margins, predict
from attribution.models.train import train_stacked
from attribution.runtime.hashing import derive_seed

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


@pytest.mark.parametrize("bad", [np.nan, np.inf, "shape", "type", "cut off"])
def test_a_retraining_that_cannot_be_one_is_trained_again(tmp_path: Path, bad) -> None:
    data, config = toy_data(tmp_path / "data", n_train=20, n_other=6), toy_config(epochs=1)
    first = build_bank(config, data, 1, 1, 0.5, tmp_path / "work")
    (file,) = (tmp_path / "work").glob("*.npz")
    logits = np.load(file)["logits"]
    other = {"shape": logits[:, 1:], "type": logits.astype(np.float64)}
    if bad == "cut off":
        file.write_bytes(file.read_bytes()[:90])
    else:
        np.savez(file, logits=other[bad] if bad in other else np.full_like(logits, bad))
    again = build_bank(config, data, 1, 1, 0.5, tmp_path / "work")
    assert again.margins.tobytes() == first.margins.tobytes()


def test_lds_is_spearmans_correlation_of_summed_scores_with_margins() -> None:
    rng = np.random.default_rng(0)
    values, masks = rng.normal(size=(30, 4)), rng.random((12, 30)) < 0.5
    actual = rng.normal(size=(12, 4)).round(1)  # with ties
    expected = [
        stats.spearmanr([values[mask, j].sum() for mask in masks], actual[:, j]).statistic
        for j in range(4)
    ]
    np.testing.assert_allclose(lds(values, masks, actual), expected, atol=1e-12)


def test_scores_that_generate_the_margins_have_an_lds_of_one() -> None:
    rng = np.random.default_rng(1)
    values, masks = rng.normal(size=(30, 4)), rng.random((12, 30)) < 0.5
    assert lds(values, masks, masks @ values).tolist() == [1, 1, 1, 1]
    assert lds(-values, masks, masks @ values).tolist() == [-1, -1, -1, -1]


def test_the_noise_ceiling_is_what_perfect_knowledge_reaches() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(400, 1, 20))
    measured = truth + rng.normal(size=(400, 3, 20))
    reached = [stats.spearmanr(truth[:, 0, j], measured.mean(1)[:, j]).statistic for j in range(20)]
    assert np.mean(noise_ceiling(measured)) == pytest.approx(np.mean(reached), abs=0.02)
    assert np.mean(noise_ceiling(rng.normal(size=(400, 3, 20)))) < 0.25
