"""The checkpoints: which examples each sees, picking up finished ones, and their joint loss."""

from __future__ import annotations

import io
import math
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import classifier, ensemble
from attribution.models.ensemble import Ensemble, label_quality, subset_masks, train_checkpoints
from attribution.models.predict import predict

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = st.integers(2, 200)
FRACTIONS = st.floats(0.05, 1)


@given(SIZES, st.integers(1, 8), FRACTIONS, st.integers(0, 10))
def test_every_checkpoint_sees_its_share(n, num_models, fraction, seed) -> None:
    masks = subset_masks(n, num_models, fraction, seed)
    assert masks.shape == (num_models, n) and masks.dtype == bool
    (seen,) = set(masks.sum(axis=1).tolist())
    assert seen == 1 or abs(seen - fraction * n) < 1


@given(SIZES, st.integers(1, 8), FRACTIONS, st.integers(0, 10))
def test_the_same_seed_draws_the_same_masks(n, num_models, fraction, seed) -> None:
    first = subset_masks(n, num_models, fraction, seed)
    np.testing.assert_array_equal(first, subset_masks(n, num_models, fraction, seed))


def test_another_seed_draws_other_masks() -> None:
    assert (subset_masks(100, 4, 0.5, 0) != subset_masks(100, 4, 0.5, 1)).any()


@given(SIZES, st.integers(1, 6), st.integers(0, 5), FRACTIONS)
def test_more_checkpoints_leave_the_first_ones_as_they_were(n, few, more, fraction) -> None:
    many = subset_masks(n, few + more, fraction, 0)
    np.testing.assert_array_equal(many[:few], subset_masks(n, few, fraction, 0))


@given(st.integers(1, 100), st.integers(1, 4))
def test_at_one_half_consecutive_checkpoints_are_complementary(half, pairs) -> None:
    masks = subset_masks(2 * half, 2 * pairs, 0.5, 0)
    np.testing.assert_array_equal(masks[::2], ~masks[1::2])


def test_different_pairs_draw_different_halves() -> None:
    masks = subset_masks(100, 4, 0.5, 0)
    assert (masks[0] != masks[2]).any() and (masks[0] != masks[3]).any()


@given(st.integers(2, 10), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_every_example_is_left_out_equally_often_by_whole_rounds_of_folds(
    folds, fold_size, rounds, seed
) -> None:
    n = folds * fold_size
    masks = subset_masks(n, folds * rounds, 1 - 1 / folds, seed)
    assert set((~masks).sum(axis=0)) == {rounds}


@given(st.integers(3, 300), st.floats(0.05, 0.95))
def test_one_round_of_folds_leaves_every_example_out(n, fraction) -> None:
    left_out = int((~subset_masks(n, 1, fraction, 0)).sum())
    if left_out:
        masks = subset_masks(n, math.ceil(n / left_out), fraction, 0)
        assert not masks.all(axis=0).any()


@pytest.mark.parametrize("n", [101, 103, 1001, 1003])
def test_two_halves_of_an_odd_number_leave_every_example_out(n: int) -> None:
    masks = subset_masks(n, 2, 0.5, 0)
    assert not masks.all(axis=0).any()
    assert (~masks).all(axis=0).sum() <= 1


def test_with_fraction_one_every_checkpoint_sees_everything() -> None:
    assert subset_masks(37, 5, 1.0, 0).all()


# What all checkpoints say together


def made(masks: np.ndarray, classes: int = 3, n_validation: int = 7) -> Ensemble:
    rng = np.random.default_rng(0)
    m, n = masks.shape
    return Ensemble(
        masks,
        rng.normal(0, 3, (m, n, classes)).astype(np.float32),
        rng.normal(0, 3, (m, n_validation, classes)).astype(np.float32),
    )


def loss_by_loops(logits: np.ndarray, label: int) -> float:
    values = [float(v) for v in logits]
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values)) - values[label]


