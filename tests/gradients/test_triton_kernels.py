"""The GPU's kernels, interpreted where there is none, against explicit loops in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from attribution.gradients import layer_rules, triton_kernels
from attribution.gradients.layer_rules import Call
from attribution.gradients.sketch import Sketch
from attribution.models import classifier

# conftest.py has Triton interpret kernels where there is no GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "channels, outputs, kernel, stride, padding, dilation",
    [
        (3, 8, (3, 3), 1, 1, 1),
        (64, 70, (3, 3), 1, 1, 1),  # a tap a tile
        (64, 130, (1, 1), 2, 0, 1),
        (5, 7, (3, 5), (2, 1), (0, 2), (1, 2)),
    ],
)
def test_outer_products_are_signed_weight_gradients(
    channels, outputs, kernel, stride, padding, dilation, layout, exact
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, bias=False).double()
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    y = conv(x)
    delta = torch.randn_like(y)
    patch = conv.weight[0].numel()
    rows = torch.randint(0, 2, (outputs,)) * 2.0 - 1
    columns = torch.randint(0, 2, (patch,)) * 2.0 - 1
    out = torch.full((2, outputs, patch + 3), 7.0, device=DEVICE)
    triton_kernels.outer_products(
        *(t.float().to(DEVICE).contiguous(memory_format=layout) for t in (x, delta)),
        (conv.kernel_size, conv.stride, conv.padding, conv.dilation),
        rows.to(DEVICE),
        columns.to(DEVICE),
        out[:, :, :patch],
        tf32=False,
    )
    for i in range(2):
        (own,) = torch.autograd.grad(conv(x[i : i + 1]), conv.weight, delta[i : i + 1])
        expected = own.permute(0, 2, 3, 1).flatten(1) * rows[:, None] * columns
        torch.testing.assert_close(out[i, :, :patch].cpu().double(), expected, rtol=1e-4, atol=1e-4)
    assert (out[..., patch:] == 0).all()


@pytest.mark.parametrize("shape", [(2, 70, 3, 5), (1, 8, 40, 33)])
def test_position_sums(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    delta = torch.randn(shape)
    plain, weighted = triton_kernels.position_sums(x.to(DEVICE), delta.to(DEVICE))
    torch.testing.assert_close(plain.cpu(), delta.sum((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted.cpu(), (delta * x).sum((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k, blocks", [(64, 1), (32, 4)])
def test_a_sketch_by_kernels_is_the_sketch(
    monkeypatch: pytest.MonkeyPatch, k: int, blocks: int, exact
) -> None:
    torch.manual_seed(0)
    model = classifier.build("resnet-mini", ("dark", "bright"), 0).eval().to(DEVICE)
    images, labels = torch.randn(2, 3, 16, 16, device=DEVICE), torch.arange(2, device=DEVICE)
    found = []
    for chosen in (True, False):
        monkeypatch.setattr(Call, "has_kernels", lambda call, chosen=chosen: chosen)
        found.append(Sketch(k, num_blocks=blocks).features(model, images, labels)[0])
    assert not torch.equal(*found)  # two ways
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))


@pytest.mark.parametrize(
    "expected, gpu, groups, dtype",
    [
        (True, True, 1, torch.float32),
        (True, True, 1, torch.bfloat16),
        (False, True, 1, torch.float64),
        (False, True, 2, torch.float32),
        (False, False, 1, torch.float32),
    ],
)
def test_kernels_apply_on_a_gpu_to_whole_layers_of_types_it_multiplies(
    expected: bool, gpu: bool, groups: int, dtype: torch.dtype
) -> None:
    conv, x = nn.Conv2d(2, 2, 1, groups=groups), torch.zeros(1, 2, 1, 1)
    delta = SimpleNamespace(is_cuda=gpu, device=torch.device(DEVICE), dtype=dtype)
    assert Call(conv, {}, x, 0, delta).has_kernels() == expected


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    assert layer_rules.kernels(device) is triton_kernels
    layer_rules.kernels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "position_sums", None)  # as where it cannot be compiled
        assert layer_rules.kernels(device) is None
    layer_rules.kernels.cache_clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16")
@pytest.mark.parametrize("size", [32, 64])
def test_bfloat16_features_are_near_float64_s(size: int) -> None:
    torch.manual_seed(0)
    model = classifier.build("resnet-mini", ("dark", "bright"), 0).eval().to(DEVICE)
    images = torch.randn(32, 3, size, size, device=DEVICE)
    labels = torch.arange(32, device=DEVICE) % 2
    sketch = Sketch(256, num_blocks=4, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = sketch.features(model, images, labels)[0]
    expected = sketch.features(model.double(), images.double(), labels)[0]
    grams = torch.stack([(f @ f.T).flatten() for f in (found, expected)])
    assert torch.corrcoef(grams)[0, 1] > 0.995
