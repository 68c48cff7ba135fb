"""Our parts in traker's engine, against a dense reference and against traker's own parts."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_trak import config_of
from torch import nn
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, NoOpProjector
from transformers import ResNetConfig, ResNetForImageClassification

from attribution.gradients.per_sample import capture
from attribution.gradients.sketch import Sketch
from attribution.scores.features import Store
from attribution.scores.trak import score
from attribution.scores.traker_adapters import MarginOutput, SketchComputer

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


def scores_of(folder, data, models, parts, size=16):
    """Scores (n, m) from features of traker's engine, as the project combines them.

    Args:
        parts: gradients and projector by the number of the model.
    """
    model, stores = network(0), [Store(folder / str(i), i) for i in range(len(models))]
    for store, checkpoint in zip(stores, models, strict=True):
        computer, projector = parts(store.model_id)
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
    return np.array(score(config_of(stores, RIDGE), stores, folder / "scores.npy").values)


def ours(dim, **given):
    """The sketch as gradients without a projection, as features.run_traker has it."""

    def parts(model_id):
        computer = partial(SketchComputer, sketch=Sketch(dim, f"3/{model_id}"), **given)
        return computer, NoOpProjector(proj_dim=dim, device="cpu")

    return parts


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
    found = scores_of(tmp_path, data, models, ours(DIM))
    truth = reference(data, models)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4 * np.abs(truth).max())
    assert np.abs(truth).max() > 0


@pytest.mark.slow
def test_scores_rank_as_with_trakers_own_gradients_and_projection(tmp_path, data):
    model, dim = network(1), 4096
    sketched = scores_of(tmp_path / "ours", data, [model], ours(dim))
    size = sum(p.numel() for p in model.parameters())
    dense = BasicProjector(size, dim, seed=0, proj_type="normal", device="cpu", block_size=1024)
    own = FunctionalGradientComputer, dense
    theirs = scores_of(tmp_path / "theirs", data, [model], lambda _: own)
    ranks = [spearmanr(sketched[:, j], theirs[:, j])[0] for j in range(TARGETS)]
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


def computer_of(model, dim=16):
    return SketchComputer(model, MarginOutput(), Sketch(dim))


def test_loss_gradient_needs_no_second_pass_and_follows_the_checkpoint(data):
    (images, labels), _ = data
    passes = []
    model = network(1)
    model.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    computer = computer_of(model)
    computer.compute_per_sample_grad((images, labels))
    weight = computer.compute_loss_grad((images, labels))
    assert passes == [len(labels)]
    probability = model(images).logits.softmax(1)[range(len(labels)), labels]
    torch.testing.assert_close(weight, 1 - probability[:, None].detach(), rtol=1e-4, atol=1e-6)
    model.load_state_dict(network(2).state_dict())
    computer.load_model_params(model)
    computer.compute_per_sample_grad((images, labels))
    assert not torch.allclose(computer.compute_loss_grad((images, labels)), weight)


def test_loss_gradient_of_a_memorised_example_is_small_but_not_zero(data):
    (images, labels), _ = data
    model = network(1)
    with torch.no_grad():
        model.classifier[1].bias.zero_()[labels[0]] = 30
    computer, first = computer_of(model), (images[:1], labels[:1])
    f = capture(model, *first).margins.double()
    computer.compute_per_sample_grad(first)
    for found in (
        computer.compute_loss_grad(first),
        MarginOutput().get_out_to_loss_grad(
            model, dict(model.named_parameters()), dict(model.named_buffers()), first
        ),
    ):
        assert found.item() == pytest.approx(float(1 / (1 + f.exp())), rel=1e-3) and found > 0


def test_features_are_in_new_memory(data):
    computer = computer_of(network(1), 32)
    first, again = (computer.compute_per_sample_grad(data[1]) for _ in range(2))
    assert torch.equal(first, again)
    first /= 2  # as traker does: it must reach nothing else
    assert torch.equal(computer.compute_per_sample_grad(data[1]), again)


def test_scores_in_bfloat16_stay_close(tmp_path, data):
    models = [network(1), network(2)]
    full = scores_of(tmp_path / "f", data, models, ours(DIM))
    half = scores_of(tmp_path / "h", data, models, ours(DIM, bfloat16=True))
    assert not np.array_equal(full, half)
    assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.99
