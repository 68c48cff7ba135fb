"""Settings chosen from the data: what is given wins, the same data gives the same, and it is said."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from places import SMALL, Place, write_images

from attribution.cli import auto_settings
from attribution.cli.auto_settings import Facts, choose, choose_model, gather
from attribution.config import AUTO, FIELDS, PRESETS, resolve
from attribution.data.listing import list_data
from attribution.models import model_facts, pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = Facts(
    n_train=6000, side=500, is_grey=False, own_size=None, has_gpu=False, flops=lambda size: size**2
)
facts = st.builds(
    Facts,
    n_train=st.integers(2, 10**7),
    side=st.integers(1, 10**5),
    is_grey=st.booleans(),
    own_size=st.none() | st.sampled_from([32, 64, 224, 384]),
    has_gpu=st.booleans(),
    flops=st.sampled_from([lambda size: size**2, lambda size: 10**6 * size**2]),
)
GIVEN = {
    "image_size": 20, "augment": "none", "batch_size": 7, "epochs": 2,
    "learning_rate": 0.5, "weight_decay": 0.25, "num_models": 3, "num_seeds": 4,
}  # fmt: skip


def facts_of(folder: Path, cache: Path, **given: Any) -> Facts:
    config = resolve({"dataset": str(folder), "cache_dir": str(cache), "device": "cpu", **given})
    config = choose_model(config)
    return gather(config, list_data(config))


# -- the rules --------------------------------------------------------------------------------------


@given(facts, st.sets(st.sampled_from(AUTO)))
def test_what_is_known_wins_and_all_else_is_chosen(found: Facts, known: set[str]) -> None:
    chosen = choose(found, {name: GIVEN[name] for name in known})
    assert chosen.keys() == set(AUTO) - known


@given(facts)
def test_the_same_facts_give_the_same_settings_within_their_bounds(found: Facts) -> None:
    chosen = choose(found, {})
    assert chosen == choose(found, {})
    resolve({"dataset": "x", **chosen})  # it refuses what is out of bounds
    assert 16 <= chosen["batch_size"] <= 128 and 3 <= chosen["epochs"] <= 60
    assert chosen["num_models"] in (4, 10) and chosen["num_seeds"] in (5, 10)


@given(facts)
def test_a_gpu_moves_the_image_size_of_a_pretrained_model_and_what_follows_alone(
    found: Facts,
) -> None:
    without, gpu = (choose(dataclasses.replace(found, has_gpu=has), {}) for has in (False, True))
    differ = {name for name in AUTO if without[name] != gpu[name]}
    assert differ <= ({"image_size", "num_models", "num_seeds"} if found.own_size else set())


@given(st.integers(2, 10**7), st.integers(2, 512))
def test_a_given_batch_size_changes_epochs_and_not_the_steps(n_train: int, batch: int) -> None:
    found = dataclasses.replace(FACTS, n_train=n_train)
    epochs = choose(found, {"batch_size": batch})["epochs"]
    steps = epochs * -(-n_train // batch)
    assert epochs in (5, 60) or abs(steps - auto_settings.SCRATCH_STEPS) <= -(-n_train // batch) / 2


@pytest.mark.parametrize(
    ("side", "size"), [(1, 32), (8, 32), (28, 32), (41, 48), (64, 64), (5000, 64)]
)
def test_image_size_from_scratch_follows_the_images(side: int, size: int) -> None:
    for gpu in (False, True):
        assert auto_settings.image_size(dataclasses.replace(FACTS, side=side, has_gpu=gpu)) == size


@pytest.mark.parametrize(
    ("own", "side", "gpu", "size"),
    [(64, 500, True, 64), (224, 500, False, 64), (224, 500, True, 224), (224, 32, True, 64)],
)
def test_image_size_of_a_pretrained_model(own: int, side: int, gpu: bool, size: int) -> None:
    found = dataclasses.replace(FACTS, side=side, own_size=own, has_gpu=gpu)
    assert auto_settings.image_size(found) == size
    head = dataclasses.replace(found, train_layers="head")  # whose frozen layers run once
    assert auto_settings.image_size(head) == min(own, max(64, side // 16 * 16))
    slow = dataclasses.replace(head, flops=lambda size: 10**12 * size)
    assert auto_settings.image_size(slow) == size


def test_a_model_that_refuses_the_size_gets_its_own() -> None:
    found = dataclasses.replace(FACTS, own_size=224, flops=lambda s: s**2 if s == 224 else None)
    assert auto_settings.image_size(found) == 224


def test_a_pretrained_model_gets_fewer_epochs_and_a_lower_rate_than_one_from_scratch() -> None:
    scratch, tuned = (choose(dataclasses.replace(FACTS, own_size=own), {}) for own in (None, 64))
    assert tuned["epochs"] < scratch["epochs"]
    assert tuned["learning_rate"] < scratch["learning_rate"]


def test_a_head_alone_learns_faster_from_images_as_they_are() -> None:
    tuned = dataclasses.replace(FACTS, own_size=64)
    head = choose(dataclasses.replace(tuned, train_layers="head"), {})
    whole = choose(tuned, {})
    assert head["augment"] == "none" and head["learning_rate"] > whole["learning_rate"]
    assert head.keys() == whole.keys() and head["epochs"] == whole["epochs"]


def test_costly_trainings_are_fewer() -> None:
    cheap, dear = (
        choose(dataclasses.replace(FACTS, flops=lambda size, f=f: f), {}) for f in (1, 10**9)
    )
    assert (cheap["num_models"], cheap["num_seeds"]) == (10, 10)
    assert (dear["num_models"], dear["num_seeds"]) == (4, 5)


# -- the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "why", "device", "model", "layers"),
    [
        (True, None, "cpu", "microsoft/resnet-18", "head"),
        (True, None, "cuda:0", "microsoft/resnet-18", "all"),
        (False, "", "cpu", "microsoft/resnet-18", "head"),
        (False, "no network", "cpu", "resnet-mini", "all"),
    ],
)
def test_auto_is_the_pretrained_model_where_it_can_be_had(
    cached, why, device, model, layers, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(pretrained, "is_cached", lambda name: cached)
    monkeypatch.setattr(pretrained, "why_unreachable", {"microsoft/resnet-18": why}.__getitem__)
    config = choose_model(dataclasses.replace(resolve({"dataset": "x"}), device=device))
    assert (config.model, config.train_layers) == (model, layers)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(why)
    assert all("no network" in line and "--model FOLDER" in line for line in said)


@pytest.mark.parametrize("given", [{"preset": "digits"}, {"preset": "food101"}, {"model": "a/b"}])
def test_a_model_that_is_given_or_of_a_fixed_preset_asks_nobody(given, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "is_cached", None)  # to call it would fail
    before = resolve({"dataset": "x", "train_layers": "last", "cross_fit": "no", **given})
    assert choose_model(before) == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_layers": "head"}, "yes"),
        ({"train_layers": "all"}, "no"),
        ({"train_layers": "last", "cross_fit": "yes"}, "yes"),
        ({"train_layers": "head", "cross_fit": "no"}, "no"),
        ({"train_layers": "head", "checkpoints": "c"}, "no"),  # nothing is trained
    ],
)
def test_cross_fitting_is_on_by_itself_where_the_head_alone_is_trained(given, expected) -> None:
    assert choose_model(resolve({"dataset": "x", "model": "a/b", **given})).cross_fit == expected


# -- the facts --------------------------------------------------------------------------------------


def test_facts_are_of_the_content_and_not_of_names_or_order(images: Path, tmp_path: Path) -> None:
    for folder in images.iterdir():
        (tmp_path / "other" / folder.name).mkdir(parents=True)
        for i, file in enumerate(sorted(folder.iterdir(), reverse=True)):
            shutil.copy(file, tmp_path / "other" / folder.name / f"z{i}.png")
    first, second = (
        dataclasses.asdict(dataclasses.replace(facts_of(f, tmp_path / "cache"), flops=None))
        for f in (images, tmp_path / "other")
    )
    assert first == second
    assert first["side"] == 16 and not first["is_grey"] and first["n_train"] == 24


def test_grey_images_are_not_mirrored_even_where_they_are_stored_in_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for i in range(6):
            image = Image.fromarray(rng.integers(0, 255, (20, 30), np.uint8)).convert("RGB")
            image.save(tmp_path / "grey" / name / f"{i}.jpg")
    found = facts_of(tmp_path / "grey", tmp_path / "cache")
    assert found.is_grey and found.side == 20
    assert choose(found, {})["augment"] == "crop"


def test_a_file_that_cannot_be_decoded_is_left_out_of_the_sample(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "red" / "broken.png").write_bytes(b"no image")
    assert facts_of(folder, tmp_path / "cache").side == 16


def saved(config: Any, folder: Path) -> str:
    from transformers import AutoModelForImageClassification

    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return str(folder)


def small_models() -> dict[str, Any]:
    from transformers import ConvNextConfig, MobileNetV2Config, ViTConfig

    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "vit": ViTConfig(**vit, intermediate_size=16, image_size=48, patch_size=8),
        "convnext": ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=96),
        "mobilenet": MobileNetV2Config(depth_multiplier=0.35, image_size=96),
    }


@pytest.mark.parametrize(("kind", "size"), [("vit", 48), ("convnext", 64), ("mobilenet", 64)])
def test_a_named_model_decides_the_image_size(kind, size, images: Path, tmp_path: Path) -> None:
    name = saved(small_models()[kind], tmp_path / kind)
    found = facts_of(images, tmp_path / "cache", model=name, train_layers="all")
    chosen = choose(found, {})
    assert chosen["image_size"] == size and chosen["learning_rate"] < 1e-3
    assert model_facts.forward_flops(name, size) > 0


def test_the_preprocessor_wins_over_the_config(tmp_path: Path) -> None:
    from transformers import ConvNextImageProcessor

    name = saved(small_models()["convnext"], tmp_path / "model")
    assert model_facts.own_image_size(name) == 96
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(name)
    assert model_facts.own_image_size(name) == 32


# -- the commands -----------------------------------------------------------------------------------

SHORT = {"epochs": 1, "num_seeds": 2, "num_models": 2, "arms": "none,random"}
OPEN = dict.fromkeys(set(AUTO) - SHORT.keys()) | dict.fromkeys(["model"])


@pytest.fixture(scope="module")
def own(new_place) -> Place:
    return new_place("own")


@pytest.fixture(scope="module")
def first(own: Place):
    return own.done("ablation", **OPEN | SHORT)


@pytest.mark.slow
def test_each_choice_is_said_and_logged(own: Place, first) -> None:
    said = [line for line in first.err.splitlines() if line.startswith("auto: ")]
    assert len(said) == 1
    for name in set(AUTO) - SHORT.keys():
        assert f"{name} {first.runs[0].data.params[name]}" in said[0]
    assert not any(f"{name} " in said[0] for name in SHORT)
    assert "median side 16" in said[0] and "model resnet-mini" in said[0]
    assert first.runs[0].data.params["epochs"] == "1"


@pytest.mark.slow
def test_the_same_folder_again_is_answered_by_the_first_run(own: Place, first) -> None:
    again = own.done("ablation", **OPEN | SHORT)
    assert again.made() == set() and again.tags["reused_run_id"] == first.run_id
    assert "plan:" not in again.err


@pytest.mark.slow
def test_what_a_run_built_on_has_is_kept_and_only_seeds_are_chosen(own: Place, first) -> None:
    nothing = dict.fromkeys(SMALL) | {
        "dataset": None,
        "jobs": 1,
        "arms": "oracle",
    }  # nothing was flipped
    run = own.run("ablation", **nothing, trak_run_id=first.tags["trak_run_id"])
    said = [line for line in run.err.splitlines() if line.startswith("auto: ")]
    assert said[0] == "auto: num_seeds 10"
    assert run.runs[0].data.params["epochs"] == "1"


def test_a_run_of_another_preset_says_nothing(own: Place) -> None:
    run = own.run("ablation", preset="digits", arms="no_such_arm")
    assert "auto:" not in run.err


@pytest.mark.slow
def test_two_images_a_split_are_enough(new_place, tmp_path: Path) -> None:
    place, folder = new_place("tiny"), write_images(tmp_path / "tiny", per_class=5)
    result = place.done("ablation", dataset=folder, **OPEN | SHORT, frac=0.2)
    assert "epochs" not in result.err.split("data:")[0]


def test_a_model_that_cannot_be_loaded_is_told_in_one_line(own: Place) -> None:
    run = own.run("finetune", model="./no-such-model", image_size=None)
    assert len(run.errors) == 1 and "model=./no-such-model" in run.errors[0]


def test_every_open_setting_is_of_the_preset_and_has_its_help() -> None:
    assert set(AUTO) <= FIELDS.keys() & PRESETS["images"].keys()
