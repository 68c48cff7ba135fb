"""What traker's engine calls: the margin, and sketched gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trak.gradient_computers import AbstractGradientComputer
from trak.modelout_functions import AbstractModelOutput

from attribution.errors import InputError
from attribution.gradients import GradientError
from attribution.gradients.per_sample import margins
from attribution.gradients.sketch import Sketch

Batch = tuple[Tensor, Tensor]  # images (B, channels, height, width) and labels (B,)


class MarginOutput(AbstractModelOutput):
    """Margin of the label, for models that return logits or an object with `.logits`."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(
        model: nn.Module, weights: dict, buffers: dict, image: Tensor, label: Tensor
    ) -> Tensor:
        """Margin () of one image (channels, height, width) with label (). Works under vmap."""
        output = torch.func.functional_call(model, (weights, buffers), image.unsqueeze(0))
        return margins(getattr(output, "logits", output), label.unsqueeze(0)).sum()

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: dict, buffers: dict, batch: Batch
    ) -> Tensor:
        """1 - p of the label, (B, 1): minus the derivative of the loss by the margin."""
        images, labels = batch
        with torch.no_grad():
            output = torch.func.functional_call(model, (weights, buffers), images)
            return _one_minus_p(margins(getattr(output, "logits", output), labels))


def _one_minus_p(margins: Tensor) -> Tensor:
    """1 - p of the label, (B, 1), from margins (B,): 1 - sigmoid(f) would cancel to zero."""
    return (-margins).sigmoid().unsqueeze(1)


class SketchComputer(AbstractGradientComputer):
    """Gives traker the sketched gradients, which are never formed; no projector is left to apply.

    Args:
        sketch: of the checkpoint.
        bfloat16: whether the model runs under bfloat16 autocast. Sums stay in float32.
        logits_of: as of Sketch.features.
    """

    margins: Tensor  # (B,), of the last batch

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        sketch: Sketch,
        bfloat16: bool = False,
        logits_of: Callable[[Tensor], Tensor] | None = None,
        grad_wrt: None = None,
        **given: Any,
    ) -> None:
        super().__init__(model, task, **given)
        self.sketch, self.bfloat16, self.logits_of = sketch, bfloat16, logits_of

    def load_model_params(self, model: nn.Module) -> None:
        self.model = model

    def compute_per_sample_grad(self, batch: Batch) -> Tensor:
        """Features (B, blocks k) float32 in new memory, which traker divides in place.

        Raises:
            InputError: the model's gradients would be wrong or incomplete.
        """
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            try:
                features, self.margins = self.sketch.features(
                    self.model, images, labels, self.logits_of
                )
            except GradientError as error:
                raise InputError(f"model: {error}") from error
        return features

    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """1 - p of the label, (B, 1), of the batch whose gradients were just computed."""
        return _one_minus_p(self.margins)
