"""A model's logits on a split, and what follows from them: losses, margins, accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import frozen
from attribution.models.batches import batches_of
from attribution.runtime.device import autocast


def prediction_batch_size(config: Config) -> int:
    """Return the images per batch where only logits are wanted; large images fill the memory sooner."""
    return 256 if config.image_size <= 96 else 32


@torch.inference_mode()
def predict(config: Config, model: nn.Module, data: ImageData, split: str) -> np.ndarray:
    """Return the logits (n, C), float32, of a split; the model is left in eval mode.

    Raises:
        InputError: a logit is not finite.
    """
    device = next(model.parameters()).device
    model.eval()
    size = prediction_batch_size(config)
    skipping = frozen.stored_logits(config, data, model, split)
    if skipping:
        rows = torch.arange(len(data.rows(split))).split(size)
        outputs: Iterable[Tensor] = map(skipping, rows)
    else:
        batches = batches_of(config, data, split, size, device)
        outputs = (model(images).logits for images, _ in batches)
    with autocast(config, device):
        parts = [output.float().cpu() for output in outputs]
    logits = torch.cat(parts).numpy()
    if not np.isfinite(logits).all():
        raise InputError(
            f"learning_rate={config.learning_rate}: the model's outputs are not finite; "
            "use a smaller learning rate, or precision=float32"
        )
    return logits


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the cross-entropy in nats of each example, (n,)."""
    return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return log p/(1-p) of each example's label, (n,): its logit minus logsumexp of the others."""
    logits = logits.astype(np.float64)
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - logsumexp(others, axis=1)


def classification_metrics(
    logits: np.ndarray, labels: np.ndarray, prefix: str = "", groups: np.ndarray | None = None
) -> dict[str, float]:
    """Return accuracy, log-loss, mean margin and the accuracy of the worst class.

    Args:
        prefix: of the names.
        groups: (n,) int; adds worst_group_accuracy.
    """
    correct = logits.argmax(axis=1) == labels

    def worst(ids: np.ndarray) -> float:
        return float(min(correct[ids == i].mean() for i in np.unique(ids)))

    found = {
        "accuracy": float(correct.mean()),
        "log_loss": float(losses(logits, labels).mean()),
        "mean_margin": float(margins(logits, labels).mean()),
        "worst_class_accuracy": worst(labels),
    }
    if groups is not None:
        found["worst_group_accuracy"] = worst(groups)
    return {f"{prefix}{name}": value for name, value in found.items()}
