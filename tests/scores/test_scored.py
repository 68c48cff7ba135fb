"""The result of the trak stage: what is computed, written, read again and resumed."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from toy import toy_config

from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.models.ensemble import Ensemble
from attribution.runtime import safe_files
from attribution.scores import artifact, features
from attribution.scores import scored as scored_module
from attribution.scores.scored import Scored, score_training_set
from attribution.scores.stored_features import load_features
from attribution.scores.trak import predicted_margins

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGIN = {"fingerprint": "abc", "finetune_run_id": "0123", "estimator_version": 5}


def configured(**given):
    return toy_config(num_models=2, proj_dim=16, num_blocks=2, lambda_reg=0.1, **given)


@pytest.fixture(scope="module")
def scored(ensemble, tmp_path_factory) -> Scored:
    data, finetuned = ensemble
    work = tmp_path_factory.mktemp("work")
    return score_training_set(configured(), data, finetuned, work, ORIGIN)


def test_the_tables_say_what_the_ensemble_says(ensemble, scored) -> None:
    data, finetuned = ensemble
    train, targets = scored.scores.train, scored.scores.targets
    members, labels = finetuned.members, data.labels("train")
    assert scored.scores.values.shape == (32, 16) == (len(train), len(targets))
    np.testing.assert_array_equal(train["loss"], members.loss("train", labels))
    np.testing.assert_array_equal(
        targets["loss"], members.loss("validation", data.labels("validation"))
    )
    probabilities = members.probabilities("train")
    np.testing.assert_array_equal(train["predicted_label"], probabilities.argmax(1))
    # Alignment: the mean score by class, classes weighted by exp of their mean loss.
    by_class = [(targets["label"] == label).to_numpy() for label in (0, 1)]
    weights = np.exp([targets["loss"][own].mean() for own in by_class])
    means = np.stack([scored.scores.values[:, own].mean(1) for own in by_class])
    np.testing.assert_allclose(train["alignment"], weights @ means / weights.sum(), rtol=1e-5)
    assert scored.scores.metadata["finetune_run_id"] == "0123"
    assert scored.scores.metadata["estimator"]["num_models"] == 2


def test_scores_and_stored_features_are_in_the_margins_that_the_checkpoints_have(
    ensemble, scored, tmp_path
) -> None:
    """Four checkpoints whose margins move three times as far as the scores predict."""
    assert scored.scores.metadata["calibration"] is None  # of two checkpoints
    data, finetuned = ensemble
    values, own = scored.scores.values, finetuned.members
    masks = np.random.default_rng(0).random((4, 32)) < 0.5
    margins = 3 * masks @ values.astype(float)
    sign = np.where(data.labels("validation") == 1, 1, -1)
    logits = np.stack([np.zeros_like(margins), sign * margins], axis=2).astype(np.float32)
    members = Ensemble(masks, np.tile(own.train_logits, (2, 1, 1)), logits, logits)
    finetuned = replace(finetuned, members=members, folders=2 * finetuned.folders)
    found = score_training_set(configured(keep_features="yes"), data, finetuned, tmp_path, ORIGIN)
    one = predicted_margins(configured(), list(found.stores), np.eye(32, dtype=bool))
    scale = found.scores.metadata["calibration"]["scale"]
    np.testing.assert_allclose(found.scores.values, scale * one, rtol=1e-3, atol=1e-5)
    slope = np.polyfit((masks @ found.scores.values).ravel(), margins.ravel(), 1)[0]
    assert 0.5 < slope < 2  # the four features are random projections anew
    stored = found.features.scores([np.concatenate(s.features("validation")) for s in found.stores])
    bound = 2e-3 * np.abs(found.scores.values).max()
    np.testing.assert_allclose(stored, found.scores.values, rtol=0, atol=bound)


def test_the_epochs_of_a_run_count_as_one_where_scores_get_their_unit(
    ensemble, monkeypatch
) -> None:
    """The slope is that over all checkpoints; its interval and least number are those of runs."""
    data, _ = ensemble
    rng, sign = np.random.default_rng(0), np.where(data.labels("validation") == 1, 1, -1)
    masks, values = rng.random((4, 32)) < 0.5, rng.normal(size=(32, 16))
    monkeypatch.setattr(scored_module, "predicted_margins", lambda config, stores, m: m @ values)
    margins = 3 * np.repeat(masks @ values, 3, axis=0) + rng.normal(size=(12, 16))
    logits = np.stack([np.zeros_like(margins), sign * margins], axis=2)
    members = Ensemble(np.repeat(masks, 3, axis=0), logits, logits, logits)

    def slope(runs: list[int]) -> float:
        rows = np.isin(np.repeat(np.arange(4), 3), runs)
        x, y = members.masks[rows] @ values, margins[rows]
        return np.polyfit((x - x.mean(0)).ravel(), (y - y.mean(0)).ravel(), 1)[0]

    config = toy_config(num_models=4, checkpoint_epochs="last:3", epochs=3)
    found = scored_module._calibrate(config, data, members, [])
    assert found.num_checkpoints == 4 and found.scale == pytest.approx(slope([0, 1, 2, 3]))
    without = [slope([r for r in range(4) if r != left_out]) for left_out in range(4)]
    error = np.sqrt(3 / 4 * np.square(without - np.mean(without)).sum())
    assert found.high - found.scale == pytest.approx(stats.t.ppf(0.975, 3) * error)
    two = Ensemble(*(array[:6] for array in members.arrays().values()))
    assert scored_module._calibrate(config, data, two, []) is None


def test_that_few_runs_give_no_unit_is_said_before_training(ensemble, capsys) -> None:
    scored_module.check(configured(checkpoint_epochs="last:2"), ensemble[0])
    assert "checkpoint_epochs=last:2: the scores will have no unit" in capsys.readouterr().err


def test_metrics_and_rankings(scored) -> None:
    train, metrics = scored.scores.train, scored.metrics()
    assert metrics["seconds"] > 0
    per_gradient = metrics["milliseconds_per_gradient"] * 2 * (32 + 16)
    assert per_gradient == pytest.approx(1000 * metrics["seconds"])
    assert metrics["share_negative_alignment"] == (train["alignment"] < 0).sum() / 32
    rankings = scored.rankings()
    assert list(rankings) == ["trust", "alignment", "label_quality", "loss", "self_influence"]
    for name, values in rankings.items():
        sign = -1 if name in ("loss", "self_influence") else 1
        np.testing.assert_array_equal(values, sign * train[name])


def test_the_artifacts_are_read_as_they_are_in_hand_and_hashed_once(scored, tmp_path) -> None:
    hashed = []
    with patch.object(
        artifact, "sha256", lambda file: hashed.append(file.name) or safe_files.sha256(file)
    ):
        scored.write(tmp_path)
    assert sorted(hashed) == ["scores.npy", "targets.parquet", "train.parquet"]
    assert {path.name for path in tmp_path.iterdir()} == {"scores"}
    scored.suspects.to_csv(tmp_path / "suspects.csv", index=False)
    loaded = Scored.load(tmp_path / "scores", tmp_path / "suspects.csv")
    np.testing.assert_array_equal(scored.scores.values, loaded.scores.values)
    pd.testing.assert_frame_equal(scored.scores.train, loaded.scores.train)
    pd.testing.assert_frame_equal(scored.scores.targets, loaded.scores.targets)
    assert loaded.scores.metadata.items() >= scored.scores.metadata.items() >= ORIGIN.items()
    pd.testing.assert_frame_equal(loaded.suspects, scored.suspects, check_dtype=False)


def test_features_that_were_just_stored_are_what_is_read_of_them(scored) -> None:
    assert load_features(scored.features.folder) == scored.features


def test_features_are_left_out_where_they_are_not_wanted(ensemble, tmp_path) -> None:
    data, finetuned = ensemble
    found = score_training_set(configured(keep_features="no"), data, finetuned, tmp_path, ORIGIN)
    assert found.features is None and not (tmp_path / "stored").exists()


def test_a_second_call_goes_on_from_the_first(ensemble, scored) -> None:
    data, finetuned = ensemble
    with patch.object(features, "_featurize", side_effect=AssertionError):
        again = score_training_set(configured(), data, finetuned, scored.matrix.parent, ORIGIN)
    np.testing.assert_array_equal(again.scores.values, scored.scores.values)
    pd.testing.assert_frame_equal(again.scores.train, scored.scores.train)


def test_losses_in_sample_are_said_and_trust_is_the_unweighted_alignment(
    ensemble, tmp_path, capsys
) -> None:
    data, finetuned = ensemble
    seen = np.ones_like(finetuned.members.masks)
    finetuned = replace(finetuned, members=replace(finetuned.members, masks=seen))
    found = score_training_set(configured(), data, finetuned, tmp_path, ORIGIN)
    assert "losses are in-sample" in capsys.readouterr().err
    assert found.scores.metadata["loss_is_out_of_sample"] is False
    train = found.scores.train
    np.testing.assert_allclose(train["trust"] * train["row_weight"], train["alignment"], rtol=1e-6)


def test_features_longer_than_the_training_set_are_refused_at_once(ensemble, tmp_path) -> None:
    data, finetuned = ensemble
    config = toy_config(num_models=2, proj_dim=33, lambda_reg=0)
    with pytest.raises(InputError, match="^proj_dim=33"):
        score_training_set(config, data, finetuned, tmp_path, ORIGIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_out_of_sample", [True, False])
def test_suspects_rest_on_cross_fitting_and_on_checkpoints_that_did_not_see_them(
    ensemble, tmp_path, is_out_of_sample, monkeypatch
) -> None:
    """Half and half; the tables, which arms read, are those of the checkpoints alone."""
    data, finetuned = ensemble
    if not is_out_of_sample:
        masks = np.ones_like(finetuned.members.masks)
        finetuned = replace(finetuned, members=replace(finetuned.members, masks=masks))
    plain = score_training_set(configured(), data, finetuned, tmp_path / "plain", ORIGIN)
    logits = np.random.default_rng(0).normal(size=(3, 64, 2)).astype(np.float32)
    examined, members = [], finetuned.members
    monkeypatch.setattr(scored_module, "cross_fit", lambda config, data, work: logits)
    monkeypatch.setattr(
        scored_module, "suspects", lambda *a, **k: examined.append((a, k)) or plain.suspects
    )
    found = score_training_set(
        configured(cross_fit="yes"), data, finetuned, tmp_path / "crossed", ORIGIN
    )
    pd.testing.assert_frame_equal(found.scores.train, plain.scores.train)
    [((_, table, probabilities), asked)] = examined
    assert asked == {"by_loss": True}
    splits = SPLITS if is_out_of_sample else SPLITS[:1]
    labels = np.concatenate([data.labels(split) for split in splits])
    n, rows = len(labels), range(len(labels))
    each = np.exp(logits[:, :n]) / np.exp(logits[:, :n]).sum(axis=2, keepdims=True)
    loss, crossed = -np.log(each[:, rows, labels]).mean(axis=0), each.mean(axis=0)
    if is_out_of_sample:
        loss = (loss + np.concatenate([members.loss(s, data.labels(s)) for s in splits])) / 2
        crossed = (crossed + np.concatenate([members.probabilities(s) for s in splits])) / 2
    np.testing.assert_allclose(table["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(probabilities, crossed, rtol=1e-5)
    np.testing.assert_array_equal(table["predicted_label"], crossed.argmax(1))
    metrics = found.metrics()
    assert metrics["suspects_examined"] == n
    right = (logits[:, :n].argmax(2) == labels).mean()
    assert metrics["suspects_cross_fit_accuracy"] == pytest.approx(right)


def test_cross_fitting_is_refused_where_checkpoints_are_given(ensemble) -> None:
    config = configured(cross_fit="yes", checkpoints="folder")
    with pytest.raises(InputError, match="^cross_fit=yes: .*checkpoints"):
        scored_module.check(config, ensemble[0])
