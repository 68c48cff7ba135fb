"""Our parts in traker's engine, against a dense reference and against traker's own parts."""

import json
import logging
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector
from transformers import ResNetConfig, ResNetForImageClassification

from attribution.errors import InputError
from attribution.gradients.per_sample import capture
from attribution.gradients.sketch import Sketch
from attribution.scores.features import Store
from attribution.scores.ridge import Ridge
from attribution.scores.trak import combine
from attribution.scores.traker_adapters import (
    HookGradientComputer,
    MarginOutput,
    SketchProjector,
)

torch.set_num_threads(1)
TRAIN, TARGETS, DIM, RIDGE = 40, 12, 64, 0.1


def network(seed):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config).eval()


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (TRAIN + TARGETS,), generator=g)
    images = torch.randn(len(labels), 3, 16, 16, generator=g)
    images += 2 * torch.randn(3, 3, 1, 1, generator=g)[labels]
    return (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])


def scores_of(folder, data, models, projector, computer=HookGradientComputer, size=16):
    """Scores (n, m) from features of traker's engine with our parts, as the project combines them."""
    model, stores = network(0), [Store(folder / str(i), i) for i in range(len(models))]
    for store, checkpoint in zip(stores, models, strict=True):
        for split, (images, labels) in zip(("train", "validation"), data, strict=True):
            traker = TRAKer(
                model=model,
                task=MarginOutput(),
                train_set_size=len(images),
                save_dir=str(store.shard(split, 0)),
                device="cpu",
                gradient_computer=computer,
                projector=projector,
                use_half_precision=False,
                logging_level=logging.ERROR,
            )
            traker.load_checkpoint(checkpoint.state_dict(), model_id=store.model_id)
            for x, y in zip(images.split(size), labels.split(size), strict=True):
                traker.featurize((x, y), num_samples=len(x))
    return np.array(combine(stores, folder / "scores.npy", Ridge(RIDGE)).values)


def reference(data, models, ridge=RIDGE):
    """The formula of the design, densely, in float64."""
    inner, weight = 0, 0
    for i, model in enumerate(models):
        sketch = Sketch(DIM, f"3/{i}")
        train, target = (capture(model, *split) for split in data)
        f, g = sketch.project(train).double(), sketch.project(target).double()
        gram = f.T @ f
        gram += ridge * gram.trace() / DIM * torch.eye(DIM)
        inner = inner + f @ torch.linalg.inv(gram) @ g.T / len(models)
        weight = weight + (1 - train.margins.double().sigmoid()) / len(models)
    return (inner * weight[:, None]).numpy()


def test_scores_equal_the_dense_formula(tmp_path, data):
    models = [network(1), network(2)]
    found = scores_of(tmp_path, data, models, SketchProjector(DIM, 3))
    truth = reference(data, models)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4 * np.abs(truth).max())
    assert np.abs(truth).max() > 0


@pytest.mark.slow
def test_scores_rank_as_with_trakers_own_gradients_and_projection(tmp_path, data):
    model, dim = network(1), 4096
    ours = scores_of(tmp_path / "ours", data, [model], SketchProjector(dim))
    size = sum(p.numel() for p in model.parameters())
    dense = BasicProjector(size, dim, seed=0, proj_type="normal", device="cpu", block_size=1024)
    theirs = scores_of(tmp_path / "theirs", data, [model], dense, FunctionalGradientComputer)
    ranks = [spearmanr(ours[:, j], theirs[:, j])[0] for j in range(TARGETS)]
    assert np.mean(ranks) > 0.9


def test_margin_output_equals_trakers_own(data):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network(1)

        def forward(self, x):
            return self.model(x).logits

    (images, labels), _ = data
    plain, rich = Logits().eval(), network(1)

    def outputs(task, model):
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        f = torch.stack(
            [task.get_output(model, weights, buffers, *z) for z in zip(images, labels, strict=True)]
        )
        return f.detach(), task.get_out_to_loss_grad(model, weights, buffers, (images, labels))

    theirs = outputs(ImageClassificationModelOutput(), plain)
    for found in (outputs(MarginOutput(), plain), outputs(MarginOutput(), rich)):
        torch.testing.assert_close(found[0], theirs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], theirs[1], rtol=1e-4, atol=1e-5)
        assert found[1].shape == (TRAIN, 1)


