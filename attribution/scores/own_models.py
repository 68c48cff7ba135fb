"""Scores for models that somebody else's code has trained, without MLflow and without files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attribution.errors import InputError
from attribution.gradients import GradientError
from attribution.gradients.sketch import Sketch
from attribution.scores.ridge import Ridge


def score(
    models: nn.Module | Sequence[nn.Module],
    train: Dataset,
    targets: Dataset,
    *,
    proj_dim: int = 256,
    num_blocks: int = 10,
    lambda_reg: float = 0.1,
    batch_size: int = 64,
    seed: int | str = 0,
) -> np.ndarray:
    """TRAK scores of training examples on targets, under models that were trained on the former.

    The formula is that of attribution.scores.trak.score. Memory holds the features of one
    model, (n_train + n_targets) x num_blocks x proj_dim float32, and the scores.

    Args:
        models: in eval mode, each on the device where it shall run. They map images (B, ...) to
            logits (B, C), or to an object with `.logits`. Several models trained with different
            seeds, best on random halves of the data, predict much better than one.
        train, targets: items are an image, as the models take it, and a label from 0 to C - 1.
        proj_dim, num_blocks, lambda_reg: parameters of the trak entry point.
        seed: of the projections.

    Returns:
        (n_train, n_targets) float32, in margins (log-odds of the target's label); positive =
        helpful: training with the example raises the target's margin.

    Raises:
        InputError: no model, a model without exact per-sample gradients, or gradients that are not
            finite.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    if not models:
        raise InputError("models: is empty; give at least one trained model")
    total, weight = torch.zeros(()), torch.zeros(())
    for number, model in enumerate(models):
        sketch = Sketch(proj_dim, f"{seed}/{number}", num_blocks=num_blocks)
        features, one_minus_p = _features(sketch, model, train, batch_size)
        of_targets, _ = _features(sketch, model, targets, batch_size)
        ridge = Ridge(lambda_reg, features.shape[1] // proj_dim, features.device)
        factors = ridge.factor(ridge.gram([features])).float()
        white = ridge.whiten(features, factors) @ ridge.whiten(of_targets, factors).T
        total, weight = total + white.cpu(), weight + one_minus_p.cpu()
    return (total * weight[:, None] / len(models) ** 2).numpy()


def _features(
    sketch: Sketch, model: nn.Module, dataset: Dataset, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Projected gradients (n, blocks k), and 1 - p of the labels, (n,)."""
    device = next(model.parameters()).device
    features, one_minus_p = [], []
    for images, labels in DataLoader(dataset, batch_size):
        try:
            projected, margins = sketch.features(model, images.to(device), labels.to(device))
        except GradientError as error:
            raise InputError(f"models: {type(model).__name__}: {error}") from error
        features.append(projected)
        one_minus_p.append((-margins).sigmoid())
    return torch.cat(features), torch.cat(one_minus_p)
