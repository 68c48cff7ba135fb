"""Model folders that somebody else has written: their fingerprint, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model_folders import (
    CLASSES,
    STD,
    backbone,
    edit_config,
    edit_tensors,
    equal,
    logits,
    refusal,
)
from torch import nn

from attribution.data.transforms import to_batch
from attribution.models import classifier, model_facts, pretrained


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
            dict.fromkeys(("load", "build"), "cannot be loaded"),
        ),
        "an adapter": (
            lambda f: replace_file(f, "adapter_config.json", b"{}"),
            dict.fromkeys(("load", "build", "image size"), "merge_and_unload()"),
        ),
        "an adapter without a model": (
            lambda f: [replace_file(f, "adapter_config.json", b"{}"), (f / "config.json").unlink()],
            dict.fromkeys(("load", "build", "image size"), "merge_and_unload()"),
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


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """A model as timm itself writes it; one of its arguments is the number of classes."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 96, 96]}
    names = {"label_names": ["x", "y", "z"]}
    timm.models.save_for_hf(
        model,
        tmp_path / "timm",
        model_config=names | {"pretrained_cfg": cfg},
        safe_serialization=True,
    )
    return tmp_path / "timm"


def test_a_timm_model_s_size_and_normalisation_are_those_of_its_config(timm_folder: Path) -> None:
    assert model_facts.own_image_size(str(timm_folder)) == 96
    assert model_facts.normalisation(str(timm_folder)) == ((0.5,) * 3, (0.25,) * 3)


def test_a_trained_timm_model_carries_its_names_and_preprocessing(
    timm_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    built = classifier.build(str(timm_folder), ("cat", "dog"), seed=0)
    classifier.save(built, tmp_path / "saved", 32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert plain.config.id2label == {0: "cat", 1: "dog"}
    assert torch.equal(logits(plain), logits(classifier.load(tmp_path / "saved")))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    prepared = AutoImageProcessor.from_pretrained(tmp_path / "saved")(image)["pixel_values"]
    expected = to_batch(image[None], (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(prepared, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(bool(find_spec("timm")), reason="timm is installed")
def test_a_timm_model_without_timm_is_refused_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    for action in (model_facts.normalisation, model_facts.own_image_size):
        assert "pip install timm" in refusal(action, str(tmp_path))


# The cache of the Hub


def hub_cache(place: Path, saved: Path, *without: str) -> Path:
    """Lay a saved model out as the Hub's cache does: blobs, and a snapshot with links to them."""
    top = place / "models--microsoft--resnet-18"
    for folder in ("refs", "blobs", "snapshots/0a1b"):
        (top / folder).mkdir(parents=True)
    (top / "refs" / "main").write_text("0a1b")
    for file in saved.iterdir():
        if file.name in without:  # as while it is downloaded
            (top / "blobs" / f"{file.name}.incomplete").write_bytes(file.read_bytes()[:100])
            continue
        shutil.copy(file, top / "blobs" / f"blob-{file.name}")
        (top / "snapshots" / "0a1b" / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return place


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, not offline, on a machine without network: the hosts that are asked for."""
    from huggingface_hub import constants

    hosts: list[str] = []

    def no_network(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it asks before it looks
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for cached in (pretrained.skeleton, pretrained.heads, model_facts.normalisation):
        cached.cache_clear()
    return hosts


def test_a_model_in_the_hub_s_cache_is_loaded_and_no_network_is_asked(
    asked: list[str], folder: Path, tmp_path: Path
) -> None:
    name = pretrained.PRETRAINED
    assert not pretrained.is_cached(name)
    hub_cache(tmp_path / "hub", folder)
    assert pretrained.is_cached(name)
    model = classifier.build(name, CLASSES, 0)
    assert equal(backbone(model), backbone(classifier.load(folder)))
    assert model_facts.own_image_size(name) == 32
    assert model_facts.normalisation(name)[1] == pytest.approx(STD)
    assert not asked


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_that_was_downloaded_half_is_not_in_the_cache(
    asked: list[str], folder: Path, tmp_path: Path, missing: str
) -> None:
    hub_cache(tmp_path / "hub", folder, missing)
    assert not pretrained.is_cached(pretrained.PRETRAINED)


def test_without_network_the_hub_is_given_up_at_once(asked: list[str]) -> None:
    start = time.monotonic()
    assert "name resolution" in pretrained.why_unreachable(pretrained.PRETRAINED)
    assert time.monotonic() - start < 3 and len(asked) == 1


def test_a_network_that_does_not_answer_is_given_up_in_time(monkeypatch) -> None:
    """Looking up an address ignores the timeout of a request."""
    waits = threading.Event()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: waits.wait(60))
    monkeypatch.setattr(pretrained, "HUB_SECONDS", 0.2)
    assert pretrained.why_unreachable(pretrained.PRETRAINED) == "no answer within 0.2 s"
    waits.set()


def test_a_hub_that_answers_offers_the_model(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    assert pretrained.why_unreachable(pretrained.PRETRAINED) == ""


# Which layers are trained


@pytest.mark.parametrize(
    ("name", "last", "head"),
    [
        ("ResNet", "resnet.encoder.stages.3", "classifier.1"),
        ("ViT", "vit.layers.11", "classifier"),
        ("Swin", "swin.encoder.layers.3", "classifier"),
        ("ConvNext", "convnext.encoder.stages.3", "classifier"),
        ("MobileNetV2", "mobilenet_v2.layer.15", "classifier"),
    ],
)
def test_the_last_stage_is_told_from_the_module_tree(
    name: str, last: str, head: str, tmp_path: Path
) -> None:
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    model = str(tmp_path)
    assert pretrained.trained_paths(model, "all") == ("",)
    assert pretrained.trained_paths(model, "head") == (head,)
    assert pretrained.trained_paths(model, "last") == (last, head)


def test_layers_that_cannot_be_told_or_were_never_trained_are_refused(monkeypatch) -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleList([nn.Linear(1, 1)]))
    monkeypatch.setattr(pretrained, "skeleton", lambda *_: flat)
    message = refusal(pretrained.trained_paths, "owner/flat", "last")
    assert "train_layers=last" in message and "head or all" in message
    message = refusal(pretrained.trained_paths, "resnet-mini", "head")
    assert "train_layers=head" in message and "train_layers=all" in message
