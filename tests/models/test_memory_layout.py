"""The memory layout of a model on a CPU, which changes its speed and not its results."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_folders import (
    MEAN,
    STD,
    equal,
)
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from attribution.models import classifier, memory_layout


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
