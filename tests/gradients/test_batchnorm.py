"""Convolutions that run as one with their BatchNorm: the same gradients, and no others are taken for a pair."""

from collections import OrderedDict

import pytest
import torch
from test_per_sample import ROUTES, Image, batch, randomise, small_resnet
from torch import nn

from attribution.errors import InputError
from attribution.gradients import batchnorm
from attribution.gradients.batchnorm import Fused, _scaled, running
from attribution.gradients.per_sample import Shortcuts, capture
from attribution.gradients.shortcuts import survey
from attribution.gradients.sketch import Sketch


def chain(*modules):
    return nn.Sequential(OrderedDict((f"m{i}", module) for i, module in enumerate(modules)))


def conv(outputs=4, inputs=3, kernel=3, **more):
    return nn.Conv2d(inputs, outputs, kernel, **more)


ALIKE = {
    "plain": lambda: chain(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU()),
    "biased": lambda: chain(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "padded": lambda: chain(conv(padding=1, stride=2), nn.BatchNorm2d(4)),
    "same": lambda: chain(conv(kernel=2, padding="same"), nn.BatchNorm2d(4)),
    "dilated": lambda: chain(conv(dilation=2, padding=2), nn.BatchNorm2d(4)),
    "grouped": lambda: chain(conv(6, groups=3), nn.BatchNorm2d(6)),
    "depthwise": lambda: chain(conv(3, groups=3), nn.BatchNorm2d(3), nn.Hardswish()),
    "two": lambda: chain(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(5, 4), nn.BatchNorm2d(5)),
    "norms first": lambda: Reversed(),
}


class Reversed(nn.Module):
    """Its BatchNorm is registered before the convolution, and so belongs to another block of layers."""

    def __init__(self):
        super().__init__()
        self.before, self.norm, self.conv = conv(3, padding=1), nn.BatchNorm2d(4), conv()

    def forward(self, x):
        return self.norm(self.conv(self.before(x)))


class Reads(nn.Module):
    """Does something with the convolution's output beside giving it to the BatchNorm."""

    def __init__(self, what):
        super().__init__()
        self.what, self.conv, self.norm = what, conv(4, padding=1), nn.BatchNorm2d(4)
        if what.endswith("norms"):
            self.other = nn.BatchNorm2d(4)
        if what == "tied":
            self.norm.bias = self.conv.bias

    def forward(self, x):
        x = self.conv(x)
        if self.what == "before":
            x.mul_(2)
        if self.what == "shape":
            assert x.shape[1] == 4 and x.dim() == 4
        y = self.norm(x)
        if self.what == "residual":
            return y + x
        if self.what == "detached":
            return y * x.detach().mean()
        if self.what == "twice":
            return self.norm(y)
        if self.what == "again":
            return y + self.conv(y[:, :3])
        if self.what == "two norms":
            return y * self.other(x).sigmoid()
        if self.what == "own norms":
            return y + self.other(self.conv(y[:, :3]))
        return y


class Sometimes(Reads):
    """Leaves the BatchNorm out where images are bright."""

    def forward(self, x):
        y = self.conv(x)
        if x.mean() < 10:
            return self.norm(y)
        return self.norm(y.clone()) if self.what == "clone" else y


def model_of(body):
    torch.manual_seed(0)
    model = Image(body)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::2] *= -1
    return model


def assert_features_are_those_of_plain_gradients(sketch, model, images, labels):
    expected = sketch.project(capture(model, images, labels))
    features, _ = sketch.features(model, images, labels)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


def pairs(model, images):
    return survey(model, images).pairs


def fused(sketch, model, images):
    return sketch._shortcuts(model, images).fused


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr("attribution.gradients.sketch.FEW", 1)


@pytest.fixture
def all_pay(monkeypatch):
    monkeypatch.setattr(batchnorm, "POSITIONS_OF_ENTRY", 0)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("k", [1, 37, 500])
