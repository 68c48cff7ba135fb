"""Per-sample gradients against autograd, sample by sample; the sketch against an explicit matrix."""

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from attribution.errors import InputError
from attribution.gradients.layer_rules import Call
from attribution.gradients.per_sample import capture, check, margins
from attribution.gradients.sketch import Sketch, _Sums, dealt

torch.set_num_threads(1)  # the tensors are tiny; threads would only wait for each other

ROUTES = {"fold": lambda *_: False, "tensorsketch": lambda *_: True}


class Image(nn.Module):
    """Flattens what `body` makes of an image and classifies it, in float64 and eval mode."""

    def __init__(self, body, classes=4, shape=(3, 7, 6)):
        super().__init__()
        self.body = body
        width = body(torch.zeros(2, *shape)).flatten(1).shape[1]
        self.head = nn.Linear(width, classes)
        randomise(self)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Twice(nn.Module):
    """Uses one convolution and one linear layer twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.row = nn.Linear(6, 6)

    def forward(self, x):
        return self.row(torch.tanh(self.row(torch.tanh(self.conv(torch.tanh(self.conv(x)))))))


class Tied(nn.Module):
    """Two modules that share one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class InPlaceLater(nn.Module):
    """Overwrites the convolution's input after the convolution has read it."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.conv(x)
        x.add_(1)
        return x + y


class BehindTheHooks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return nn.functional.conv2d(x, self.conv.weight, self.conv.bias)


class WithToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        return x + self.cls_token


class Scaled(nn.Module):
    """A parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * self.temperature


class OtherReference(WithToken):
    """Reads its parameter by a name that is not the module's."""

    def __init__(self):
        super().__init__()
        self.same = [self.cls_token]

    def forward(self, x):
        return x * self.same[0]


class Reader(nn.Module):
    """Calls a layer, and reads its weight once more."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return nn.functional.conv2d(self.conv(x), self.conv.weight)


class Undecided(WithToken):
    def forward(self, x):
        return x + self.cls_token if self.cls_token.sum() > 0 else x


class SharedOut(nn.Module):
    """One weight in a layer with a rule and in one without."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), Subclass(3, 3, 1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.other(self.conv(x))


class Attention(nn.MultiheadAttention):
    """Reads the weight of its own Linear, which it does not call."""

    def __init__(self):
        super().__init__(6, 2, batch_first=True)

    def forward(self, x):
        return super().forward(*[x.flatten(1, 2)] * 3)[0]