def test_loss_gradient_needs_no_second_pass_and_follows_the_checkpoint(data):
    (images, labels), _ = data
    passes = []
    model = network(1)
    model.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    computer, projector = HookGradientComputer(model, MarginOutput()), SketchProjector(16)
    with pytest.raises(RuntimeError, match="just projected"):
        computer.compute_loss_grad((images, labels))
    projector.project(computer.compute_per_sample_grad((images, labels)), 0)
    weight = computer.compute_loss_grad((images, labels))
    assert passes == [len(labels)]
    probability = model(images).logits.softmax(1)[range(len(labels)), labels]
    torch.testing.assert_close(weight, 1 - probability[:, None].detach(), rtol=1e-4, atol=1e-6)
    model.load_state_dict(network(2).state_dict())
    computer.load_model_params(model)
    projector.project(computer.compute_per_sample_grad((images, labels)), 1)
    assert not torch.allclose(computer.compute_loss_grad((images, labels)), weight)


def test_loss_gradient_of_a_memorised_example_is_small_but_not_zero(data):
    (images, labels), _ = data
    model = network(1)
    with torch.no_grad():
        model.classifier[1].bias.zero_()[labels[0]] = 30
    computer, first = HookGradientComputer(model, MarginOutput()), (images[:1], labels[:1])
    f = capture(model, *first).margins.double()
    SketchProjector(16).project(computer.compute_per_sample_grad(first), 0)
    for found in (
        computer.compute_loss_grad(first),
        MarginOutput().get_out_to_loss_grad(
            model, dict(model.named_parameters()), dict(model.named_buffers()), first
        ),
    ):
        assert found.item() == pytest.approx(float(1 / (1 + f.exp())), rel=1e-3) and found > 0


def test_projector_is_independent_by_model_and_described_in_json(data):
    pending = HookGradientComputer(network(1), MarginOutput()).compute_per_sample_grad(data[1])
    projector = SketchProjector(32, seed=1)
    assert json.dumps(projector.proj_type) == '"sketch"'
    first, other = projector.project(pending, 0), projector.project(pending, 1)
    assert not torch.allclose(first, other)
    first_again = projector.project(pending, 0)
    assert torch.equal(first, first_again)
    first /= 2  # as traker does: it must not reach the projector
    projector.free_memory()
    assert torch.equal(projector.project(pending, 0), first_again)


def test_scores_in_bfloat16_stay_close(tmp_path, data):
    models = [network(1), network(2)]
    full = scores_of(tmp_path / "f", data, models, SketchProjector(DIM, 3))
    half = scores_of(
        tmp_path / "h",
        data,
        models,
        SketchProjector(DIM, 3),
        partial(HookGradientComputer, bfloat16=True),
    )
    assert not np.array_equal(full, half)
    assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.99


def test_projected_blocks_lie_side_by_side_and_add_up_to_one(data):
    model = network(1)
    pending = HookGradientComputer(model, MarginOutput()).compute_per_sample_grad(data[1])
    one = SketchProjector(16, seed=1).project(pending, 2)
    three = SketchProjector(48, seed=1, num_blocks=3).project(pending, 2)
    assert three.shape == (TARGETS, 48)
    torch.testing.assert_close(three.view(-1, 3, 16).sum(1), one, rtol=1e-4, atol=1e-4)
    expected = Sketch(16, "1/2", num_blocks=3).project(capture(model, *data[1]))
    torch.testing.assert_close(three, expected, rtol=1e-4, atol=1e-4)


def test_a_part_of_the_parameters_is_refused():
    with pytest.raises(InputError, match="grad_wrt"):
        HookGradientComputer(network(1), MarginOutput(), grad_wrt=["classifier.1.bias"])
