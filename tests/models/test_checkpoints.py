"""The checkpoints of the finetune stage: which examples each sees, and which are trained again."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.models import checkpoints, classifier
from attribution.models.checkpoints import (
    Checkpoint,
    Finetuned,
    finetune,
    subset_masks,
    train_checkpoints,
)
from attribution.models.predict import predict
from attribution.models.train import train
from attribution.reporting import finetune_record
from attribution.runtime.hashing import derive_seed

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


# Checkpoints on disk


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> tuple[Config, ImageData, np.ndarray]:
    data = toy_data(tmp_path_factory.mktemp("data"), n_train=24, n_other=6)
    return toy_config(epochs=1), data, subset_masks(24, 3, 0.5, 0)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The names of the folders that were really trained, told by their seed."""
    names: list[str] = []
    original = checkpoints._train_checkpoint

    def counting(config, data, seed, keep, notes):
        seeds = [checkpoints.derive_seed(config.seed, "checkpoint", m) for m in range(9)]
        names.append(f"{seeds.index(seed):03d}")
        return original(config, data, seed, keep, notes)

    monkeypatch.setattr(checkpoints, "_train_checkpoint", counting)
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
        assert a.logits["train"].tobytes() == b.logits["train"].tobytes()
        assert a.logits["validation"].tobytes() == b.logits["validation"].tobytes()
        assert a.history == b.history


