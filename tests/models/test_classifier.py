"""Models: seeded heads, safetensors folders that transformers itself loads, image sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import (
    CLASSES,
    MEAN,
    STD,
    backbone,
    edit_config,
    edit_tensors,
    equal,
    logits,
    refusal,
)
from safetensors.torch import load_file
from torch import nn

from attribution.data.transforms import to_batch
from attribution.models import classifier, pretrained


def head(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def test_one_seed_draws_the_same_weights_and_another_seed_others() -> None:
    first, same, other = (classifier.build("resnet-mini", CLASSES, seed) for seed in (1, 1, 2))
    assert equal(first.state_dict(), same.state_dict())
    assert not torch.equal(head(first).weight, head(other).weight)


def test_a_model_has_a_logit_a_class_and_knows_their_names() -> None:
    model = classifier.build("resnet-mini", ("a", "b", "c"), 0)
    assert logits(model).shape == (3, 3)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_the_head_is_redrawn_even_where_the_number_of_classes_fits(folder: Path) -> None:
    saved, built = classifier.load(folder), classifier.build(str(folder), ("cat", "dog"), seed=3)
    assert head(built).weight.shape == head(saved).weight.shape
    assert not torch.isclose(head(built).weight, head(saved).weight).any()
    assert equal(backbone(built), backbone(saved))


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c", "d")])
def test_the_redrawn_head_is_decided_by_the_seed(folder: Path, classes: tuple) -> None:
    first, same, other = (classifier.build(str(folder), classes, seed) for seed in (1, 1, 2))
    assert head(first).out_features == len(classes)
    assert torch.equal(head(first).weight, head(same).weight)
    assert torch.equal(head(first).bias, head(same).bias)
    assert not torch.isclose(head(first).weight, head(other).weight).any()


def test_a_saved_model_is_loaded_with_the_same_logits_in_eval_mode(tmp_path: Path) -> None:
    model = classifier.build("resnet-mini", CLASSES, 0).train()
    model(torch.randn(8, 3, 32, 32))
    classifier.save(model, tmp_path / "model", 32, MEAN, STD)
    loaded = classifier.load(tmp_path / "model")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(model))


def test_plain_transformers_loads_the_folder_with_the_same_logits_and_names(folder: Path) -> None:
    from transformers import AutoModelForImageClassification

    plain = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(plain), logits(classifier.load(folder)))
    assert plain.config.id2label == dict(enumerate(CLASSES))


def test_the_saved_processor_prepares_an_image_as_training_does(folder: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    prepared = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared, to_batch(image[None], MEAN, STD), rtol=1e-5, atol=1e-5)


def test_the_saved_processor_resizes_to_the_image_size(folder: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    image = np.zeros((50, 80, 3), np.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_only_safetensors_and_json_are_written(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_a_folder_with_pickled_weights_alone_is_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert f"model={folder}" in refusal(classifier.build, str(folder), CLASSES, 0)
    refusal(classifier.load, folder)


@pytest.mark.parametrize("model_type", ["resnet", "something-new"])
def test_code_that_a_folder_brings_along_is_not_executed(folder: Path, model_type: str) -> None:
    mark = folder / "executed"
    code = f"open({str(mark)!r}, 'w').close()\nclass Model: pass\nclass Config: pass\n"
    (folder / "evil.py").write_text(code)
    maps = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    edit_config(folder, auto_map=maps, model_type=model_type)
    if model_type == "resnet":  # transformers has a class of its own for this type
        assert type(classifier.build(str(folder), CLASSES, 0)).__module__.startswith(
            "transformers."
        )
    else:
        refusal(classifier.build, str(folder), CLASSES, 0)
    assert not mark.exists()


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("classifier.1.weight"))
    assert "classifier.1.weight" in refusal(classifier.load, folder)


def test_a_surplus_tensor_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(surplus=torch.zeros(2)))
    assert "surplus" in refusal(classifier.load, folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"classifier.1.bias": torch.zeros(9)}))
    assert str(folder) in refusal(classifier.load, folder)


def test_a_damaged_weights_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert str(folder) in refusal(classifier.load, folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "nowhere" in refusal(classifier.load, tmp_path / "nowhere")


def test_an_unknown_model_name_is_refused_in_one_line_with_what_would_be_right(
    tmp_path: Path,
) -> None:
    message = refusal(classifier.build, str(tmp_path / "no-such-model"), CLASSES, 0)
    assert message.startswith(f"model={tmp_path}") and "resnet-mini" in message


def test_a_model_without_a_linear_head_is_refused(folder: Path, monkeypatch) -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Linear(2, 2))
    pretrained.heads.cache_clear()
    monkeypatch.setattr(pretrained, "skeleton", lambda *_: convolution)
    assert "no linear head" in refusal(classifier.build, str(folder), CLASSES, 0)


TINY = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
SWIFT = {"depths": [1, 1, 1, 1], "embed_dims": [4, 4, 4, 4]}
TWO_HEADS = {
    "DeiTForImageClassificationWithTeacher": ("DeiT", TINY, ["cls_classifier", "distillation_classifier"]),
    "SwiftFormerForImageClassification": ("SwiftFormer", SWIFT, ["head", "dist_head"]),
}  # fmt: skip


@pytest.mark.parametrize("architecture", TWO_HEADS)
@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c", "d")])
def test_every_head_is_redrawn_and_no_other_layer(architecture, classes, tmp_path: Path) -> None:
    """Other layers have four outputs too, as one of the heads would."""
    import transformers

    family, settings, names = TWO_HEADS[architecture]
    config = getattr(transformers, f"{family}Config")(**settings, num_labels=2)
    saved = getattr(transformers, architecture)(config)
    saved.save_pretrained(tmp_path)
    built = classifier.build(str(tmp_path), classes, seed=3)
    for name in names:
        drawn, old = built.get_submodule(name).weight, saved.get_submodule(name).weight
        assert drawn.shape == (len(classes), 4)
        assert not torch.isclose(drawn[:2], old).any()
    heads = tuple(f"{name}." for name in names)
    kept = [
        {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(heads)}
        for model in (built, saved)
    ]
    assert equal(*kept)


def test_a_model_that_returns_no_logits_is_refused(tmp_path: Path) -> None:
    from transformers import PPLCNetConfig, PPLCNetForImageClassification

    PPLCNetForImageClassification(PPLCNetConfig(scale=0.25)).save_pretrained(tmp_path)
    message = refusal(classifier.check, str(tmp_path), CLASSES, 32)
    assert message.startswith(
        f"model={tmp_path}: a PPLCNetForImageClassification returns no logits"
    )


@pytest.mark.parametrize("size", [1, 4, 8])
def test_images_that_the_strides_shrink_to_nothing_are_refused(size: int) -> None:
    model = classifier.build("resnet-mini", CLASSES, 0)
    assert f"image_size={size}" in refusal(classifier.check_image_size, model, size)


@pytest.mark.parametrize("size", [16, 28, 64])
def test_images_that_are_large_enough_are_accepted(size: int) -> None:
    classifier.check_image_size(classifier.build("resnet-mini", CLASSES, 0), size)


def test_a_model_with_a_fixed_input_size_refuses_another() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=8, intermediate_size=8, **small)
    )
    classifier.check_image_size(model, 32)
    message = refusal(classifier.check_image_size, model, 48)
    assert message.startswith("image_size=48") and message.endswith("its config's is 32")


@pytest.mark.parametrize("training", [True, False])
def test_checking_the_image_size_leaves_the_model_as_it_was(training: bool) -> None:
    model = classifier.build("resnet-mini", CLASSES, 0).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classifier.check_image_size(model, 16)
    refusal(classifier.check_image_size, model, 8)
    assert equal(before, model.state_dict())
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