@pytest.mark.parametrize("name", ALIKE)
def test_features_are_the_sketch_of_the_gradients_of_the_parameters_as_they_are(
    all_pay, name, k, blocks
):
    model = model_of(ALIKE[name]())
    images, labels = batch()
    sketch = Sketch(k, 3, torch.float64, blocks)
    sketch.tensorsketches = ROUTES["fold"]
    assert len(fused(sketch, model, images)) == (2 if name == "two" else 1)
    features, margins = sketch.features(model, images, labels)
    captured = capture(model, images, labels)
    assert not any(isinstance(call, Fused) for call in captured.calls)
    torch.testing.assert_close(features, sketch.project(captured), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(margins, captured.margins, rtol=1e-9, atol=1e-9)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("scratch", [1, 2**21])
@pytest.mark.parametrize("long_map", [1, 10**9])
def test_every_route_of_a_product_gives_the_same(all_pay, monkeypatch, long_map, scratch):
    monkeypatch.setattr("attribution.gradients.layer_rules.LONG_MAP", long_map)
    monkeypatch.setattr("attribution.gradients.layer_rules.CPU_SCRATCH", scratch)
    model, (images, labels) = small_resnet(), batch(5, (3, 20, 20))
    sketch = Sketch(50, 1, torch.float64)
    sketch.tensorsketches = ROUTES["fold"]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(fused(sketch, model, images).values()) == set(norms)
    features, _ = sketch.features(model, images, labels)
    expected = sketch.project(capture(model, images, labels))
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


def test_a_fused_call_forms_the_weight_s_gradient_without_signs_too(all_pay):
    model, (images, labels) = model_of(ALIKE["biased"]()), batch()
    found = {}

    def receive(call):
        if isinstance(call, Fused):
            found["w"] = call.weight_gradient()
            found.update(call.vectors())

    shortcuts = Shortcuts({pair.conv: pair.norm for pair in pairs(model, images)})
    capture(model, images, labels, receive, shortcuts)
    expected = capture(model, images, labels).per_sample()
    torch.testing.assert_close(found["w"], expected["body.m0.weight"])
    torch.testing.assert_close(found["body.m0.bias"], expected["body.m0.bias"])
    torch.testing.assert_close(found["body.m1.bias"], expected["body.m1.bias"])


@pytest.mark.parametrize(
    "what, count",
    [("nothing", 1), ("shape", 1)]
    + [(each, 0) for each in ("residual", "detached", "before", "twice", "again", "tied")]
    + [("two norms", 0), ("own norms", 0)],
)
def test_a_pair_is_what_nothing_else_reads_and_runs_once(all_pay, what, count):
    model, (images, labels) = model_of(Reads(what)), batch()
    sketch = Sketch(37, dtype=torch.float64)
    sketch.tensorsketches = ROUTES["fold"]
    assert len(pairs(model, images)) == len(fused(sketch, model, images)) == count
    expected = sketch.project(capture(model, images, labels))
    torch.testing.assert_close(sketch.features(model, images, labels)[0], expected)


@pytest.mark.parametrize("where", ["conv", "norm"])
@pytest.mark.parametrize(
    "hook", ["forward", "forward_pre", "full_backward", "full_backward_pre", "patched"]
)
@pytest.mark.parametrize("late", [False, True])
def test_what_someone_else_looks_at_is_left_alone(all_pay, where, hook, late):
    model, (images, labels) = model_of(Reads("nothing")), batch()
    sketch = Sketch(37, dtype=torch.float64)
    if late:
        sketch.features(model, images, labels)
    module = getattr(model.body, where)
    if hook == "patched":
        module.forward = module.forward
    else:
        getattr(module, f"register_{hook}_hook")(lambda *_: None)
    # What is done to a convolution's input happens before either way.
    left = hook == "forward_pre" and where == "conv"
    assert len([pair for pair in pairs(model, images) if pair.pays()]) == left
    sketch.tensorsketches = ROUTES["fold"]
    assert len(fused(sketch, model, images)) == left


def test_neither_what_is_short_nor_what_is_hashed_nor_a_channel_without_weight_is_fused():
    def body():
        return chain(conv(bias=False, kernel=5), nn.BatchNorm2d(4), nn.ReLU())

    model, (images, labels) = model_of(body()), batch(5, (3, 7, 6))
    sketch = Sketch(37, dtype=torch.float64)
    (pair,) = pairs(model, images)
    assert pair.shape == (6, 4, 75) and pair.dtype == torch.float64 and not pair.pays()
    torch.manual_seed(0)
    model, (images, labels) = Image(body(), shape=(3, 7, 24)), batch(5, (3, 7, 24))
    assert pairs(model, images)[0].pays() and len(fused(sketch, model, images)) == 1
    sketch.tensorsketches = ROUTES["tensorsketch"]
    assert not fused(sketch, model, images)
    sketch.tensorsketches = ROUTES["fold"]
    model.body.m1.weight.data[1] = 0
    assert not fused(sketch, model, images)
    assert_features_are_those_of_plain_gradients(sketch, model, images, labels)
    model.body.m1.weight.data[1] = 1
    (pair,) = pairs(model.float(), images.float())
    assert pair.pays()
    model.body.m0.half()
    assert not pair.pays()


def later(model, what):
    if what == "weight norm":
        nn.utils.parametrizations.weight_norm(model.head)
    elif what == "norm":
        model.body.norm = nn.BatchNorm2d(4)
    elif what == "conv":
        model.body.conv = conv(4, padding=1)
    elif what == "stray":
        model.body.register_parameter("p", nn.Parameter(torch.ones(1)))
        model.body.register_forward_hook(lambda module, _, output: output * module.p)
    model.double().eval()


@pytest.mark.parametrize("what", ["nothing", "weight norm", "norm", "conv", "stray"])
def test_a_model_may_change_after_it_was_looked_at(all_pay, what):
    model, (images, labels) = model_of(Reads("nothing")), batch()
    sketch = Sketch(37, dtype=torch.float64)
    sketch.tensorsketches = ROUTES["fold"]
    sketch.features(model, images, labels)
    assert fused(sketch, model, images)
    later(model, what)
    assert_features_are_those_of_plain_gradients(sketch, model, images, labels)


def test_what_ran_as_one_is_not_hashed_whatever_the_route_says_then(all_pay):
    model, (images, labels) = model_of(ALIKE["plain"]()), batch()
    answers = iter([False])
    sketch = Sketch(37, dtype=torch.float64)
    expected = sketch.project(capture(model, images, labels))
    sketch.tensorsketches = lambda *_: next(answers, True)
    torch.testing.assert_close(sketch.features(model, images, labels)[0], expected)


def test_without_a_receiver_layers_run_one_by_one(all_pay):
    model, (images, labels) = model_of(ALIKE["plain"]()), batch()
    shortcuts = Shortcuts({pair.conv: pair.norm for pair in pairs(model, images)})
    found = capture(model, images, labels, shortcuts=shortcuts).per_sample()
    for name, value in capture(model, images, labels).per_sample().items():
        assert torch.equal(found[name], value) and value.any()


def test_images_of_integers_are_taken_as_before():
    model, (images, labels) = model_of(chain(Doubled(), *ALIKE["plain"]())), batch()
    images = (images * 50).to(torch.uint8)
    sketch = Sketch(37, dtype=torch.float64)
    assert not fused(sketch, model, images)
    assert_features_are_those_of_plain_gradients(sketch, model, images, labels)


class Doubled(nn.Module):
    def forward(self, x):
        return x.double() if not x.is_floating_point() else x


def test_a_channel_of_little_weight_loses_no_digits(all_pay):
    model, (images, labels) = model_of(ALIKE["biased"]()), batch()
    model.body.m1.weight.data[1] = 1e-12
    sketch = Sketch(500, dtype=torch.float64)
    assert fused(sketch, model, images)
    expected = sketch.project(capture(model, images, labels))
    features, _ = sketch.features(model, images, labels)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["clone", "left out"])
