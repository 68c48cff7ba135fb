"""Per-sample gradients against autograd, sample by sample, and the models that are refused."""

import math
from collections import OrderedDict

import pytest
import torch
import transformers
from small_models import (
    ARCHITECTURES,
    BODIES,
    Added,
    BehindTheHooks,
    Image,
    InPlaceLater,
    OtherReference,
    Reader,
    SharedOut,
    Undecided,
    WithToken,
    assert_exact,
    assert_features_are_the_projected_gradients,
    batch,
    by_autograd,
    explicit,
    flat,
    images_of,
    small_resnet,
    tiny,
)
from torch import nn

from attribution.gradients import GradientError
from attribution.gradients.per_sample import capture, check, margins
from attribution.gradients.sketch import Sketch

torch.set_num_threads(1)  # the tensors are tiny; threads would only wait for each other
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_per_sample_gradients_equal_autograd(body):
    torch.manual_seed(0)
    assert_exact(Image(body()), *batch())


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


@pytest.mark.slow
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
    torch.testing.assert_close(captured.margins.sigmoid(), p.detach())
    assert not captured.logits.requires_grad and not captured.margins.requires_grad
    assert images.grad is None and all(q.grad is None for q in model.parameters())
    assert [q.requires_grad for q in model.parameters()].count(False) == 1
    assert not any(m._forward_hooks for m in model.modules())
    assert "classifier.1.bias" not in captured.per_sample()  # it is not trained


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
    with pytest.raises(GradientError, match=name):
        capture(REFUSED[name]().double().eval(), *batch())


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_sums_are_those_of_autograd(body):
    torch.manual_seed(0)
    check(Image(body()), batch()[0])


def test_frozen_parameters_stay_frozen_in_the_comparison_with_autograd():
    model = small_resnet()
    model.resnet.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    check(model, batch(2, (3, 20, 20))[0])
    assert [p.requires_grad for p in model.parameters()] == before and not all(before)


TRAINED = {
    "head": ("classifier.",),
    "last": ("resnet.encoder.stages.1.", "classifier."),
    "biases": ("bias",),
    "weights of norms": ("normalization.weight",),
}


@pytest.mark.parametrize("which", TRAINED)
def test_gradients_of_what_is_trained_equal_autograd_restricted_to_it(which):
    model, (images, labels) = small_resnet(), batch(3, (3, 20, 20))
    images, labels = images[[0, 0, 1, 1, 2, 2]], labels[[0, 0, 1, 1, 2, 2]]
    truth = by_autograd(model, images, labels)
    sketch = Sketch(64, dtype=torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in TRAINED[which]))
    captured = capture(model, images, labels)
    found = captured.per_sample()
    assert list(found) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert 0 < len(found) < len(truth)
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-10, msg=name)
    expected = flat(found) @ explicit(sketch, captured).T
    torch.testing.assert_close(sketch.features(model, images, labels)[0], expected)


def test_a_model_of_which_nothing_requires_gradients_is_taken_whole():
    model, given = small_resnet(), batch(2, (3, 20, 20))
    truth = capture(model, *given).per_sample()
    found = capture(model.requires_grad_(False), *given).per_sample()
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(found[name], value) for name, value in truth.items())


@pytest.mark.parametrize("body, name", [(Reader, "conv.weight"), (OtherReference, "cls_token")])
def test_sums_of_a_weight_that_is_read_beside_its_layer_are_refused(body, name):
    torch.manual_seed(0)
    with pytest.raises(GradientError, match=f"body.{name}: the gradients of single images do not"):
        check(Image(body()), batch()[0])


class Mixing(nn.Module):
    """Adds to each sample its neighbour in the batch, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x + 0.3 * x.roll(1, 0))


class Swapping(Mixing):
    """Gives the samples to its layer in another order, and puts them back."""

    def forward(self, x):
        return self.conv(x.flip(0)).flip(0)


class SwappingForGood(Mixing):
    """Gives each sample the place of another."""

    def forward(self, x):
        return self.conv(x).flip(0)


class MixingGradients(Mixing):
    """Mixes samples only in what the backward pass multiplies by."""

    def forward(self, x):
        y = self.conv(x)
        return y * (1 + 0.3 * (y - y.detach()).roll(1, 0)) + (y - y.detach()).roll(1, 0)


@pytest.mark.parametrize(
    "body, name",
    [
        (Mixing, "body.conv.weight"),
        (Swapping, "body.conv.weight"),
        (SwappingForGood, "head.weight"),
        (MixingGradients, "body.conv.weight"),
    ],
)
def test_samples_that_mix_or_change_places_are_refused(body, name):
    torch.manual_seed(0)
    with pytest.raises(GradientError, match=f"^{name}: .*samples mix or change places"):
        check(Image(body()), batch()[0])


@pytest.mark.parametrize("size", [2, 5])
def test_models_whose_samples_stay_apart_pass(size):
    check(small_resnet(), batch(size, (3, 20, 20))[0])


def test_refuses_weights_used_behind_the_hooks_back():
    with pytest.raises(GradientError, match="body.conv did not run"):
        capture(Image(BehindTheHooks()), *batch())


def test_refuses_train_mode_also_of_one_module():
    model = small_resnet()
    model.resnet.embedder.embedder.normalization.train()
    with pytest.raises(GradientError, match="embedder.normalization is in train mode"):
        capture(model, *batch(2, (3, 20, 20)))


@pytest.mark.parametrize("first", [nn.Identity, WithToken])
def test_refuses_overwritten_activations_and_cleans_up(first):
    model = Image(nn.Sequential(OrderedDict(first=first(), body=InPlaceLater())))
    with pytest.raises(GradientError, match="body.conv was overwritten"):
        capture(model, *batch())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_samples_that_leave_the_first_dimension():
    body = nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 5), nn.Unflatten(0, (-1, 3)))
    with pytest.raises(GradientError, match="body.1: its input has shape"):
        capture(Image(body), *batch())


def test_refuses_bad_labels_and_margins():
    model = Image(nn.Conv2d(3, 4, 3))
    images, labels = batch()
    with pytest.raises(GradientError, match="0..3"):
        capture(model, images, labels + 9)
    with pytest.raises(GradientError, match="two classes"):
        capture(model, images, labels[:-1])
    with pytest.raises(GradientError, match="sample 2 is not finite"):
        images[2, 0, 0, 0] = math.nan
        capture(model, images, labels)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_all_parameters_equal_autograd(name: str) -> None:
    assert_exact(tiny(name), *images_of(name))


@pytest.mark.parametrize(
    "how",
    ["plain", "unused", "a matrix", "a scalar", "to tokens", "mixed", "turned", "indexed", "twice"],
)
def test_a_parameter_without_a_rule_is_read_in_any_way(how: str) -> None:
    torch.manual_seed(0)
    model, (images, labels) = Added(how), batch(8, (5, 2, 2), 3)
    assert_exact(model, images, labels)
    sketch = Sketch(61, 1, torch.float64)
    assert_features_are_the_projected_gradients(sketch, model, images, labels)


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


def test_a_model_that_samples_leave_is_refused_by_name() -> None:
    config = transformers.MobileViTConfig(
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8],
        num_attention_heads=2,
        image_size=64,
    )
    model = transformers.MobileViTForImageClassification(config).eval()
    with pytest.raises(GradientError, match="layernorm_before: its input has shape"):
        capture(model.double(), *batch(2, (3, 64, 64)))
