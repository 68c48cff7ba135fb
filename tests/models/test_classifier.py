"""Models: seeded heads, safetensors folders that transformers itself loads, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from attribution.data.transforms import to_batch
from attribution.errors import InputError
from attribution.models import classifier, memory_layout, model_facts, pretrained

CLASSES = ("dark", "bright")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def logits(model: nn.Module, size: int = 32) -> torch.Tensor:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(images).logits


def head(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def backbone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved two-class model whose running statistics are not those of a fresh one."""
    model = classifier.build("resnet-mini", CLASSES, seed=7).train()
    model(torch.randn(8, 3, 32, 32))
    classifier.save(model, tmp_path / "model", 32, MEAN, STD)
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(action, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        action(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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


def test_the_normalisation_of_a_saved_folder_is_found_again(folder: Path) -> None:
    assert model_facts.normalisation(str(folder)) == (MEAN, STD)


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


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    model.config = type("Config", (), {"model_type": "convolutions"})()
    assert "model=convolutions" in refusal(classifier._renew_head, model, 2)


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


def test_the_fingerprint_of_a_folder_follows_its_content_and_not_its_place(
    folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert pretrained.fingerprint(str(moved)) == pretrained.fingerprint(str(folder))
    edit_tensors(moved, lambda tensors: tensors["classifier.1.bias"].add_(1))
    assert pretrained.fingerprint(str(moved)) != pretrained.fingerprint(str(folder))


def test_the_fingerprint_of_a_folder_follows_its_preprocessing(folder: Path) -> None:
    before = pretrained.fingerprint(str(folder))
    classifier.save(classifier.load(folder), folder, 32, (0.1, 0.1, 0.1), STD)
    assert pretrained.fingerprint(str(folder)) != before


def test_the_fingerprint_of_a_hub_id_is_the_id() -> None:
    assert pretrained.fingerprint("microsoft/resnet-18") == "microsoft/resnet-18"


def test_the_fingerprint_of_a_mini_model_follows_its_architecture(monkeypatch) -> None:
    before = pretrained.fingerprint("resnet-mini")
    changed = pretrained.MINI_CONFIGS["resnet-mini"] | {"embedding_size": 32}
    monkeypatch.setitem(pretrained.MINI_CONFIGS, "resnet-mini", changed)
    assert pretrained.fingerprint("resnet-mini") != before


# Folders that somebody else has written

CONVOLUTION = "resnet.embedder.embedder.convolution.weight"
VARIANCE = "resnet.embedder.embedder.normalization.running_var"


def replace_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


@pytest.mark.parametrize(
    ("spoil", "says"),
    {
        "shape": (
            lambda f: edit_tensors(f, lambda t: t.update({CONVOLUTION: torch.zeros(4, 3, 3, 3)})),
            {"load": "cannot be loaded", "build": f"do not fit its config: ['{CONVOLUTION}']"},
        ),
        "missing below the head": (
            lambda f: edit_tensors(f, lambda t: t.pop(CONVOLUTION)),
            {"load": CONVOLUTION, "build": f"do not fit its config: ['{CONVOLUTION}']"},
        ),
        "NaN": (
            lambda f: edit_tensors(f, lambda t: t[CONVOLUTION].mul_(np.nan)),
            dict.fromkeys(("load", "build"), f"its tensor {CONVOLUTION} is not finite"),
        ),
        "infinite statistics": (
            lambda f: edit_tensors(f, lambda t: t[VARIANCE].fill_(np.inf)),
            dict.fromkeys(("load", "build"), f"its tensor {VARIANCE} is not finite"),
        ),
        "empty weights": (
            lambda f: replace_file(f, "model.safetensors", b""),
            dict.fromkeys(("load", "build"), "cannot be loaded"),
        ),
        "a header that claims an exabyte": (
            lambda f: replace_file(f, "model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
            dict.fromkeys(("load", "build"), "describes 79,"),
        ),
        "a config that claims terabytes": (
            lambda f: edit_config(f, hidden_sizes=[10**6, 10**6, 10**6]),
            dict.fromkeys(("load", "build"), "config.json describes 47,000,"),
        ),
        "a config that claims a milliard layers": (
            lambda f: edit_config(f, depths=[1, 1, 10**9]),
            dict.fromkeys(("load", "build"), "config.json describes more than 10,000 layers"),
        ),
        "a config that claims a milliard classes": (
            lambda f: edit_config(f, num_labels=10**9),
            dict.fromkeys(("load", "build", "image size"), "describes 1,000,000,000 numbers"),
        ),
        "a config that is a list": (
            lambda f: replace_file(f, "config.json", b"[]"),
            dict.fromkeys(("load", "build", "image size"), "cannot be loaded"),
        ),
        "a config nested beyond reason": (
            lambda f: replace_file(f, "config.json", b"[" * 100_000),
            dict.fromkeys(("load", "build", "image size", "normalisation"), "nested too deeply"),
        ),
        "a config that is a pipe": (
            lambda f: pipe(f, "config.json"),
            dict.fromkeys(("load", "build", "image size", "normalisation"), "not a regular file"),
        ),
        "weights that are a pipe": (
            lambda f: pipe(f, "model.safetensors"),
            dict.fromkeys(("load", "build", "fingerprint"), "not a regular file"),
        ),
        "a size of a wrong type": (
            lambda f: edit_config(f, hidden_sizes="abc"),
            dict.fromkeys(("load", "build", "image size"), "cannot be loaded"),
        ),
        "a preprocessor that is code": (
            lambda f: edit_preprocessor(f, auto_map={"AutoImageProcessor": "evil.P"}),
            dict.fromkeys(("image size", "normalisation"), "custom code"),
        ),
        "a preprocessor that divides by zero": (
            lambda f: edit_preprocessor(f, image_std=[0.1, 0.0, 0.1]),
            {"normalisation": "image_std (0.1, 0.0, 0.1) must be three finite numbers"},
        ),
        "a preprocessor of one channel": (
            lambda f: edit_preprocessor(f, image_mean=[0.5], image_std=[0.5]),
            {"normalisation": "must be three finite numbers"},
        ),
        "a preprocessor without a size": (
            lambda f: edit_preprocessor(f, size={"height": -5}),
            dict.fromkeys(("image size", "normalisation"), "cannot be loaded"),
        ),
    }.values(),
)  # fmt: skip
def test_a_folder_that_somebody_else_spoiled_is_refused(folder: Path, spoil, says) -> None:
    spoil(folder)
    actions = {
        "load": lambda: classifier.load(folder),
        "build": lambda: classifier.build(str(folder), CLASSES, 0),
        "image size": lambda: model_facts.own_image_size(str(folder)),
        "normalisation": lambda: model_facts.normalisation(str(folder)),
        "fingerprint": lambda: pretrained.fingerprint(str(folder)),
    }
    for action, fragment in says.items():
        message = refusal(actions[action])
        assert fragment in message and str(folder) in message, message


def edit_preprocessor(folder: Path, **changes) -> None:
    file = folder / "preprocessor_config.json"
    document = json.loads(file.read_text()) | changes
    if "auto_map" in changes:
        document["image_processor_type"] = "P"
    file.write_text(json.dumps(document))


def test_a_preprocessor_s_code_is_not_executed(folder: Path) -> None:
    mark = folder / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass P: pass\n")
    edit_preprocessor(folder, auto_map={"AutoImageProcessor": "evil.P"})
    refusal(model_facts.normalisation, str(folder))
    assert not mark.exists()


def test_a_folder_with_weights_as_a_pickle_alone_is_refused(folder: Path) -> None:
    mark = folder / "executed"
    (folder / "model.safetensors").unlink()
    pickle = b"cbuiltins\nopen\n(V%s\nVw\ntR." % str(mark).encode()
    (folder / "pytorch_model.bin").write_bytes(pickle)
    message = refusal(classifier.build, str(folder), CLASSES, 0)
    assert "no file named model.safetensors" in message
    assert not mark.exists()


def test_a_model_whose_class_is_code_in_its_folder_is_refused(folder: Path) -> None:
    mark = folder / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    maps = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.C"}
    edit_config(folder, auto_map=maps, model_type="new")
    assert "custom code" in refusal(classifier.build, str(folder), CLASSES, 0)
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    before = classifier.load(folder).state_dict()
    (folder / "pytorch_model.bin").unlink()
    assert equal(classifier.load(folder).state_dict(), before)


def test_what_a_base_model_may_lack_or_have_more_of(folder: Path) -> None:
    """Its head, counters that nothing depends on, and tensors of another use."""
    before = backbone(classifier.build(str(folder), CLASSES, 0))
    counter = VARIANCE.replace("running_var", "num_batches_tracked")
    edit_tensors(folder, lambda t: [t.pop(k) for k in (counter, "classifier.1.weight")])
    edit_tensors(folder, lambda t: t.update(surplus=torch.zeros(3)))
    found = backbone(classifier.build(str(folder), CLASSES, 0))
    assert all(torch.equal(found[k], before[k]) for k in before if k != counter)


def wide_resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 128, 128], depths=[1, 1, 1], layer_type="basic"
    )
    torch.manual_seed(0)
    return ResNetForImageClassification(config)


def first_channels(model: nn.Module) -> list[bool]:
    """Of each convolution with several channels and a kernel, whether its weight is as it comes."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [w.is_contiguous() for w in weights if w.shape[1] > 1 and w.shape[2] > 1]


@pytest.mark.parametrize(
    "size, tiny", [(32, [False] * 4 + [True] * 3), (64, [False] * 6 + [True]), (128, [False] * 7)]
)
def test_wide_convolutions_of_tiny_maps_alone_keep_their_channels_first(
    size: int, tiny: list[bool]
) -> None:
    model = wide_resnet().train()
    memory_layout.place(model, "cpu", size)
    assert model.training and first_channels(model) == tiny


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_placed_model_computes_and_learns_the_same(tmp_path: Path, bfloat16: bool) -> None:
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    found = []
    for size in (128, 32):
        model = wide_resnet().eval()
        memory_layout.place(model, "cpu", size)
        memory_layout.place(model, "cpu", size)  # twice is as good as once
        with torch.inference_mode():
            model(images)  # leaves nothing behind
        model = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(images).logits.float().square().sum()
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((loss.detach(), grads))
        classifier.save(model, tmp_path / str(size), 32, MEAN, STD)
        assert equal(classifier.load(tmp_path / str(size)).state_dict(), model.state_dict())
    close = 2e-2 if bfloat16 else 1e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close * other.abs().max().item())


def test_a_placed_model_runs_under_vmap() -> None:
    model, images = wide_resnet().eval(), torch.randn(2, 3, 32, 32)
    memory_layout.place(model, "cpu", 32)
    weights = dict(model.named_parameters())

    def one(image: torch.Tensor) -> dict[str, torch.Tensor]:
        def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(model, weights, image[None]).logits.sum()

        return torch.func.grad(loss)(weights)

    found = torch.func.vmap(one)(images)
    model(images).logits.sum().backward()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name].sum(0), weight.grad, rtol=1e-3, atol=1e-3)