def test_layers_that_run_in_another_order_later_are_refused(all_pay, what):
    model, (images, labels) = model_of(Sometimes(what)), batch()
    sketch = Sketch(37, dtype=torch.float64)
    sketch.tensorsketches = ROUTES["fold"]
    sketch.features(model, images, labels)
    with pytest.raises(InputError, match="another order"):
        sketch.features(model, images + 20, labels)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    sketch.features(model, images, labels)


def test_weights_that_change_are_seen(all_pay):
    model, (images, labels) = model_of(ALIKE["two"]()), batch()
    sketch = Sketch(37, dtype=torch.float64)
    sketch.tensorsketches = ROUTES["fold"]
    sketch.features(model, images, labels)
    torch.manual_seed(1)
    randomise(model)
    expected = sketch.project(capture(model, images, labels))
    torch.testing.assert_close(sketch.features(model, images, labels)[0], expected)


def test_bfloat16_is_no_further_from_float64_than_the_layers_one_by_one(all_pay, monkeypatch):
    model, (images, labels) = small_resnet(), batch(16, (3, 20, 20))
    sketch = Sketch(512, dtype=torch.float64)
    sketch.tensorsketches = ROUTES["fold"]
    truth = sketch.project(capture(model, images, labels))
    model, images = model.float(), images.float()

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = sketch.features(model, images, labels)
        return ((found - truth).norm() / truth.norm()).item()

    as_one = error()
    monkeypatch.setattr(batchnorm, "POSITIONS_OF_ENTRY", float("inf"))
    one_by_one = error()
    assert 0 < as_one < 1.2 * one_by_one < 0.1


@pytest.mark.parametrize("affine", [True, False])
def test_our_own_normalisation_is_batch_norm_s(affine: bool) -> None:
    norm = nn.BatchNorm2d(5, affine=affine, dtype=torch.float64)
    norm(torch.randn(8, 5, 4, 3, dtype=torch.float64) * 3 + 1)
    norm.eval()
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(norm(x), x, delta)
    with running([norm], {}, {}):
        output = norm(x)
        assert "_Normalise" in type(output.grad_fn).__name__
        (found,) = torch.autograd.grad(output, x, delta)
    torch.testing.assert_close(output, norm(x))
    torch.testing.assert_close(found, expected)
    last = delta.contiguous(memory_format=torch.channels_last)
    for each in delta, last:  # a GPU's backward pass
        torch.testing.assert_close(_scaled(each, norm), expected)
        assert _scaled(each, norm).stride() == each.stride()
