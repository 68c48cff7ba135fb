"""The plug-ins inside traker's own engine, against a dense reference and against traker's path."""

import json
import logging

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
from attribution.scores.traker_adapters import (
    BFloat16GradientComputer,
    HookGradientComputer,
    MarginOutput,
    RidgeScoreComputer,
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


def traker_scores(folder, data, models, projector, computer=HookGradientComputer, size=16):
    model = network(0)
    traker = TRAKer(
        model=model,
        task=MarginOutput(),
        train_set_size=TRAIN,
        save_dir=str(folder),
        device="cpu",
        gradient_computer=computer,
        projector=projector,
        score_computer=RidgeScoreComputer,
        use_half_precision=False,
        lambda_reg=RIDGE,
        logging_level=logging.ERROR,
    )
    train, targets = data
    for i, checkpoint in enumerate(models):
        traker.load_checkpoint(checkpoint.state_dict(), model_id=i)
        for x, y in zip(train[0].split(size), train[1].split(size), strict=True):
            traker.featurize((x, y), num_samples=len(x))
    traker.finalize_features()
    for i, checkpoint in enumerate(models):
        traker.start_scoring_checkpoint("run", checkpoint.state_dict(), i, num_targets=TARGETS)
        traker.score(targets, num_samples=TARGETS)
    return np.array(traker.finalize_scores("run"))


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
        weight = weight + (1 - train.probability.double()) / len(models)
    return (inner * weight[:, None]).numpy()


def test_scores_equal_the_dense_formula(tmp_path, data):
    models = [network(1), network(2)]
    found = traker_scores(tmp_path, data, models, SketchProjector(DIM, 3))
    truth = reference(data, models)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4 * np.abs(truth).max())
    assert np.abs(truth).max() > 0


def test_scores_rank_as_on_trakers_own_path(tmp_path, data):
    model, dim = network(1), 4096
    ours = traker_scores(tmp_path / "ours", data, [model], SketchProjector(dim))
    size = sum(p.numel() for p in model.parameters())
    dense = BasicProjector(size, dim, seed=0, proj_type="normal", device="cpu", block_size=1024)
    theirs = traker_scores(tmp_path / "theirs", data, [model], dense, FunctionalGradientComputer)
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
    full = traker_scores(tmp_path / "f", data, models, SketchProjector(DIM, 3))
    half = traker_scores(
        tmp_path / "h", data, models, SketchProjector(DIM, 3), BFloat16GradientComputer
    )
    assert not np.array_equal(full, half)
    assert np.corrcoef(full.ravel(), half.ravel())[0, 1] > 0.99


def solve(features, ridge):
    computer = RidgeScoreComputer(dtype=torch.float32, device="cpu", lambda_reg=ridge)
    return computer.get_x_xtx_inv(features, computer.get_xtx(features))


def test_ridge_is_relative_blockwise_and_not_rescaled(monkeypatch):
    monkeypatch.setattr("attribution.scores.traker_adapters.BLOCK", 7)
    x = torch.randn(30, 8)
    gram = x.double().T @ x.double()
    truth = x.double() @ torch.linalg.inv(gram + 0.5 * gram.trace() / 8 * torch.eye(8))
    torch.testing.assert_close(solve(x, 0.5), truth.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(solve(x * 1e3, 0.5), solve(x, 0.5) / 1e3, rtol=1e-4, atol=1e-8)
    assert solve(x, 0.0).dtype == torch.float32


def by_blocks(x, ridge, blocks):
    """A = F'F with zeros outside blocks along the diagonal, and a ridge of each block's own."""
    width = x.shape[1] // blocks
    a = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[1], width):
        rows = slice(start, start + width)
        gram = x[:, rows].double().T @ x[:, rows].double()
        a[rows, rows] = gram + ridge * gram.trace() / width * torch.eye(width)
    return a