def test_train_loss_is_the_mean_over_checkpoints_that_did_not_see_the_example() -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    labels = np.arange(12) % 3
    for i, found in enumerate(joint.train_loss(labels)):
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
    np.testing.assert_allclose(joint.train_loss(labels), expected)
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
    found = joint.train_probabilities()
    for i in range(12):
        rows = [
            [math.exp(-loss_by_loops(joint.train_logits[m, i], label)) for label in range(3)]
            for m in range(len(masks))
            if counted[m, i]
        ]
        np.testing.assert_allclose(found[i], np.mean(rows, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_label_quality_is_the_probability_of_the_given_label() -> None:
    probabilities = made(MASKS["each left out by some"]).train_probabilities()
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


def test_validation_loss_is_the_mean_over_checkpoints() -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    labels = np.arange(7) % 3
    expected = [
        np.mean([loss_by_loops(joint.validation_logits[m, j], labels[j]) for m in range(4)])
        for j in range(7)
    ]
    np.testing.assert_allclose(joint.validation_loss(labels), expected)


def test_an_ensemble_kept_as_an_archive_is_loaded_as_it_was(tmp_path: Path) -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    np.savez(tmp_path / "logits.npz", **joint.arrays())
    loaded = Ensemble.load(tmp_path / "logits.npz")
    for name, array in joint.arrays().items():
        found = getattr(loaded, name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def archive(file: Path, **changes) -> Path:
    """An ensemble's archive of 4 models, 12 and 5 examples and 3 classes, with other arrays."""
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
            f, train_logits=np.ones((4, 12, 1)), validation_logits=np.ones((4, 5, 1))
        ),
        "no models": lambda f: archive(
            f, masks=np.ones((0, 12), bool), train_logits=np.ones((0, 12, 3)),
            validation_logits=np.ones((0, 5, 3)),
        ),
        "NaN": lambda f: archive(f, train_logits=np.full((4, 12, 3), np.nan)),
        "infinite": lambda f: archive(f, validation_logits=np.full((4, 5, 3), np.inf)),
        "a pipe": os.mkfifo,
    }.values(),
)  # fmt: skip
def test_logits_that_are_none_are_refused_in_one_line(tmp_path: Path, spoil) -> None:
    file = tmp_path / "logits.npz"
    spoil(file)
    with pytest.raises(InputError, match=f"^logits={file}: cannot be read") as caught:
        Ensemble.load(file)
    assert "\n" not in str(caught.value)


def test_a_bomb_of_an_archive_takes_no_memory(tmp_path: Path) -> None:
    """A compressed gigabyte of zeros is a megabyte; its header claims a petabyte more."""
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (1 << 48,)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(tmp_path / "logits.npz", "w") as file:
        for name in ("masks", "train_logits", "validation_logits"):
            file.writestr(f"{name}.npy", header.getvalue() + bytes(100))
    with pytest.raises(InputError, match="^logits="):
        Ensemble.load(tmp_path / "logits.npz")


def test_labels_of_other_data_are_refused() -> None:
    joint = made(subset_masks(12, 4, 0.5, 0))
    for labels in (np.zeros(11, int), np.full(12, 7)):
        with pytest.raises(InputError, match="^logits: are of 12 examples and 3 classes"):
            joint.train_loss(labels)
    with pytest.raises(InputError, match="^logits: are of"):
        joint.validation_loss(np.zeros(12, int))


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


