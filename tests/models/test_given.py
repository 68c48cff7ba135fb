"""Checkpoints that were trained elsewhere: which folders are read, what is refused, and what they score."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import MEAN, STD, edit_config, logits, refusal
from places import SMALL, Place, refused
from toy import toy_config, toy_data

from attribution.config import split_list
from attribution.models import classifier, given, model_facts
from attribution.models.checkpoints import finetune
from attribution.models.predict import predict

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("dark", "bright")
IMAGENET = model_facts.IMAGENET_MEAN, model_facts.IMAGENET_STD


def saved(folder: Path, names: tuple[str, ...] = CLASSES, seed: int = 0, size: int = 16) -> Path:
    """A model as save_pretrained leaves it."""
    model = classifier.build("resnet-mini", names, seed)
    classifier.save(model, folder, size, *IMAGENET)
    return folder


def configured(*folders: Path, **more):
    asked = {"checkpoints": ",".join(map(str, folders))}
    return toy_config(**more | given.implied(asked | more, {}))


# Which folders


def test_a_trainers_checkpoints_come_in_order_of_their_numbers(tmp_path: Path) -> None:
    steps = [saved(tmp_path / "out" / f"checkpoint-{step}") for step in (9, 10, 100)]
    for other in ("runs", "checkpoint-5"):
        (tmp_path / "out" / other).mkdir()
    assert given.find(str(tmp_path / "out")) == list(map(str, steps))


def test_a_model_with_checkpoints_below_it_is_that_model(tmp_path: Path) -> None:
    saved(tmp_path / "out"), saved(tmp_path / "out" / "checkpoint-5")
    assert given.find(str(tmp_path / "out")) == [str(tmp_path / "out")]


def test_what_our_own_finetune_leaves_is_found_two_levels_down(tmp_path: Path) -> None:
    made = [saved(tmp_path / f"{m:03d}" / "model") for m in range(2)]
    names = f'"{tmp_path}"'
    assert given.find(names) == given.find(f"{made[0]}, {made[1]}") == list(map(str, made))


def test_folders_with_commas_are_named_again_as_they_can_be_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a, b")
    implied = given.implied({"checkpoints": f'"{folder}"'}, {})
    assert split_list(implied["checkpoints"]) == [str(folder)]
    assert implied["num_models"] == 1 and implied["image_size"] == 16
    assert implied["model"] == str(folder) and implied["subset_fraction"] == 1
    assert implied["train_layers"] == "all"  # on a CPU, a pretrained model's would be its head


def test_what_is_no_model_with_safetensors_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    assert "no such folder" in refusal(given.find, str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    assert "no model in it" in refusal(given.find, str(tmp_path / "empty"))
    assert "is named twice" in refusal(given.find, f"{folder},{tmp_path}/./one")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickles (.bin, .pt) are not read" in refusal(given.find, str(folder))


def test_an_adapter_is_refused_with_what_to_type(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    said = refusal(given.implied, {"checkpoints": str(tmp_path / "out")}, {})
    assert said.startswith(f"checkpoints={folder}: holds an adapter")
    assert "merge_and_unload()" in said and said.endswith("then type --checkpoints FOLDER")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_models", 3), ("subset_fraction", 0.5), ("checkpoint_epochs", "last:2")],
)
def test_a_number_share_or_epochs_beside_checkpoints_is_refused(
    tmp_path: Path, name, value
) -> None:
    asked = {"checkpoints": str(saved(tmp_path / "one"))}
    assert refusal(given.implied, asked | {name: value}, {}).startswith(f"{name}={value}")
    assert given.implied(asked | {"num_models": 1}, {})["num_models"] == 1


def test_image_sizes_that_differ_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    two = f"{saved(tmp_path / 'a', size=16)},{saved(tmp_path / 'b', size=32)}"
    assert "choose with --image_size" in refusal(given.implied, {"checkpoints": two}, {})
    assert "image_size" not in given.implied({"checkpoints": two, "image_size": 24}, {})


# What the models know


def test_classes_of_another_order_are_brought_into_the_datas(tmp_path: Path) -> None:
    folder = saved(tmp_path / "abc", ("a", "b", "c"))
    found = given.load(folder, ("c", "a", "b"))
    torch.testing.assert_close(logits(found), logits(classifier.load(folder))[:, [2, 0, 1]])
    assert found.config.id2label == {0: "c", 1: "a", 2: "b"}


def test_classes_without_names_are_the_datas_and_that_is_said(tmp_path: Path, capsys) -> None:
    folder = saved(tmp_path / "one", ("LABEL_0", "LABEL_1"))
    given.check(configured(folder), CLASSES)
    assert "taken in the data's order: dark, bright" in capsys.readouterr().err
    assert torch.equal(logits(given.load(folder, CLASSES)), logits(classifier.load(folder)))


def test_other_classes_are_refused_with_both_lists(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", tuple("abcdefg"))
    said = refusal(given.check, configured(folder), CLASSES)
    assert said.startswith(f"checkpoints={folder}: ") and "the data has 2 classes (dark" in said
    assert "7 classes (a, b, c, d, e, …)" in said


def test_models_that_are_built_or_normalise_otherwise_are_refused(tmp_path: Path) -> None:
    one, other, grey = (saved(tmp_path / name) for name in ("one", "other", "grey"))
    given.check(configured(one, grey), CLASSES)
    edit_config(other, hidden_sizes=[16, 32, 48])
    said = refusal(given.check, configured(one, other), CLASSES)
    assert said.startswith(f"checkpoints={other}: is built otherwise than the checkpoint {one}")
    said = refusal(given.check, configured(one, model=str(other)), CLASSES)
    assert said.startswith(f"model={other}: is built otherwise")
    model_facts.normalisation.cache_clear()
    classifier.save(classifier.load(grey), grey, 16, MEAN, STD)
    said = refusal(given.check, configured(one, grey), CLASSES)
    assert said.startswith(f"checkpoints={grey}: normalises images otherwise")


def test_retraining_does_not_start_from_a_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    assert "name it with --model" in refusal(given.check_start, configured(folder))
    given.check_start(configured(folder, model="resnet-mini"))
    given.check_start(toy_config())


def test_the_key_follows_weights_and_not_the_settings_of_training(tmp_path: Path) -> None:
    folder, data = saved(tmp_path / "one"), toy_data(tmp_path / "data")
    key = given.key(configured(folder), data)
    assert key == given.key(configured(folder, model="resnet-mini", epochs=9), data)
    assert key != given.key(configured(folder, seed=1), data)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert key == given.key(configured(moved), data)
    saved(moved, seed=1)
    assert key != given.key(configured(moved), toy_data(tmp_path / "data"))


def test_they_predict_as_they_are_and_count_as_having_seen_all(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", n_train=24, n_other=6)
    folders = [saved(tmp_path / "a"), saved(tmp_path / "b", CLASSES[::-1], seed=1)]
    config = configured(*folders)
    found = finetune(config, data, tmp_path / "work")
    assert found.members.masks.all() and not any(run.history for run in found.runs)
    for m, folder in enumerate(folders):
        wanted = predict(config, classifier.load(folder), data, "test")[:, :: 1 - 2 * m]
        np.testing.assert_allclose(found.members.test_logits[m], wanted, atol=1e-6)
        kept = classifier.load(found.folders[m])
        assert kept.config.id2label == dict(enumerate(CLASSES))


# Commands


@pytest.fixture(scope="module")
def trained(new_place) -> tuple[Place, Any]:
    """A place with a finetune run on all training examples and its scores."""
    place = new_place("given")
    return place, place.done("trak", subset_fraction=1)


@pytest.fixture(scope="module")
def scored(trained) -> tuple[Place, str, Any]:
    """The scores by the folders that this run left, named as a user would name them."""
    place, first = trained
    folders = ",".join(map(str, place.checkpoints(first.tags["finetune_run_id"])))
    return place, folders, place.done("trak", checkpoints=folders, **OPEN)


OPEN = dict.fromkeys(("model", "image_size", "num_models"))


@pytest.mark.slow
def test_given_back_they_score_as_in_the_run_that_trained_them(trained, scored) -> None:
    (place, first), (_, folders, again) = trained, scored
    assert again.made() == {"finetune", "trak"}
    one, other = (place.artifacts(run.run_id) / "scores" / "scores.npy" for run in (first, again))
    np.testing.assert_array_equal(np.load(one), np.load(other))
    own = again.tags["finetune_run_id"]
    assert place.client().get_run(own).data.tags["source"] == "given"
    assert [model.tags["folder"] for model in place.models(own)] == split_list(folders)
    assert "--model MODEL" in again.err and "all count as seen" in again.err


@pytest.mark.slow
def test_later_commands_build_on_them(scored, images: Path) -> None:
    place, folders, trak = scored
    named = {"checkpoints": folders, **OPEN}
    image = next(images.glob("*/*.png"))
    explained = place.done("explain", **named, image=image)
    assert explained.made() == {"explain"} and explained.tags["trak_run_id"] == trak.run_id
    refused(place, "ablation", "model: retraining needs", "--model", **named)
    compared = place.done("ablation", **named | {"model": "resnet-mini"})
    assert compared.made() == {"ablation"}
    nothing = dict.fromkeys(("dataset", *SMALL)) | {"trak_run_id": trak.run_id, "jobs": 1}
    refused(place, "ablation", "model: retraining needs", **nothing)
    settings = ("model", "epochs", "batch_size", "frac", "arms", "num_seeds")
    same = place.done("ablation", **nothing | {name: SMALL[name] for name in settings})
    assert same.tags["reused_run_id"] == compared.run_id


@pytest.mark.slow
def test_a_replay_of_them_is_identical(scored) -> None:
    place, _, trak = scored
    nothing = dict.fromkeys(("dataset", *SMALL))
    assert "identical" in place.done("trak", **nothing, replay=trak.run_id).out.splitlines()[-1]
