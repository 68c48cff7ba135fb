"""Frozen layers: they stay as they were, and are skipped only where that gives the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.models import classifier, frozen
from attribution.models import train as module
from attribution.models.predict import predict
from attribution.models.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = np.ones(32, dtype=bool)
TRAINED = {"head": ("classifier.",), "last": ("resnet.encoder.stages.1.", "classifier.")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ResNet whose statistics are not those of a fresh one."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes)).train()
    model(torch.randn(8, 3, 32, 32))
    folder = tmp_path_factory.mktemp("resnet")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformer with two heads, which read different tokens."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DeiTConfig(**sizes, intermediate_size=16, image_size=16, patch_size=8)
    folder = tmp_path_factory.mktemp("deit")
    DeiTForImageClassificationWithTeacher(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("augment", ["none", "flip,crop"])
@pytest.mark.parametrize("layers", TRAINED)
def test_training_changes_what_is_trained_and_nothing_else(data, resnet, layers, augment) -> None:
    config = toy_config(model=resnet, train_layers=layers, augment=augment)
    before = classifier.build(resnet, data.class_names, module.derive_seed(3, "weights"))
    after = train(config, data, 3, ALL).model.state_dict()
    for name, value in before.state_dict().items():
        assert torch.equal(after[name], value) != name.startswith(TRAINED[layers]), name


@pytest.mark.parametrize("layers", TRAINED)
def test_skipping_frozen_layers_trains_the_same_model(data, resnet, layers, monkeypatch) -> None:
    config = toy_config(model=resnet, train_layers=layers, epochs=3)
    skipped = train(config, data, 3, ALL)
    monkeypatch.setattr(frozen, "stored_logits", lambda *_: None)
    whole = train(config, data, 3, ALL)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(skipped.model.state_dict()[name], value, msg=name)
    assert [r["train_loss"] for r in skipped.history] == pytest.approx(
        [r["train_loss"] for r in whole.history], rel=1e-4
    )


@pytest.mark.parametrize("layers", TRAINED)
def test_predictions_are_those_of_the_whole_model(data, resnet, layers) -> None:
    config = toy_config(model=resnet, train_layers=layers)
    model = train(config, data, 1, ALL).model
    plain = predict(toy_config(model=resnet), model, data, "test")
    assert np.allclose(predict(config, model, data, "test"), plain, atol=1e-5)
    assert not np.allclose(plain[0], plain[1], atol=1e-3)


def test_frozen_layers_run_once_for_each_image_whatever_the_seeds(data, resnet) -> None:
    config, ran = toy_config(model=resnet, train_layers="head", epochs=4), []
    frozen._stored.clear()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda layer, given: (
            ran.append(len(given[0])) if type(layer).__name__ == "ResNetModel" else None
        )
    )
    with hook:
        for seed in range(3):
            train(config, data, seed, ALL, validate=False)
    assert [n for n in ran if n > 2] == [32]  # two images compare, for each seed


def test_another_body_is_not_taken_for_the_stored_one(data, resnet) -> None:
    config = toy_config(model=resnet, train_layers="head")
    model = classifier.build(resnet, data.class_names, 0).eval()
    assert frozen.stored_logits(config, data, model, "test")
    other = train(toy_config(model=resnet), data, 0, ALL).model
    assert frozen.stored_logits(config, data, other, "test") is None


def test_two_heads_are_trained_and_no_layer_is_skipped(data, deit) -> None:
    config = toy_config(model=deit, train_layers="head")
    model = classifier.build(deit, data.class_names, 0).eval()
    assert frozen.stored_logits(config, data, model, "train") is None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = train(config, data, 0, ALL).model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(after[name], before[name])}
    assert {"cls_classifier", "distillation_classifier"} == changed


def test_outputs_that_would_fill_the_memory_are_not_stored(data, resnet, monkeypatch) -> None:
    frozen._stored.clear()
    monkeypatch.setattr(frozen, "MOST_BYTES", 1000)
    config = toy_config(model=resnet, train_layers="last")
    model = classifier.build(resnet, data.class_names, 0).eval()
    assert frozen.stored_logits(config, data, model, "train") is None
    frozen._stored.clear()


def test_a_step_that_skips_frozen_layers_is_timed_as_such(data, resnet) -> None:
    config = toy_config(model=resnet, train_layers="head", batch_size=32, image_size=64)
    skipped, whole = (
        min(module.seconds_per_example(config, data.class_names, 10**6, w) for _ in range(3))
        for w in (False, True)
    )
    assert 0 < skipped < whole


def test_models_of_which_other_layers_were_trained_are_not_taken_for_one_another(
    data, resnet
) -> None:
    config = toy_config(model=resnet)
    configs = [dataclasses.replace(config, train_layers=n) for n in TRAINED]
    assert len({module.training_key(each, data) for each in (config, *configs)}) == 3
