"""What traker's engine calls: the margin, gradients by hooks, and the sketch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trak.gradient_computers import AbstractGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import AbstractProjector

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


@dataclass
class Pending:
    """A batch on its way from HookGradientComputer to SketchProjector, which makes its gradients.

    Attributes:
        images, labels: (B, channels, height, width) and (B,).
        bfloat16: whether the model runs under bfloat16 autocast. Sums stay in float32.
        logits_of: as of Sketch.features.
        margins: (B,), set when the batch is projected.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    bfloat16: bool
    logits_of: Callable[[Tensor], Tensor] | None = None
    margins: Tensor | None = None


class HookGradientComputer(AbstractGradientComputer):
    """Hands each batch on to SketchProjector, which sketches gradients without forming them."""

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        grad_wrt: object = None,
        bfloat16: bool = False,
        logits_of: Callable[[Tensor], Tensor] | None = None,
        **given: Any,
    ) -> None:
        if grad_wrt is not None:
            raise InputError("grad_wrt is not supported: the sketch takes all parameters")
        super().__init__(model, task, **given)
        self.bfloat16, self.logits_of = bfloat16, logits_of
        self.load_model_params(model)

    def load_model_params(self, model: nn.Module) -> None:
        self.model = model
        self._last: Pending | None = None

    def compute_per_sample_grad(self, batch: Batch) -> Pending:
        self._last = Pending(self.model, *batch, self.bfloat16, self.logits_of)
        return self._last

    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """1 - p of the label, (B, 1), of the batch that was projected last."""
        last = self._last
        if last is None or last.margins is None or last.labels is not batch[1]:
            raise RuntimeError("compute_loss_grad takes the batch that was just projected")
        return _one_minus_p(last.margins)


class SketchProjector(AbstractProjector):
    """The sketch as traker's projector, with an independent one for each model id.

    Args:
        proj_dim: length of the features, all blocks together.
        gpu_kernels: as Sketch's.
    """

    _model_id: int | None
    _sketch: Sketch | None

    def __init__(
        self,
        proj_dim: int,
        seed: int = 0,
        device: str = "cpu",
        num_blocks: int = 1,
        gpu_kernels: bool = True,
    ) -> None:
        super().__init__(0, proj_dim, seed, "sketch", device)
        self.num_blocks, self.gpu_kernels = num_blocks, gpu_kernels
        self.free_memory()

    def project(self, grads: Pending, model_id: int) -> Tensor:
        """Features (B, proj_dim) float32 in new memory, which traker divides in place.

        Raises:
            InputError: the model's gradients would be wrong or incomplete.
        """
        if self._sketch is None or self._model_id != model_id:
            self._model_id = model_id
            size, seed = self.proj_dim // self.num_blocks, f"{self.seed}/{model_id}"
            self._sketch = Sketch(
                size, seed, num_blocks=self.num_blocks, gpu_kernels=self.gpu_kernels
            )
        with torch.autocast(grads.images.device.type, torch.bfloat16, enabled=grads.bfloat16):
            try:
                features, grads.margins = self._sketch.features(
                    grads.model, grads.images, grads.labels, grads.logits_of
                )
            except GradientError as error:
                raise InputError(f"model: {error}") from error
        return features

    def free_memory(self) -> None:
        self._model_id, self._sketch = None, None