@pytest.mark.parametrize("panel", [3, 8, 1024])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 2.0])
def test_blocks_have_a_gram_matrix_and_a_ridge_of_their_own(monkeypatch, blocks, ridge, panel):
    monkeypatch.setattr("attribution.scores.traker_adapters.BLOCK", 7)
    monkeypatch.setattr("attribution.scores.traker_adapters.PANEL", panel)
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 8.0, 0.5, 3.0]).repeat_interleave(4)
    x = torch.randn(50, 16, generator=g) * scales
    x += 0.3 * x.flip(1)  # so that blocks are correlated
    y = torch.randn(9, 16, generator=g) * scales
    computer = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=ridge, num_blocks=blocks)
    gram = computer.get_xtx(x)
    assert gram.shape == (blocks, 16 // blocks, 16 // blocks) and gram.dtype == torch.float64
    torch.testing.assert_close(
        torch.block_diag(*gram), by_blocks(x, 0, blocks), rtol=1e-5, atol=1e-4
    )
    inverse = torch.linalg.inv(by_blocks(x, ridge, blocks))
    solved = computer.get_x_xtx_inv(x, gram)
    truth = x.double() @ inverse
    torch.testing.assert_close(
        solved, truth.float(), rtol=1e-3, atol=1e-5 * float(truth.abs().max())
    )
    factors = computer.factor(gram)
    products = torch.zeros(50, 9)
    left, right = (computer.whiten(rows, factors).float() for rows in (x, y))
    computer.get_scores(left, right, accumulator=products)
    truth = truth @ y.double().T
    torch.testing.assert_close(
        products, truth.float(), rtol=1e-3, atol=1e-5 * float(truth.abs().max())
    )


def test_one_singular_block_among_others_is_refused():
    x = torch.randn(20, 8)
    x[:, 5] = x[:, 4]
    computer = RidgeScoreComputer(torch.float32, "cpu", num_blocks=2)
    with pytest.raises(InputError, match="singular with lambda_reg 0"):
        computer.get_x_xtx_inv(x, computer.get_xtx(x))


def test_projected_blocks_lie_side_by_side_and_add_up_to_one(data):
    model = network(1)
    pending = HookGradientComputer(model, MarginOutput()).compute_per_sample_grad(data[1])
    one = SketchProjector(16, seed=1).project(pending, 2)
    three = SketchProjector(48, seed=1, num_blocks=3).project(pending, 2)
    assert three.shape == (TARGETS, 48)
    torch.testing.assert_close(three.view(-1, 3, 16).sum(1), one, rtol=1e-4, atol=1e-4)
    expected = Sketch(16, "1/2", num_blocks=3).project(capture(model, *data[1]))
    torch.testing.assert_close(three, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [torch.randn(5, 8), torch.zeros(20, 8), torch.ones(20, 8)])
def test_singular_gram_is_refused_with_a_remedy(features):
    says = "singular with lambda_reg 0.0" if features.any() else "are zero"
    with pytest.raises(InputError, match=says):
        solve(features, 0.0)
    if features.any():
        assert solve(features, 0.1).isfinite().all()


@pytest.mark.parametrize(("ridge", "close"), [(0.01, 2e-5), (0.1, 1e-5), (1, 1e-5)])
def test_products_of_rows_whitened_in_float32_are_those_of_float64(ridge, close) -> None:
    torch.manual_seed(0)
    scales = torch.arange(1, 129) ** -2.0  # eigenvalues of the Gram matrix fall by 1e8
    x = torch.randn(500, 128) * scales @ torch.linalg.qr(torch.randn(128, 128))[0]
    computer = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=ridge)
    factor = computer.factor(computer.get_xtx(x))
    assert factor.shape == (1, 128, 128)
    solved = torch.cholesky_solve(x.double().T, factor[0])
    truth = x.double() @ solved
    left, right = computer.whiten(x, factor.float()), computer.whiten(x, factor).float()
    found = torch.zeros(500, 500)
    computer.get_scores(left, right, accumulator=found)
    torch.testing.assert_close(found, truth.float(), rtol=0, atol=close * float(truth.std()))
    # As good, but for rounding's luck, as where one side is solved for in float64 and rounded.
    whitened, rounded = ((each - truth).abs().max() for each in (found, x @ solved.float()))
    assert whitened < 3 * rounded
    norms = left.square().sum(1)
    torch.testing.assert_close(norms, truth.diagonal().float(), rtol=2e-5, atol=0)


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="not finite"):
        solve(torch.full((9, 4), float("nan")), 0.1)
    with pytest.raises(InputError, match="lambda_reg is -1"):
        RidgeScoreComputer(torch.float32, "cpu", lambda_reg=-1)
    with pytest.raises(InputError, match="grad_wrt"):
        HookGradientComputer(network(1), MarginOutput(), grad_wrt=["classifier.1.bias"])
