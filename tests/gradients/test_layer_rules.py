"""Gradients of single layers by each route against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BODIES, ROUTES, Image, assert_exact, assert_sketch_is, batch, small_resnet
from torch import nn

from attribution.gradients.layer_rules import Call
from attribution.gradients.per_sample import capture

torch.set_num_threads(1)  # the tensors are tiny; threads would only wait for each other


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.just("same"), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_any_convolution(groups, inputs, outputs, kernel, stride, padding, dilation, bias, last):
    stride = 1 if padding == "same" else stride
    shape = (groups * inputs, 9, 8)
    conv = nn.Conv2d(
        shape[0], groups * outputs, kernel, stride, padding, dilation, groups, bias=bias
    )
    model = Image(conv, shape=shape)
    images, labels = batch(3, shape)
    if last:
        model, images = (z.to(memory_format=torch.channels_last) for z in (model, images))
    captured = capture(model, images, labels)
    assert_exact(model, images, labels)
    for route in ROUTES.values():
        assert_sketch_is(captured, 37, route)


def test_convolution_library_route_is_exact(monkeypatch):
    monkeypatch.setattr("attribution.gradients.layer_rules.LONG_MAP", 1)
    for body in ("padded", "dilated", "grouped", "valid"):
        model = Image(BODIES[body]())
        assert_exact(model, *batch())
        assert_sketch_is(capture(model, *batch()), 50, ROUTES["fold"])
    wide = Image(nn.Conv2d(32, 32, 3, padding=1), shape=(32, 6, 5))
    assert_exact(wide, *batch(5, (32, 6, 5)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_long_maps_go_to_the_convolution_library_and_short_ones_to_a_gemm(layout):
    model = small_resnet(embedding_size=16, hidden_sizes=[16, 32]).to(memory_format=layout)
    images, labels = batch(2, (3, 64, 64))
    images = images.to(memory_format=layout)
    captured = capture(model, images, labels)
    assert {call.convolves() for _, call in captured.matrices()} == {False, True}
    assert_exact(model, images, labels)
    assert not any(each.requires_grad for each in captured.per_sample().values())


@pytest.mark.parametrize("kernel, groups", [(3, 6), (5, 6), (3, 2), (3, 1)])
def test_small_depthwise_kernels_go_to_the_convolution_library_whatever_their_maps(kernel, groups):
    model = Image(nn.Conv2d(6, 6, kernel, groups=groups), shape=(6, 6, 6))
    captured = capture(model, *batch(2, (6, 6, 6)))
    found = [call.convolves() for _, call in captured.matrices()]
    assert found == [(kernel, groups) == (3, 6), False]
    assert_exact(model, *batch(2, (6, 6, 6)))
    assert_sketch_is(captured, 37, ROUTES["fold"])


@pytest.mark.parametrize("size", [4, 32])  # few positions, and many
def test_products_are_signed_and_padded(size):
    images, labels = batch(3, (2, size, size))
    captured = capture(Image(nn.Conv2d(2, 8, 3), shape=(2, size, size)), images, labels)
    (_, call), *_ = captured.matrices()
    _, outputs, patch = call.shape()
    assert call.convolves() == (size == 32)
    signs = torch.randn(outputs, dtype=torch.float64), torch.randn(patch, dtype=torch.float64)
    plain = call.weight_gradient().movedim(2, 4).flatten(2)  # channels last, as patches are
    found = call.products(slice(0, 3), signs, patch + 2)
    torch.testing.assert_close(found[..., :patch], plain * signs[0][:, None] * signs[1])
    assert (found[..., patch:] == 0).all() and found.shape == (3, outputs, patch + 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_norm_s_gradients_are_sums_in_every_layout_and_precision(bias, layouts, dtype):
    norm = nn.BatchNorm2d(4, dtype=torch.float64)
    norm(torch.randn(8, 4, 7, 6, dtype=torch.float64) * 3 + 1)
    formats = torch.contiguous_format, torch.channels_last
    x, delta = (
        torch.randn(5, 4, 7, 6).to(dtype).contiguous(memory_format=formats[i]) for i in layouts
    )
    normal = nn.functional.batch_norm(x.double(), norm.running_mean, norm.running_var)
    expected = {"w": (delta.double() * normal).sum((2, 3)), "b": delta.double().sum((2, 3))}
    module = norm.to(torch.float64 if dtype == torch.float64 else torch.float32).eval()
    names = {"weight": "w", "bias": "b"} if bias else {"weight": "w"}
    found = Call(module, names, x, 0, delta).vectors()
    assert list(found) == list(names.values())
    for name, each in found.items():
        assert not each.requires_grad
        close = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(each.double(), expected[name], rtol=close, atol=10 * close)
