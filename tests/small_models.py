"""Small models in float64, their gradients by autograd, and the sketch as an explicit matrix."""

import math

import torch
import transformers
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from attribution.gradients.per_sample import capture
from attribution.gradients.sketch import Sketch

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
MIXED = ("ViT", "Swin", "ConvNext", "EfficientNet")


def tiny(name, **more):
    """The architecture with random weights, in float64 and eval mode."""
    settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=4, **more)
    torch.manual_seed(0)
    model = randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    for p in model.parameters():  # many are drawn so small, or zero, that gradients vanish
        p.data += 0.1 * torch.randn_like(p)
    return model


def images_of(name, size=3):
    side = ARCHITECTURES[name][1]
    return batch(size, (3, side, side))


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


class Added(nn.Module):
    """Adds a parameter to an activation (B, 5, 4), in a way of its own."""

    def __init__(self, how):
        super().__init__()
        self.how, self.row, self.head = how, nn.Linear(4, 4), nn.Linear(20, 3)
        shape = {"to tokens": (1, 4), "indexed": (3, 4), "a matrix": (5, 4), "a scalar": ()}
        self.p = nn.Parameter(torch.randn(shape.get(how, (1, 5, 4)), dtype=torch.float64))
        self.double().eval()

    def forward(self, x):
        x = self.row(x.flatten(2)).tanh()
        if self.how == "mixed":
            x = x + self.p.mean(0)
        elif self.how == "turned":
            x = x + self.p.flip(0)
        elif self.how == "indexed":
            x = x + self.p[torch.tensor([0, 2, 2, 1, 0])]
        elif self.how == "twice":
            x = x * self.p + self.p[:1]
        elif self.how != "unused":
            x = x + self.p
        return self.head(x.flatten(1))


def assert_features_are_the_projected_gradients(sketch, model, images, labels):
    expected = sketch.project(capture(model, images, labels))
    torch.testing.assert_close(sketch.features(model, images, labels)[0], expected)
