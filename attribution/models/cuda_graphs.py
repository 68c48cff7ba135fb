"""What makes training fast on a GPU: images in its memory, and steps replayed as CUDA graphs.

A CUDA graph launches the hundreds of kernels of a training step as one. Training on a CPU never imports
this module, nor does training on a GPU with cuda_graphs=off and one model at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.data.dataset import ImageData
from attribution.errors import reason
from attribution.models.batches import Batches
from attribution.runtime.npy_blocks import row_slices
from attribution.runtime.progress import say

WARM_UP = 3  # eager steps of a batch size before it is recorded: libraries choose kernels in them
TOLERANCE = 1e-2  # of a tensor's largest entry: rounding of bfloat16 and TF32


class ResidentBatches(Batches):
    """Batches whose images all lie on the GPU, so that a step needs nothing from the CPU."""

    is_resident = True

    def __init__(self, images: Tensor, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._images = images

    def _epoch(self, kept: np.ndarray) -> Tensor:
        return super()._epoch(kept).to(self._device)  # a copy for each step would wait for the GPU

    def _pixels(self, index: Tensor) -> Tensor:
        return self._images[index]


@lru_cache(maxsize=1)  # many models are trained on the same images
def images_on_gpu(data: ImageData, device: torch.device) -> Tensor | None:
    """Copy the training images to a GPU, uint8 (n_train, H, W, 3).

    None where they would take more than a quarter of its free memory.
    """
    pixels, rows = data.pixels(), data.rows("train")
    nbytes = pixels[:1].nbytes
    if nbytes * len(rows) > torch.cuda.mem_get_info(device)[0] // 4:
        return None
    images = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.uint8, device=device)
    for part in row_slices(len(rows), nbytes // 4):
        images[part] = torch.from_numpy(pixels[rows[part]]).to(device)
    return images


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph of a training step, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    draw: Tensor
    loss: Tensor
    gradients: list[Tensor | None]


class ReplayedStep:
    """A training step that is recorded for each batch size and then replayed.

    The first replay of a batch size is compared with an eager step on the same batch. If they
    differ, or recording fails, every step from then on is eager, and a line on stderr says so.

    Args:
        step: takes a draw on `device`, leaves gradients at the weights and returns the loss. It
            must read and write the same tensors in every call.
        weights: that gradients are left at.
        buffers: that the step changes.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        weights: Iterable[Tensor],
        buffers: Iterable[Tensor],
        device: torch.device,
    ) -> None:
        self._step, self._weights, self._buffers = step, list(weights), list(buffers)
        self._device, self._stream = device, torch.cuda.Stream(device)
        # All graphs share the memory of their results: each is read before the next graph runs.
        self._pool = torch.cuda.graph_pool_handle()
        self._calls: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, Recorded] = {}
        self._is_eager = False

    def __call__(self, draw: Tensor) -> Tensor:
        """Take a step; the next call overwrites the loss that is returned and the gradients."""
        if self._is_eager:
            return self._step(draw.to(self._device))
        if draw.shape in self._graphs:
            return self._replay(self._graphs[draw.shape], draw)
        self._calls[draw.shape] += 1
        if self._calls[draw.shape] < WARM_UP:
            return self._run(draw.to(self._device))
        return self._record_or_give_up(draw.to(self._device, copy=True))

    def _run(self, draw: Tensor) -> Tensor:
        """Take an eager step on the stream of the recording, as CUDA asks of warm-up steps."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(draw)
        current.wait_stream(self._stream)
        return loss

    def _replay(self, recorded: Recorded, draw: Tensor) -> Tensor:
        recorded.draw.copy_(draw)
        recorded.graph.replay()
        self._set_gradients(recorded.gradients)
        return recorded.loss

    def _record_or_give_up(self, draw: Tensor) -> Tensor:
        """Take a step eagerly, and again by a new recording; keep the recording if they agree."""
        before = [buffer.clone() for buffer in self._buffers]
        with torch.random.fork_rng([self._device]):  # the replay draws the same random numbers
            loss, waits = self._watch(draw)
        after = [buffer.clone() for buffer in self._buffers]
        gradients = [weight.grad for weight in self._weights]
        try:
            if waits:  # recording it would fail, and leave the random numbers unusable
                raise RuntimeError("the step waits for the GPU")
            _write(self._buffers, before)
            recorded = self._record(draw)
            replayed = self._replay(recorded, draw)
            found = [replayed, *recorded.gradients, *self._buffers]
            if not all(map(are_close, found, [loss, *gradients, *after])):
                raise RuntimeError("the replayed step differs from the eager one")
        except Exception as error:  # whatever it is, the eager step is right
            _tell(reason(error))
            self._is_eager = True
            self._graphs.clear()
            _write(self._buffers, after)
            self._set_gradients(gradients)
            return loss
        self._graphs[draw.shape] = recorded
        return replayed

    def _watch(self, draw: Tensor) -> tuple[Tensor, bool]:
        """Take an eager step; return its loss and whether it waits for the GPU."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss = self._run(draw)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return loss, any("synchronizing CUDA operation" in str(each.message) for each in caught)

    def _record(self, draw: Tensor) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = self._step(draw)
        return Recorded(graph, draw, loss, [weight.grad for weight in self._weights])

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient


def are_close(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors differ by no more than TOLERANCE of the largest entry."""
    if found is None or expected is None:
        return found is expected
    found, expected = found.double(), expected.double()
    atol = TOLERANCE * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True)


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@cache  # once in a process, not for each model
def _tell(why: str) -> None:
    say(f"cuda_graphs: not used, training is slower but correct ({why})")


class NativeBatchNorm(nn.BatchNorm2d):
    """BatchNorm by PyTorch's own kernels.

    cuDNN's ask for the memory layout of their input, which a tensor under vmap cannot tell.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(input)


def without_cudnn(model: nn.Module) -> nn.Module:
    """Return a copy of a model for functional_call under vmap: every BatchNorm is a NativeBatchNorm."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                own = NativeBatchNorm(child.num_features, child.eps, child.momentum)
                setattr(parent, name, own.train(child.training))
    return model
