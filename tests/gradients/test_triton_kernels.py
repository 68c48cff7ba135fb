"""The GPU's kernels, interpreted where there is none, against explicit loops in float64."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import small_resnet
from torch import nn

pytest.importorskip("triton")

from attribution.gradients import sketch as sketch_module
from attribution.gradients import triton_kernels
from attribution.gradients.layer_rules import Call
from attribution.gradients.sketch import Sketch
from attribution.gradients.triton_kernels import KernelCall
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


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are on a GPU, where there is none; nothing has been said to stderr yet."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    sketch_module._say.cache_clear()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(144, 3)).eval().to(DEVICE)


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 6, 6, device=DEVICE), torch.arange(3, device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("k, blocks", [(64, 1), (32, 4)])
def test_a_sketch_by_kernels_is_the_sketch(k: int, blocks: int, exact, as_on_a_gpu, capsys) -> None:
    model = small_resnet().float().to(DEVICE)
    images, labels = torch.randn(2, 3, 16, 16, device=DEVICE), torch.arange(2, device=DEVICE)
    found = []
    for chosen in (True, False):
        sketch = Sketch(k, num_blocks=blocks, gpu_kernels=chosen)
        found.append(sketch.features(model, images, labels)[0])
    assert not torch.equal(*found)  # two ways
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))
    assert capsys.readouterr().err == ""


def twice(x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * delta.sum((2, 3)).float(), 2 * (delta * x).sum((2, 3)).float()


def one_tap_missing(*arguments, **more) -> None:
    outer_products(*arguments, **more)
    arguments[5][..., 0] = 0


def not_compiled(*_, **__) -> None:
    raise RuntimeError("no C compiler\nwas found")


outer_products = triton_kernels.outer_products
FAULTS = {
    "wrong sums": ("position_sums", twice, "GradientError: 1.weight: kernels differ"),
    "wrong products": ("outer_products", one_tap_missing, "GradientError: .*kernels differ"),
    "an exception": ("outer_products", not_compiled, "RuntimeError: no C compiler was found"),
    "no Triton": ("compare", not_compiled, "RuntimeError: no C compiler was found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_kernels_leads_to_the_plain_path_and_one_line(
    fault: str, as_on_a_gpu, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, function, says = FAULTS[fault]
    monkeypatch.setattr(triton_kernels, name, function)
    batch = small_batch()
    expected = Sketch(16, gpu_kernels=False).features(small_model(), *batch)
    for _ in range(2):  # a sketch for each checkpoint
        sketch = Sketch(16)
        for model in (small_model(), small_model()):
            found = sketch.features(model, *batch)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert sketch._call_types[model] is Call
    line = capsys.readouterr().err
    assert re.fullmatch(f"GPU kernels are off, features are slower: {says}.*\n", line)


def test_kernels_that_agree_are_compared_once_a_model_and_used(
    as_on_a_gpu, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, sizes = triton_kernels.compare, []

    def counting(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        sizes.append(len(images))
        compare(model, images, labels)

    monkeypatch.setattr(triton_kernels, "compare", counting)
    sketch, model = Sketch(16), small_model()
    for _ in range(2):
        sketch.features(model, *small_batch())
    assert sizes == [2] and sketch._call_types[model] is KernelCall
    assert capsys.readouterr().err == ""


def test_kernels_that_are_switched_off_are_not_tried(
    as_on_a_gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "compare", lambda *_: pytest.fail("compared"))
    Sketch(16, gpu_kernels=False).features(small_model(), *small_batch())


@pytest.mark.parametrize(
    "expected, groups, dtype",
    [
        (True, 1, torch.float32),
        (True, 1, torch.bfloat16),
        (False, 1, torch.float64),
        (False, 2, torch.float32),
    ],
)
def test_kernels_apply_to_whole_layers_of_types_that_a_gpu_multiplies(
    expected: bool, groups: int, dtype: torch.dtype
) -> None:
    conv, x = nn.Conv2d(2, 2, 1, groups=groups), torch.zeros(1, 2, 1, 1)
    call = KernelCall(conv, {}, x, 0, torch.zeros(1, 2, 1, 1, dtype=dtype))
    assert call.has_kernels() == expected


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
