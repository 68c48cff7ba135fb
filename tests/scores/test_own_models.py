"""attribution.score: models of somebody else's code, scored without MLflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import attribution
from attribution.errors import InputError
from attribution.gradients.sketch import Sketch

pytestmark = pytest.mark.usefixtures("one_thread")


def small(seed: int) -> nn.Module:
    """A model that no library knows."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    return nn.Sequential(*layers).eval()


def made(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.arange(n) % 3)


def test_scores_are_those_of_the_formula_with_each_model_s_own_features() -> None:
    models, train, targets = [small(0), small(1)], made(20, 0), made(7, 1)
    found = attribution.score(
        models, train, targets, proj_dim=16, num_blocks=2, batch_size=6, seed="s"
    )
    total, weight = np.zeros((20, 7)), np.zeros(20)
    for m, model in enumerate(models):
        sketch = Sketch(16, f"s/{m}", torch.float64, num_blocks=2)
        model = model.double()
        features, margins = sketch.features(model, train.tensors[0].double(), train.tensors[1])
        others, _ = sketch.features(model, targets.tensors[0].double(), targets.tensors[1])
        for x, y in zip(np.split(features.numpy(), 2, 1), np.split(others.numpy(), 2, 1)):
            gram = x.T @ x
            inverse = np.linalg.inv(gram + 0.1 * np.trace(gram) / 16 * np.eye(16))
            total += x @ inverse @ y.T / 2
        weight += 1 / (1 + np.exp(margins.numpy())) / 2
    expected = total * weight[:, None]
    assert found.dtype == np.float32 and found.shape == (20, 7)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_one_model_is_a_list_of_one_and_batches_change_nothing() -> None:
    train, targets = made(10, 0), made(4, 1)
    one = attribution.score(small(0), train, targets, proj_dim=16, num_blocks=1)
    again = attribution.score([small(0)], train, targets, proj_dim=16, num_blocks=1, batch_size=3)
    np.testing.assert_allclose(one, again, atol=1e-4 * np.abs(one).max())


def test_a_copy_of_a_target_helps_with_its_label_and_harms_with_another() -> None:
    """Models that have learned nothing: only the gradients can tell."""
    train, targets = made(30, 0), made(3, 1)
    images = torch.cat([train.tensors[0], targets.tensors[0][:1], targets.tensors[0][:1]])
    labels = torch.cat([train.tensors[1], torch.tensor([0, 1])])
    found = attribution.score(
        [small(m) for m in range(3)], TensorDataset(images, labels), targets, proj_dim=64
    )[:, 0]
    assert found[30] == found.max() > 0 and found[31] == found.min() < 0


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([], "models: is empty"),
        ([small(0).train()], "models: Sequential: .*train mode"),
        ([nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()], "at least two classes"),
    ],
)
def test_models_that_cannot_be_scored_are_refused(models, says) -> None:
    with pytest.raises(InputError, match=says):
        attribution.score(models, made(6, 0), made(2, 1), proj_dim=8)
