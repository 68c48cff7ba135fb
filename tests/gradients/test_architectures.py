"""Per-sample gradients of transformers' image classifiers against autograd, and one on its way to features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_per_sample import ROUTES, assert_exact, assert_sketch_is, batch, flat, randomise
from toy import toy_config, toy_data

from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.gradients.per_sample import Shortcuts, capture
from attribution.gradients.shortcuts import TRIAL, survey
from attribution.gradients.sketch import FEW, Sketch, dealt
from attribution.models import classifier
from attribution.scores.features import featurize
from attribution.scores.trak import check_gradients

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

TRANSFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 16,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [4, 6], "depths": [1, 2]}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 4,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}
MOBILE = {"min_depth": 4, "depth_divisible_by": 4}
# Name -> settings and image size. DINOv2 interpolates its position embeddings to other sizes.
ARCHITECTURES = {
    "ViT": (TRANSFORMER, 16),
    "DeiT": (TRANSFORMER, 16),
    "Beit": (TRANSFORMER | {"layer_scale_init_value": 0.5}, 16),
    "Dinov2": (TRANSFORMER, 24),
    "Swin": (SWIN | {"use_absolute_embeddings": True}, 16),
    "Swinv2": (SWIN, 16),
    "ConvNext": (STAGES | {"num_stages": 2, "layer_scale_init_value": 0.5}, 32),
    "ConvNextV2": (STAGES | {"num_stages": 2}, 32),
    "RegNet": (STAGES | {"embedding_size": 4, "groups_width": 2, "layer_type": "y"}, 32),
    "EfficientNet": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        32,
    ),
    "MobileNetV1": ({"depth_multiplier": 0.1, "min_depth": 4}, 32),
    "MobileNetV2": (MOBILE | {"depth_multiplier": 0.1}, 32),
}
PAIRS = {"RegNet": 12, "EfficientNet": 25, "MobileNetV1": 27, "MobileNetV2": 52}
MIXED = ("ViT", "Swin", "ConvNext", "EfficientNet")


def tiny(name: str, **more) -> torch.nn.Module:
    """The architecture with random weights, in float64 and eval mode."""
    settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=4, **more)
    torch.manual_seed(0)
    model = randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    for p in model.parameters():  # many are drawn so small, or zero, that gradients vanish
        p.data += 0.1 * torch.randn_like(p)
    return model


def images_of(name: str, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    side = ARCHITECTURES[name][1]
    return batch(size, (3, side, side))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_all_parameters_equal_autograd(name: str) -> None:
    assert_exact(tiny(name), *images_of(name))


@pytest.mark.parametrize("name", MIXED)
def test_the_sketch_is_its_matrix_times_the_gradient(name: str) -> None:
    captured = capture(tiny(name), *images_of(name))
    for route in ROUTES.values():
        assert_sketch_is(captured, 61, route)


def test_streamed_features_are_the_projected_gradients_and_unbiased() -> None:
    model, (images, labels) = tiny("ViT"), images_of("ViT")
    captured = capture(model, images, labels)
    inner = flat(captured.per_sample())
    inner, k, n, products = inner @ inner.T, 64, 100, []
    for seed in range(n):
        features, margins = Sketch(k, seed, torch.float64).features(model, images, labels)
        products.append(features @ features.T)
    torch.testing.assert_close(features, Sketch(k, seed, torch.float64).project(captured))
    assert torch.equal(margins, captured.margins)
    norms = inner.diagonal()
    dense = (torch.outer(norms, norms) + inner**2) / k
    assert ((torch.stack(products).mean(0) - inner).abs() < 4 * (dense / n).sqrt()).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shortcuts_give_the_same_features_and_logits(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("attribution.gradients.batchnorm.POSITIONS_OF_ENTRY", 0)
    model, (images, labels) = tiny(name), images_of(name, FEW)
    found = survey(model, images)
    assert bool(found.copies) == (name in ("ViT", "DeiT", "Beit"))
    assert len(found.pairs) == PAIRS.get(name, 0)
    sketch = Sketch(61, 1, torch.float64, num_blocks=3)
    sketch.tensorsketches = ROUTES["fold"]
    assert len(sketch._shortcuts(model, images).fused) == PAIRS.get(name, 0)
    features, margins = sketch.features(model, images, labels)
    captured = capture(model, images, labels)
    torch.testing.assert_close(features, sketch.project(captured), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(margins, captured.margins, rtol=1e-9, atol=1e-9)


def test_of_few_images_no_copies_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, _) = tiny("ViT"), images_of("ViT", FEW)
    looks = []
    monkeypatch.setattr(
        "attribution.gradients.sketch.survey", lambda *a: looks.append(a[2]) or survey(*a)
    )
    sketch = Sketch(61)
    for count in (FEW - 1, FEW, FEW, FEW - 1):
        assert bool(sketch._shortcuts(model, images[:count]).copies) == (count == FEW)
    assert looks == [False, True]


class Added(torch.nn.Module):
    """Adds a parameter to an activation (B, 5, 4), in a way of its own."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.row, self.head = how, torch.nn.Linear(4, 4), torch.nn.Linear(20, 3)
        shape = {"to tokens": (1, 4), "indexed": (3, 4), "a matrix": (5, 4), "a scalar": ()}
        self.p = torch.nn.Parameter(torch.randn(shape.get(how, (1, 5, 4)), dtype=torch.float64))
        self.gate = 0.0 if how == "gated" else 1.0
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.row(x.flatten(2)).tanh()
        if self.how == "mixed":
            x = x + self.p.mean(0)
        elif self.how == "turned":
            x = x + self.p.flip(0)
        elif self.how == "indexed":
            x = x + self.p[torch.tensor([0, 2, 2, 1, 0])]
        elif self.how == "gated":
            x = x + self.gate * torch.sin(x * self.p[0])
        elif self.how == "twice":
            x = x * self.p + self.p[:1]
        elif self.how != "unused":
            x = x + self.p
        return self.head(x.flatten(1))


