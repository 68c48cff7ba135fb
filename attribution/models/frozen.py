"""Skips the frozen layers of a model: what they give for an image is computed once, and stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.models.batches import batches_of
from attribution.models.pretrained import trained_paths
from attribution.runtime.device import autocast

MOST_BYTES = 2**28  # that one process stores for a split
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the largest logit: rounding


@dataclass(frozen=True)
class Rest:
    """A model from its first trained layer on.

    Attributes:
        image: (1, 3, H, W), which the frozen layers run on where they cannot be left out.
    """

    model: nn.Module
    path: str
    is_head: bool
    image: Tensor

    @classmethod
    def of(cls, config: Config, model: nn.Module, images: Tensor) -> Rest | None:
        """Return it where layers are frozen and not on a GPU, which computes them fast enough."""
        if config.train_layers == "all" or images.device.type != "cpu":
            return None
        path = trained_paths(config.model, config.train_layers)[0]
        return cls(model, path, config.train_layers == "head", images[:1])

    def received(self, images: Tensor) -> Tensor:
        """Return what the first trained layer receives for images (B, 3, H, W): (B, ...)."""
        found: list[Tensor] = []
        hook = self._see(lambda _, given: found.append(given[0].clone()))
        with torch.no_grad(), hook:
            self.model(images)
        return found[0]

    def __call__(self, received: Tensor) -> Tensor:
        """Return the logits (B, C) of images for which the first trained layer receives this."""
        if self.is_head:
            return self.model.get_submodule(self.path)(received)
        with self._see(lambda _, given: (received, *given[1:])):
            return self.model(self.image).logits

    def _see(self, hook: Callable) -> torch.utils.hooks.RemovableHandle:
        return self.model.get_submodule(self.path).register_forward_pre_hook(hook)


# What Rest.received gives for the settings and data at hand, by split; all seeds share it.
_stored: dict[tuple, Tensor | None] = {}


def stored_logits(
    config: Config, data: ImageData, model: nn.Module, split: str
) -> Callable[[Tensor], Tensor] | None:
    """Return a function from positions in a split (B,) to the logits (B, C), as stored_inputs does."""
    found = stored_inputs(config, data, model, split)
    return (lambda rows: found[0](found[1][rows])) if found else None


def stored_inputs(
    config: Config, data: ImageData, model: nn.Module, split: str
) -> tuple[Rest, Tensor] | None:
    """Return the trained layers, and what they receive for a split's images without augmentation (n, ...).

    None where all layers have to run: none is frozen, their outputs take too much memory, or other
    layers than the first trained one read them.

    Args:
        model: in eval mode.
    """
    device = next(model.parameters()).device
    images = next(batches_of(config, data, split, 2, device))[0]
    rest = Rest.of(config, model, images)
    if not rest:
        return None
    settings = config.model, config.train_layers, config.precision, data.fingerprint
    if any(key[:-1] != settings for key in _stored):
        _stored.clear()
    key = *settings, split
    # Tensors of inference mode could not be trained on.
    with torch.inference_mode(False), torch.no_grad(), autocast(config, device):
        if key not in _stored:
            _stored[key] = _received(config, data, rest, split)
        inputs = _stored[key]
        if inputs is None:
            return None
        logits = model(images).logits
        error = (rest(inputs[: len(images)]) - logits).abs().max()
    is_exact = error <= TOLERANCE[logits.dtype] * logits.abs().max()
    return (rest, inputs) if is_exact else None


def _received(config: Config, data: ImageData, rest: Rest, split: str) -> Tensor | None:
    """Return Rest.received of a split; None where it is too large or the rest cannot run on it alone."""
    device, rows = rest.image.device, data.rows(split)
    try:
        few = rest.received(rest.image)
        rest(few)
    except Exception:  # of any kind: models differ in what layers receive and read
        return None
    if few.nbytes * len(rows) > MOST_BYTES:
        return None
    return torch.cat([rest.received(x) for x, _ in batches_of(config, data, split, 64, device)])