class Windows(nn.Module):
    """Windows take the place of the samples, and a bias is made of no sample at all."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.row, self.norm, self.bias = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(2, 5)
        self.register_buffer("table", torch.randn(7, 2))

    def forward(self, x):
        rows = self.norm(self.row(x.flatten(0, 1) * self.scale))
        return (rows + self.bias(self.table)).view(len(x), -1)


def hooked():
    conv = nn.Conv2d(3, 3, 1)
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv


def patched():
    conv = nn.Conv2d(3, 3, 1)
    conv.forward = lambda x: 2 * nn.functional.conv2d(x, conv.weight, conv.bias)
    return conv


class SameForward(nn.Conv2d):
    pass


class Behind(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.tanh(), bias)


class Subclass(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def randomise(model):
    """Running statistics and scales that are not one and zero; float64, eval mode."""
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "running_mean" in name:
            tensor.data.normal_(0, 0.2)
        elif "running_var" in name:
            tensor.data.uniform_(0.4, 1.6)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.data += 0.3 * torch.randn_like(tensor)
    return model.double().eval()


def batch(size=5, shape=(3, 7, 6), classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *shape, generator=g, dtype=torch.float64)
    # A part that all samples share, so that their gradients are correlated.
    images += torch.randn(shape, generator=g, dtype=torch.float64)
    return images, torch.randint(classes, (size,), generator=g)


def by_autograd(model, images, labels):
    """The oracle: one backward pass per sample, each in a batch of its own."""
    # Contiguous, because torch 2.15 contradicts itself on a grouped 1x1 convolution in
    # float64 of one channels-last image inside a model.
    layout = torch.contiguous_format
    model, images = model.to(memory_format=layout), images.contiguous(memory_format=layout)
    rows = []
    for image, label in zip(images, labels, strict=True):
        output = model(image[None])
        logits = getattr(output, "logits", output)[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        f = logits[label] - others.exp().sum().log()
        rows.append(torch.autograd.grad(f, list(model.parameters()), materialize_grads=True))
    names = [name for name, _ in model.named_parameters()]
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, stacked, strict=True))


def assert_exact(model, images, labels):
    found = capture(model, images, labels).per_sample()
    truth = by_autograd(model, images, labels)
    assert list(found) == list(truth)
    for name, value in truth.items():
        assert found[name].shape == value.shape
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def flat(gradients):
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def small_resnet(**config):
    config = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 2]} | config
    torch.manual_seed(1)
    config = ResNetConfig(layer_type="basic", num_labels=4, **config)
    return randomise(ResNetForImageClassification(config))


BODIES = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "padded": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), bias=False),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=1),
    "grouped": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1),
    "same": lambda: nn.Conv2d(3, 4, (4, 3), padding="same"),
    "valid": lambda: nn.Conv2d(3, 4, 2, padding="valid"),
    "pointwise": lambda: nn.Conv2d(3, 4, 1),
    "relu in place": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)),
    "linear, 4 dimensions": lambda: nn.Linear(6, 5),
    "linear, 3 dimensions": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(42, 5)),
    "linear, 2 dimensions": lambda: nn.Sequential(nn.Flatten(), nn.Linear(126, 5, bias=False)),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "batch norm first": lambda: nn.BatchNorm2d(3),
    "batch norm 1d": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(126)),
    "batch norm 1d, 3 dimensions": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3)),
    "layer norm": lambda: nn.LayerNorm((7, 6)),
    "layer norm last": lambda: nn.LayerNorm(6, bias=False),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    "shared module": Twice,
    "tied weight": Tied,
    "token": WithToken,
    "scalar": Scaled,
    "a hook of its user's": hooked,
    "a forward of its user's": patched,
    "token, relu in place": lambda: nn.Sequential(WithToken(), *BODIES["relu in place"]()),
    "token, shared module": lambda: nn.Sequential(WithToken(), Twice(), nn.GroupNorm(1, 3)),
    "token, tied weight": lambda: nn.Sequential(WithToken(), Tied()),
    "token, batch norm 1d": lambda: nn.Sequential(WithToken(), *BODIES["batch norm 1d"]()),
    "reflected": lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    "subclass": lambda: Subclass(3, 3, 1),
    "subclass with the same forward": lambda: SameForward(3, 3, 1),
    "subclass behind forward": lambda: Behind(3, 3, 1),
    "weight norm": lambda: nn.utils.weight_norm(nn.Conv2d(3, 3, 1)),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
    "attention": Attention,
    "windows": Windows,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_per_sample_gradients_equal_autograd(body):
    torch.manual_seed(0)
    assert_exact(Image(body()), *batch())


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


@pytest.mark.parametrize("size", [4, 16])  # few positions, and many
def test_factors_or_products_are_signed_and_come_to_the_same(size):
    images, labels = batch(3, (2, size, size))
    captured = capture(Image(nn.Conv2d(2, 8, 3), shape=(2, size, size)), images, labels)
    (_, call), *_ = captured.matrices()
    positions, outputs, patch = call.shape()
    assert (positions * (outputs + patch) > outputs * patch) == (size == 16)
    signs = torch.randn(outputs, dtype=torch.float64), torch.randn(patch, dtype=torch.float64)
    plain = call.products(slice(0, 3))
    found = call.products(slice(0, 3), signs, patch + 2)
    torch.testing.assert_close(found[..., :patch], plain * signs[0][:, None] * signs[1])
    assert (found[..., patch:] == 0).all() and found.shape == (3, outputs, patch + 2)


@pytest.mark.parametrize("values", [1, 10**9])  # of a sample, from which PyTorch's sums are taken
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_ways_to_sum_a_batch_norm_s_gradients(monkeypatch, values, bias, layouts, dtype):
    monkeypatch.setattr("attribution.gradients.layer_rules.LONG_NORM", values)
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


@pytest.mark.parametrize("bfloat16", [False, True])
def test_layers_sketched_during_the_backward_pass_give_the_same(monkeypatch, bfloat16):
    monkeypatch.setattr("attribution.gradients.batchnorm.POSITIONS_OF_ENTRY", math.inf)
    model, (images, labels) = small_resnet().float(), batch(5, (3, 20, 20))
    sketch = Sketch(64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        features, found = sketch.features(model, images.float(), labels)
        captured = capture(model, images.float(), labels)
    assert torch.equal(found, captured.margins)
    scale = features.abs().max().item()
    torch.testing.assert_close(features, sketch.project(captured), rtol=0, atol=1e-5 * scale)


def test_what_is_handed_over_is_let_go_of():
    model, (images, labels) = small_resnet(), batch(3, (3, 20, 20))
    seen = []

    def receive(call):
        seen.append(call)
        assert call.delta is not None and not torch.is_autocast_enabled("cpu")

    captured = capture(model, images, labels, receive)
    assert captured.calls == [] and len(seen) > 5
    assert all(call.input is None and call.delta is None for call in seen)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_resnet(layout):
    images, labels = batch(4, (3, 20, 20))
    assert_exact(small_resnet().to(memory_format=layout), images, labels)


def test_resnet18_config_on_tiny_images():
    model = small_resnet(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
    assert_exact(model, *batch(2, (3, 32, 32)))


def test_margin_is_log_odds():
    logits = torch.randn(6, 2, dtype=torch.float64) * 5
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    torch.testing.assert_close(
        margins(logits, labels), logits[range(6), labels] - logits[range(6), 1 - labels]
    )
    logits = torch.randn(6, 5, dtype=torch.float64)
    p = logits.softmax(1)[range(6), labels]
    torch.testing.assert_close(margins(logits, labels), p.log() - (1 - p).log())


def test_capture_reports_and_leaves_no_trace():
    model = small_resnet()
    model.classifier[1].bias.requires_grad_(False)
    images, labels = batch(4, (3, 20, 20))
    captured = capture(model, images.requires_grad_(), labels)
    p = model(images).logits.softmax(1)[range(4), labels]
    torch.testing.assert_close(captured.probability, p.detach())
    assert not captured.logits.requires_grad and not captured.margins.requires_grad
    assert images.grad is None and all(q.grad is None for q in model.parameters())
    assert [q.requires_grad for q in model.parameters()].count(False) == 1
    assert not any(m._forward_hooks for m in model.modules())
    assert "classifier.1.bias" in captured.per_sample()  # frozen parameters count too


def test_capture_works_under_no_grad():
    with torch.no_grad():
        assert len(capture(small_resnet(), *batch(2, (3, 20, 20))).calls) > 5


REFUSED = {
    "0.cls_token.*vmap cannot": lambda: nn.Sequential(Undecided(), nn.Flatten(), nn.Linear(126, 4)),
    "0.conv.weight: shared": lambda: nn.Sequential(SharedOut()),
    "running statistics": lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_what_no_rule_covers(name):
    with pytest.raises(InputError, match=name):
        capture(REFUSED[name]().double().eval(), *batch())


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_sums_are_those_of_autograd(body):
    torch.manual_seed(0)
    check(Image(body()), batch()[0])


def test_sums_of_frozen_parameters_count_and_they_stay_frozen():
    model = small_resnet()
    model.classifier.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    check(model, batch(2, (3, 20, 20))[0])
    assert [p.requires_grad for p in model.parameters()] == before and not all(before)


@pytest.mark.parametrize("body, name", [(Reader, "conv.weight"), (OtherReference, "cls_token")])
def test_sums_of_a_weight_that_is_read_beside_its_layer_are_refused(body, name):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=f"body.{name}: the gradients of single images do not"):
        check(Image(body()), batch()[0])


def test_refuses_weights_used_behind_the_hooks_back():
    with pytest.raises(InputError, match="body.conv did not run"):
        capture(Image(BehindTheHooks()), *batch())


def test_refuses_train_mode_also_of_one_module():
    model = small_resnet()
    model.resnet.embedder.embedder.normalization.train()
    with pytest.raises(InputError, match="embedder.normalization is in train mode"):
        capture(model, *batch(2, (3, 20, 20)))


@pytest.mark.parametrize("first", [nn.Identity, WithToken])
def test_refuses_overwritten_activations_and_cleans_up(first):
    model = Image(nn.Sequential(OrderedDict(first=first(), body=InPlaceLater())))
    with pytest.raises(InputError, match="body.conv was overwritten"):
        capture(model, *batch())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_samples_that_leave_the_first_dimension():
    body = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 5), nn.Unflatten(0, (-1, 3)))
    with pytest.raises(InputError, match="body.1: its input has shape"):
        capture(Image(body), *batch())


def test_refuses_bad_labels_and_margins():
    model = Image(nn.Conv2d(3, 4, 3))
    images, labels = batch()
    with pytest.raises(InputError, match="0..3"):
        capture(model, images, labels + 9)
    with pytest.raises(InputError, match="two classes"):
        capture(model, images, labels[:-1])
    with pytest.raises(InputError, match="sample 2 is not finite"):
        images[2, 0, 0, 0] = math.nan
        capture(model, images, labels)


def explicit(sketch, captured):
    """S (k, n_params), entry by entry from the tables; column order is that of the parameters."""
    columns, device = [], captured.margins.device
    matrices = dict(captured.matrices())
    for name, shape in captured.shapes.items():
        if name in matrices:
            table = sketch._hash(name, shape, captured.margins)
            assert math.gcd(table.stride, sketch.proj_dim) == 1
            o, c, y, x = shape if len(shape) == 4 else (*shape, 1, 1)
            index = torch.arange(o * c * y * x).view(o, c, y, x).permute(0, 2, 3, 1)
            entries = [None] * index.numel()  # the sketch counts patches as (y, x, c)
            for i, row in enumerate(index.flatten(1).tolist()):
                for p, target in enumerate(row):
                    cell = (table.offset + i * table.stride + p) % sketch.proj_dim
                    entries[target] = cell, (table.rows[i] * table.columns[p]).item()
            columns += entries
        else:
            n = shape.numel()
            sketch._add_vector(name, torch.zeros(1, n), torch.zeros(1, sketch.proj_dim))
            offset, signs = sketch._tables[name, n, device, torch.float32]
            columns += [((offset + i) % sketch.proj_dim, s.item()) for i, s in enumerate(signs)]
    s = torch.zeros(sketch.proj_dim, len(columns), dtype=torch.float64, device=device)
    for i, (cell, sign) in enumerate(columns):
        s[cell, i] = sign
    return s


def routed(k, seed=0, route=None):
    sketch = Sketch(k, seed, dtype=torch.float64)
    if route is not None:
        sketch.tensorsketches = route
    return sketch


def assert_sketch_is(captured, k, route, seed=0):
    sketch = routed(k, seed, route)
    truth = flat(captured.per_sample()) @ explicit(sketch, captured).T
    torch.testing.assert_close(sketch.project(captured), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("k", [1, 2, 31, 256, 5000])
def test_sketch_equals_its_matrix_times_the_gradient(k, route):
    assert_sketch_is(capture(small_resnet(), *batch(3, (3, 20, 20))), k, route, seed=k)
    assert_sketch_is(capture(Image(Twice()), *batch()), k, route)


def test_both_routes_occur_and_the_default_mixes_them():
    captured = capture(small_resnet(), *batch(3, (3, 20, 20)))
    sketch = Sketch(64)
    chosen = {sketch.tensorsketches(*call.shape()) for _, call in captured.matrices()}
    wide = Sketch(1024).tensorsketches(4, 512, 4608), Sketch(1024).tensorsketches(3136, 64, 576)
    assert chosen == {False} and wide == (True, False)
    assert_sketch_is(captured, 64, None)


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
        Sketch(k)._add_folds(call, table, _Sums(cells[:, None], None, {"w": 0}))
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
    with pytest.raises(InputError, match="proj_dim is 0"):
        Sketch(0)