def assert_features_are_those_without_shortcuts(
    sketch: Sketch, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    truth = sketch.project(capture(model, images, labels))
    torch.testing.assert_close(sketch.features(model, images, labels)[0], truth)


@pytest.mark.parametrize(
    "how",
    ["plain", "unused", "a matrix", "a scalar", "to tokens", "mixed", "turned", "indexed", "twice"],
)
def test_copies_are_taken_only_where_every_sample_reads_its_own(how: str) -> None:
    torch.manual_seed(0)
    # Tokens and images of the trial: what is added to one could be taken for the other.
    model, (images, labels) = Added(how), batch(FEW, (TRIAL, 2, 2), 3)
    taken = ("plain", "unused", "a matrix", "a scalar")
    assert bool(survey(model, images).copies) == (how in taken)
    assert_features_are_those_without_shortcuts(Sketch(61, 1, torch.float64), model, images, labels)


def test_no_copies_of_what_the_trial_s_margins_do_not_depend_on() -> None:
    torch.manual_seed(0)
    model, (images, labels) = Added("gated"), batch(FEW, (TRIAL, 2, 2), 3)
    sketch = Sketch(61, 1, torch.float64)
    assert not sketch._shortcuts(model, images).copies
    model.gate = 0.5
    assert_features_are_those_without_shortcuts(sketch, model, images, labels)


def test_a_model_is_tried_anew_when_its_parameters_have_changed() -> None:
    torch.manual_seed(0)
    model, (images, labels) = Added("plain"), batch(FEW, (TRIAL, 2, 2), 3)
    sketch = Sketch(61, 1, torch.float64)
    for _ in range(2):
        assert list(sketch._shortcuts(model, images).copies.values()) == [(5, 4)]
    [first] = sketch._surveys[model].values()
    with torch.no_grad():
        model.head.weight += 1
    sketch._shortcuts(model, images)
    [second] = sketch._surveys[model].values()
    assert second is not first
    model.p = torch.nn.Parameter(torch.randn(1, 1, 4, dtype=torch.float64))  # of another shape
    assert_features_are_those_without_shortcuts(sketch, model, images, labels)


class Particular(torch.nn.Module):
    """Is for images with values from 0 to 1 alone: of others it has no margins, or refuses them."""

    def __init__(self, refuses: bool):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.head, self.refuses = torch.nn.Linear(4, 3), refuses
        if not refuses:
            self.scale = torch.nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.refuses:
            x = x.sqrt() * self.scale
        elif x.min() < 0 or x.max() > 1:
            raise ValueError("images must lie in [0, 1]")
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("refuses", [True, False])
def test_a_model_that_random_images_are_nothing_for_goes_without_shortcuts(refuses: bool) -> None:
    torch.manual_seed(0)
    model, labels = randomise(Particular(refuses)), torch.arange(FEW) % 3
    images = torch.rand(FEW, 3, 5, 5, dtype=torch.float64)
    sketch = Sketch(61, 1, torch.float64)
    assert_features_are_those_without_shortcuts(sketch, model, images, labels)
    assert sketch._shortcuts(model, images) == Shortcuts()


def test_what_vmap_runs_leaves_the_logits_and_the_model_alone() -> None:
    model, (images, labels) = tiny("ViT"), images_of("ViT")
    fast = torch.backends.mha.get_fastpath_enabled()
    before = {name: p.clone() for name, p in model.named_parameters()}
    captured = capture(model, images, labels)
    torch.testing.assert_close(captured.logits, model(images).logits.detach())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks for module in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad


def test_autocast_keeps_features_float32_and_close() -> None:
    model, (images, labels) = tiny("ConvNext").float(), images_of("ConvNext")
    full, _ = Sketch(64).features(model, images.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = Sketch(64).features(model, images.float(), labels)
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, full).min() > 0.99


def test_tokens_and_scales_are_dealt_as_vectors() -> None:
    shapes = {"a.weight": (3, 2), "token": (1, 1, 8), "grn": (1, 1, 1, 4), "b.weight": (4, 1, 3, 3)}
    assert dealt(shapes, 4) == {"a.weight": 0, "token": 0, "grn": 0, "b.weight": 1}


def test_a_model_that_samples_leave_is_refused_by_name() -> None:
    config = transformers.MobileViTConfig(
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8],
        num_attention_heads=2,
        image_size=64,
    )
    model = transformers.MobileViTForImageClassification(config).eval()
    with pytest.raises(InputError, match="layernorm_before: its input has shape"):
        capture(model.double(), *batch(2, (3, 64, 64)))