# Checkpoints on disk


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> tuple[Config, ImageData, np.ndarray]:
    data = toy_data(tmp_path_factory.mktemp("data"), n_train=24, n_other=6)
    return toy_config(epochs=1), data, subset_masks(24, 3, 0.5, 0)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The names of the folders that were really trained, told by their seed."""
    names: list[str] = []
    original = ensemble._train_checkpoint

    def counting(config, data, seed, keep):
        seeds = [ensemble.derive_seed(config.seed, "checkpoint", m) for m in range(9)]
        names.append(f"{seeds.index(seed):03d}")
        return original(config, data, seed, keep)

    monkeypatch.setattr(ensemble, "_train_checkpoint", counting)
    return names


def test_finished_checkpoints_are_picked_up_and_a_missing_one_is_trained_the_same(
    setting, tmp_path: Path, trained: list[str]
) -> None:
    first = train_checkpoints(*setting, tmp_path)
    assert trained == ["000", "001", "002"]
    shutil.rmtree(tmp_path / "001")
    second = train_checkpoints(*setting, tmp_path)
    assert trained[3:] == ["001"]
    for a, b in zip(first, second):
        assert a.train_logits.tobytes() == b.train_logits.tobytes()
        assert a.validation_logits.tobytes() == b.validation_logits.tobytes()
        assert a.history == b.history


@pytest.mark.parametrize(
    "damage",
    {
        "logits cut off": lambda f: (f / "logits.npz").write_bytes(b"PK"),
        "logits missing": lambda f: (f / "logits.npz").unlink(),
        "logits of NaN": lambda f: np.savez(
            f / "logits.npz", train=np.full((24, 2), np.nan), validation=np.zeros((6, 2))
        ),
        "logits of other data": lambda f: np.savez(
            f / "logits.npz", train=np.zeros((23, 2)), validation=np.zeros((6, 2))
        ),
        "history": lambda f: (f / "history.json").write_text("["),
        "weights": lambda f: (f / "model" / "model.safetensors").write_bytes(b""),
    }.values(),
)  # fmt: skip
def test_a_damaged_checkpoint_is_trained_again(
    setting, tmp_path: Path, trained: list[str], damage
) -> None:
    config, data, masks = setting
    first = train_checkpoints(config, data, masks[:2], tmp_path)
    damage(tmp_path / "001")
    second = train_checkpoints(config, data, masks[:2], tmp_path)
    assert trained[2:] == ["001"]
    for a, b in zip(first, second):
        assert a.train_logits.tobytes() == b.train_logits.tobytes()


def test_nothing_but_the_checkpoints_is_left_in_the_work_folder(setting, tmp_path: Path) -> None:
    train_checkpoints(*setting, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "001", "002"]


def test_a_run_that_is_cut_off_leaves_no_checkpoint_that_looks_finished(
    setting, tmp_path: Path, monkeypatch
) -> None:
    def cut_off(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ensemble, "predict", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_checkpoints(*setting, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]


def test_the_saved_model_says_what_its_checkpoint_says(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    checkpoint = train_checkpoints(config, data, masks[:1], tmp_path)[0]
    model = classifier.load(checkpoint.folder)
    for split in ("train", "validation"):
        saved = getattr(checkpoint, f"{split}_logits")
        # Not bit for bit: a loaded model's weights lie in memory in another order.
        np.testing.assert_allclose(predict(config, model, data, split), saved, atol=1e-6)


def test_settings_and_data_sent_to_another_process_train_the_same(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    (here,) = train_checkpoints(config, data, masks[:1], tmp_path)
    shutil.rmtree(tmp_path / "000")
    (there,) = train_checkpoints(*pickle.loads(pickle.dumps((config, data, masks[:1]))), tmp_path)
    assert here.train_logits.tobytes() == there.train_logits.tobytes()


def test_checkpoints_differ_from_one_another(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    first, second = train_checkpoints(config, data, np.ones_like(masks[:2]), tmp_path)
    assert (first.train_logits != second.train_logits).any()


def test_an_ensemble_stacks_its_checkpoints_in_order(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    checkpoints = train_checkpoints(config, data, masks, tmp_path)
    joint = Ensemble.of(masks, checkpoints)
    assert joint.train_logits.shape == (3, 24, 2) and joint.validation_logits.shape == (3, 6, 2)
    np.testing.assert_array_equal(joint.train_logits[2], checkpoints[2].train_logits)
