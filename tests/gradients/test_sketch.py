"""The sketch against an explicit matrix, and its choices of route, copies and kernels."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import (
    ARCHITECTURES,
    MIXED,
    ROUTES,
    Image,
    Twice,
    assert_features_are_the_projected_gradients,
    assert_sketch_is,
    batch,
    explicit,
    flat,
    images_of,
    routed,
    small_resnet,
    tiny,
)
from torch import nn

from attribution.gradients import GradientError
from attribution.gradients.layer_rules import Call
from attribution.gradients.per_sample import capture
from attribution.gradients.sketch import Sketch, dealt

torch.set_num_threads(1)  # the tensors are tiny; threads would only wait for each other
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("bfloat16", [False, True])
def test_layers_sketched_during_the_backward_pass_give_the_same(bfloat16):
    model, (images, labels) = small_resnet().float(), batch(5, (3, 20, 20))
    sketch = Sketch(64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        features, found = sketch.features(model, images.float(), labels)
        captured = capture(model, images.float(), labels)
    assert torch.equal(found, captured.margins)
    scale = features.abs().max().item()
    torch.testing.assert_close(features, sketch.project(captured), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("k", [1, 2, 31, 256, 5000])
def test_sketch_equals_its_matrix_times_the_gradient(k, route):
    assert_sketch_is(capture(small_resnet(), *batch(3, (3, 20, 20))), k, route, seed=k)
    assert_sketch_is(capture(Image(Twice()), *batch()), k, route)


def test_both_routes_occur_and_the_default_mixes_them():
    captured = capture(small_resnet(), *batch(3, (3, 20, 20)))
    sketch = Sketch(64)
    chosen = {sketch.tensorsketches(call) for _, call in captured.matrices()}
    assert chosen == {False} and [hashes(512, 2), hashes(64, 56)] == [True, False]
    assert_sketch_is(captured, 64, None)


def hashes(channels: int, size: int) -> bool:
    """Whether a wide sketch hashes a 3 x 3 convolution of a map of this size."""
    conv, delta = nn.Conv2d(channels, channels, 3), torch.empty(1, channels, size, size)
    return Call(conv, {"weight": "w"}, delta, 0, delta).hashing_pays(1024)


@pytest.mark.slow
def test_unbiased_with_the_variance_of_a_dense_projection():
    captured = capture(small_resnet(), *batch(4, (3, 20, 20)))
    gradient = flat(captured.per_sample())
    inner, k, n = gradient @ gradient.T, 96, 200
    products = []
    for seed in range(n):
        projected = routed(k, seed, ROUTES["tensorsketch" if seed % 2 else "fold"]).project(
            captured
        )
        products.append(projected @ projected.T)
    products = torch.stack(products)
    norms = inner.diagonal()
    dense = (torch.outer(norms, norms) + inner**2) / k
    assert (inner[0, 1:].abs() > 0.1 * norms[0]).any()  # correlated enough to mean something
    assert ((products.mean(0) - inner).abs() < 4 * (dense / n).sqrt()).all()
    ratio = products.var(0) / dense
    assert ratio.max() < 1.8 and ratio.mean() < 1.3


def test_variance_of_rank_one_gradients_stays_near_dense():
    torch.manual_seed(0)
    model = Image(nn.Flatten(), shape=(300,), classes=40)
    captured = capture(model, *batch(3, (300,), 40))
    inner = flat(captured.per_sample())
    inner = (inner @ inner.T).diagonal()
    norms = torch.stack([Sketch(64, s).project(captured).square().sum(1) for s in range(400)])
    assert (norms.var(0) / (2 * inner**2 / 64)).mean() < 2.5


def test_rows_do_not_depend_on_the_batch(monkeypatch):
    model, (images, labels) = small_resnet(), batch(7, (3, 20, 20))
    sketch = routed(50)
    whole = sketch.project(capture(model, images, labels))
    order = torch.tensor([6, 0, 3])
    part = sketch.project(capture(model, images[order], labels[order]))
    torch.testing.assert_close(part, whole[order], rtol=1e-9, atol=1e-9)
    monkeypatch.setattr("attribution.gradients.layer_rules.CPU_SCRATCH", 1)
    monkeypatch.setattr("attribution.gradients.sketch.WAVE_SCRATCH", 1)
    for route in ROUTES.values():  # one sample per step
        again = routed(50, 0, route).project(capture(model, images, labels))
        torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-9)


def test_same_seed_same_map_other_seed_other_map():
    captured = capture(small_resnet(), *batch(3, (3, 20, 20)))
    first, again, other = (Sketch(128, s).project(captured) for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.dtype == torch.float32 and first.isfinite().all() and first.abs().sum(1).min() > 0
    # A value that may change only with the estimator's version: stored features depend on it.
    assert Sketch(8, 0)._bytes("label", 4).hex() == "de709cce"


def test_channels_last_and_threads_change_rounding_only():
    model, (images, labels) = small_resnet().float(), batch(4, (3, 20, 20))
    images = images.float()
    sketch = Sketch(64)
    plain = sketch.project(capture(model, images, labels))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        model = model.to(memory_format=torch.channels_last)
        last = sketch.project(capture(model, images.to(memory_format=torch.channels_last), labels))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(plain, last, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def test_autocast_is_accumulated_in_float32():
    model, (images, labels) = small_resnet().float(), batch(4, (3, 20, 20))
    with torch.autocast("cpu", torch.bfloat16):
        half = Sketch(64).project(capture(model, images.float(), labels))
    full = Sketch(64).project(capture(model, images.float(), labels))
    cosine = torch.cosine_similarity(half, full)
    assert half.dtype == torch.float32 and cosine.min() > 0.9


@pytest.mark.parametrize("k", [1, 50, 600])
def test_a_layer_s_sums_of_bfloat16_are_rounded_no_more_than_its_gradient(k):
    conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(6, 16, 8, 8)
    delta, table = torch.randn(6, 32, 8, 8), Sketch(k)._hash("w", conv.weight.shape, x)
    found = []
    for dtype in torch.bfloat16, torch.float64:
        parts = (t.bfloat16().to(dtype) for t in (x, delta))
        call, cells = Call(conv, {"weight": "w"}, next(parts), 0, next(parts)), torch.zeros(6, k)
        Sketch(k)._add_folds(call, table, cells)
        found.append(cells)
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert 0 < error < 2**-8


@given(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=30), st.integers(1, 12))
def test_matrices_are_dealt_evenly_in_order_and_vectors_follow_them(dimensions, num_blocks):
    shapes = {f"p{i}": (3,) * d for i, d in enumerate(dimensions)}
    blocks = dealt(shapes, num_blocks)
    assert list(blocks) == list(shapes)
    of_matrices = [blocks[name] for name, shape in shapes.items() if len(shape) > 1]
    assert of_matrices == sorted(of_matrices)
    sizes = [of_matrices.count(b) for b in range(1 + max(blocks.values()))]
    if of_matrices:
        assert len(sizes) == min(num_blocks, len(of_matrices))
        assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    current = 0
    for name, shape in shapes.items():
        current = blocks[name] if len(shape) > 1 else current
        assert blocks[name] == current


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("num_blocks", [1, 2, 4, 99])
def test_each_block_is_the_sketch_of_its_own_parameters(num_blocks, route):
    model, (images, labels) = small_resnet(), batch(3, (3, 20, 20))
    captured = capture(model, images, labels)
    sketch = Sketch(31, 5, dtype=torch.float64, num_blocks=num_blocks)
    sketch.tensorsketches = route
    blocks = dealt(captured.shapes, num_blocks)
    gradients = captured.per_sample()
    expected = []
    for block in range(1 + max(blocks.values())):
        own = [g * (blocks[name] == block) for name, g in gradients.items()]
        assert any(g.any() for g in own)
        own = torch.cat([g.flatten(1) for g in own], dim=1)
        expected.append(own @ explicit(routed(31, 5), captured).T)
    truth = torch.cat(expected, 1)
    found = sketch.project(captured)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sketch.features(model, images, labels)[0], truth)
    one = routed(31, 5, route).project(captured)
    torch.testing.assert_close(found.unflatten(1, (-1, 31)).sum(1), one, rtol=1e-9, atol=1e-9)


def test_refuses_an_empty_projection():
    with pytest.raises(GradientError, match="proj_dim is 0"):
        Sketch(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXED)
def test_the_sketch_is_its_matrix_times_the_gradient(name: str) -> None:
    captured = capture(tiny(name), *images_of(name))
    for route in ROUTES.values():
        assert_sketch_is(captured, 61, route)


@pytest.mark.slow
def test_streamed_features_are_the_projected_gradients_and_unbiased() -> None:
    model, (images, labels) = tiny("ViT"), images_of("ViT")
    captured = capture(model, images, labels)
    inner = flat(captured.per_sample())
    inner, k, n, products = inner @ inner.T, 64, 100, []
    for seed in range(n):
        sketch = Sketch(k, seed, torch.float64)
        features, margins = sketch.features(model, images, labels)
        products.append(features @ features.T)
    torch.testing.assert_close(features, Sketch(k, seed, torch.float64).project(captured))
    assert torch.equal(margins, captured.margins)
    norms = inner.diagonal()
    dense = (torch.outer(norms, norms) + inner**2) / k
    assert ((torch.stack(products).mean(0) - inner).abs() < 4 * (dense / n).sqrt()).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_of_every_architecture_are_the_projected_gradients(name: str) -> None:
    model, (images, labels) = tiny(name), images_of(name)
    sketch = Sketch(61, 1, torch.float64, num_blocks=3)
    assert_features_are_the_projected_gradients(sketch, model, images, labels)


def test_images_of_integers_are_taken() -> None:
    class Doubled(nn.Module):
        def forward(self, x):
            return x if x.is_floating_point() else x.double()

    model, (images, labels) = Image(nn.Sequential(Doubled(), nn.Conv2d(3, 4, 3))), batch()
    images = (images * 50).to(torch.uint8)
    assert_features_are_the_projected_gradients(
        Sketch(37, dtype=torch.float64), model, images, labels
    )


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


@pytest.mark.slow
def test_the_cpu_path_imports_neither_triton_nor_the_kernels() -> None:
    program = """
import sys, torch
from torch import nn
from attribution.gradients.sketch import Sketch
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
Sketch(16).features(model, torch.randn(2, 3, 6, 6), torch.tensor([0, 1]))
print([name for name in sys.modules if name.endswith("triton_kernels") or name == "triton"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