@pytest.mark.parametrize("name", ["ViT", "ConvNext", "MobileNetV2"])
def test_a_saved_model_goes_all_the_way_to_features(name: str, tmp_path: Path) -> None:
    side = ARCHITECTURES[name][1]
    tiny(name).float().save_pretrained(tmp_path / name)
    data = toy_data(tmp_path / "data", n_train=8, n_other=4, size=side)
    config = toy_config(model=str(tmp_path / name), image_size=side, proj_dim=16, num_blocks=2)
    check_gradients(config, data.class_names)
    model = classifier.build(config.model, data.class_names, seed=0)
    classifier.save(model, tmp_path / "checkpoint", side, *classifier.normalisation(config.model))
    store = featurize(config, data, [tmp_path / "checkpoint"], tmp_path / "work")[0]
    for split, rows in (("train", 8), (TARGETS, 4)):
        features = np.concatenate(store.features(split))
        assert features.shape == (rows, 32) and np.isfinite(features).all()
        assert (np.abs(features.reshape(rows, 2, 16)).sum(2) > 0).all()


def test_a_fixed_input_size_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    tiny("ViT").save_pretrained(tmp_path / "ViT")
    data = toy_data(tmp_path / "data", n_train=8, n_other=4, size=24)
    with pytest.raises(InputError, match="image_size=24.*config's is 16"):
        check_gradients(toy_config(model=str(tmp_path / "ViT"), image_size=24), data.class_names)