@pytest.mark.parametrize(
    "damage",
    {
        "logits cut off": lambda f: (f / "logits.npz").write_bytes(b"PK"),
        "logits missing": lambda f: (f / "logits.npz").unlink(),
        "logits of NaN": lambda f: np.savez(
            f / "logits.npz", train=np.full((24, 2), np.nan), validation=np.zeros((6, 2)),
            test=np.zeros((6, 2)),
        ),
        "logits of other data": lambda f: np.savez(
            f / "logits.npz", train=np.zeros((23, 2)), validation=np.zeros((6, 2)),
            test=np.zeros((6, 2)),
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
        assert a.logits["train"].tobytes() == b.logits["train"].tobytes()


def test_nothing_but_the_checkpoints_is_left_in_the_work_folder(setting, tmp_path: Path) -> None:
    train_checkpoints(*setting, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "001", "002"]


def test_a_run_that_is_cut_off_leaves_no_checkpoint_that_looks_finished(
    setting, tmp_path: Path, monkeypatch
) -> None:
    def cut_off(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "predict", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_checkpoints(*setting, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]


def test_the_saved_model_says_what_its_checkpoint_says(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    checkpoint = train_checkpoints(config, data, masks[:1], tmp_path)[0]
    model = classifier.load(checkpoint.folder)
    for split in ("train", "validation"):
        saved = checkpoint.logits[split]
        # Not bit for bit: a loaded model's weights lie in memory in another order.
        np.testing.assert_allclose(predict(config, model, data, split), saved, atol=1e-6)


def test_settings_and_data_sent_to_another_process_train_the_same(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    (here,) = train_checkpoints(config, data, masks[:1], tmp_path)
    shutil.rmtree(tmp_path / "000")
    (there,) = train_checkpoints(*pickle.loads(pickle.dumps((config, data, masks[:1]))), tmp_path)
    assert here.logits["train"].tobytes() == there.logits["train"].tobytes()


def test_checkpoints_differ_from_one_another(setting, tmp_path: Path) -> None:
    config, data, masks = setting
    first, second = train_checkpoints(config, data, np.ones_like(masks[:2]), tmp_path)
    assert (first.logits["train"] != second.logits["train"]).any()


# Epochs of a run as checkpoints


def weights(checkpoint: Checkpoint) -> bytes:
    return (checkpoint.folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def worsening(tmp_path_factory) -> ImageData:
    """The labels of its validation split are swapped, so that training makes it worse."""
    data = toy_data(tmp_path_factory.mktemp("data"), n_train=24, n_other=6)
    is_swapped = data.examples["split"] == "validation"
    label = data.examples["label"].where(~is_swapped, 1 - data.examples["label"])
    return dataclasses.replace(data, examples=data.examples.assign(label=label))


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"epochs": 4, "checkpoint_epochs": "3,1"}, [1, 3]),
        ({"epochs": 4, "checkpoint_epochs": "last:2"}, [3, 4]),
        ({"epochs": 9, "patience": 2, "checkpoint_epochs": "last:2"}, None),
    ],
)
def test_epochs_of_a_run_are_what_it_passes_through_and_leave_it_as_it_was(
    worsening, tmp_path: Path, given, numbers
) -> None:
    """Early stopping keeps an earlier epoch; the last two are those that were really run."""
    config, keep = toy_config(**given), np.ones((1, 24), bool)
    plain = dataclasses.replace(config, checkpoint_epochs="")
    (alone,) = train_checkpoints(plain, worsening, keep, tmp_path / "alone")
    (run,) = train_checkpoints(config, worsening, keep, tmp_path / "epochs")
    assert weights(run) == weights(alone) and alone.epochs == ()
    assert (
        run.history == alone.history
        and run.logits["test"].tobytes() == alone.logits["test"].tobytes()
    )
    ran = len(run.history)
    if numbers is None:
        assert ran < 9 and weights(run) not in map(weights, run.epochs)
        numbers = [ran - 1, ran]
        tags = finetune_record.origins(config, Finetuned.of(keep, [run]))
        assert [each["best_epoch"] for each in tags] == [f"{ran - 2}"] * 2
    elif ran in numbers:
        assert weights(run.epochs[-1]) == weights(run)
    passed = []
    seed = derive_seed(config.seed, "checkpoint", 0)
    train(plain, worsening, seed, keep[0], lambda _, model: passed.append(copy.deepcopy(model)))
    assert [len(each.history) for each in run.epochs] == numbers
    for number, each in zip(numbers, run.epochs, strict=True):
        for split in SPLITS:
            expected = predict(plain, passed[number - 1], worsening, split)
            np.testing.assert_array_equal(each.logits[split], expected)
        kept = classifier.load(each.folder).state_dict()
        assert all((kept[k] == v).all() for k, v in passed[number - 1].state_dict().items())


def test_checkpoints_stand_run_by_run_and_by_epoch_and_share_their_runs_examples(
    setting, tmp_path: Path, trained: list[str]
) -> None:
    given = {"epochs": 11, "num_models": 2, "subset_fraction": 0.5, "checkpoint_epochs": "10,9"}
    config, data = toy_config(**given), setting[1]
    found = finetune(config, data, tmp_path)
    names = [str(folder.relative_to(tmp_path)) for folder in found.folders]
    assert names == [f"{r}/epochs/{e}/model" for r in ("000", "001") for e in (9, 10)]
    masks = subset_masks(24, 2, 0.5, 0)
    np.testing.assert_array_equal(found.members.masks, masks[[0, 0, 1, 1]])
    tags = finetune_record.origins(config, found)
    expected = [("0", "9"), ("0", "10"), ("1", "9"), ("1", "10")]
    assert [(each["training_run"], each["epoch"]) for each in tags] == expected
    shutil.rmtree(tmp_path / "001" / "epochs" / "9")
    again = finetune(config, data, tmp_path)
    assert trained == ["000", "001", "001"]
    np.testing.assert_array_equal(again.members.train_logits, found.members.train_logits)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"checkpoint_epochs": "1,3"}, "beyond the 2 epochs of a run"),
        ({"checkpoint_epochs": "last:3"}, "beyond the 2 epochs of a run"),
        ({"checkpoint_epochs": "5", "epochs": 9, "patience": 3}, "beyond the 4 .* with patience=3"),
    ],
)
def test_epochs_that_a_run_may_not_reach_are_refused(setting, given, says, capsys) -> None:
    with pytest.raises(
        InputError, match=f"^checkpoint_epochs={given['checkpoint_epochs']}: .*{says}"
    ):
        checkpoints.check(toy_config(**given), setting[1])
    highest = {"checkpoint_epochs": "last:4", "epochs": 9, "patience": 3}
    checkpoints.check(toy_config(**highest), setting[1])
    assert "patience=3 keeps the best epoch of every retraining" in capsys.readouterr().err


# The result of the stage


def test_the_result_of_finetuning_is_that_of_its_checkpoints(setting, tmp_path: Path) -> None:
    config, data, _ = setting
    found = finetune(toy_config(epochs=1, num_models=3, subset_fraction=0.5), data, tmp_path)
    assert found.folders == [tmp_path / name / "model" for name in ("000", "001", "002")]
    np.testing.assert_array_equal(found.members.masks, subset_masks(24, 3, 0.5, 0))
    assert [len(run.history) for run in found.runs] == [1, 1, 1]
    for m, folder in enumerate(found.folders):
        logits = predict(config, classifier.load(folder), data, "train")
        np.testing.assert_allclose(found.members.train_logits[m], logits, atol=1e-6)


def test_what_cannot_be_trained_is_refused_before_training(setting) -> None:
    _, data, _ = setting
    checkpoints.check(toy_config(), data)
    with pytest.raises(InputError, match="^image_size=1: "):
        checkpoints.check(toy_config(image_size=1), data)
    with pytest.raises(InputError, match="^subset_fraction=0.05: .* use 0.084 or more"):
        checkpoints.check(toy_config(subset_fraction=0.05), data)
