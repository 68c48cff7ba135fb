"""A function of one tensor on a GPU, replayed as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = Sequence[Tensor | None]
WARM_UP = 3  # runs of a shape before it is recorded: libraries choose and allocate in them


class Replayed:
    """`function`, recorded for each shape of its input after WARM_UP runs.

    It must read and write tensors alone, always the same ones. One that cannot be recorded (because
    it waits for the GPU in the middle) goes on being run as it is.

    Args:
        function: of a tensor on `device`; what it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Tensor], Outputs], device: torch.device) -> None:
        self._function, self._device = function, device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._calls: Counter[torch.Size] = Counter()
        self._inputs: dict[torch.Size, Tensor] = {}
        self._graphs: dict[torch.Size, tuple[Any, Outputs] | None] = {}

    def __call__(self, value: Tensor) -> Outputs:
        """The function's outputs for a value that may be on another device."""
        shape = value.shape
        if shape not in self._inputs:
            self._inputs[shape] = torch.empty_like(value, device=self._device)
        own = self._inputs[shape].copy_(value)
        self._calls[shape] += 1
        if self._calls[shape] < WARM_UP:
            return self._run(own)
        if self._calls[shape] == WARM_UP:
            outputs, waits = self._watch(own)
            if waits:
                self._graphs[shape] = None
            return outputs
        if shape not in self._graphs:
            self._graphs[shape] = self._record(own)
        recorded = self._graphs[shape]
        if recorded is None:
            return self._run(own)
        graph, outputs = recorded
        graph.replay()
        return outputs

    def _run(self, value: Tensor) -> Outputs:
        """On a stream of its own, as what is to be recorded has to be warmed up."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._function(value)
        current.wait_stream(self._stream)
        return outputs

    def _watch(self, value: Tensor) -> tuple[Outputs, bool]:
        """Run it, and tell whether it waits for the GPU, which a recording cannot."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                outputs = self._run(value)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return outputs, any("synchronizing CUDA operation" in str(each.message) for each in said)

    def _record(self, value: Tensor) -> tuple[Any, Outputs] | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # One pool for all shapes: what a graph returns has been read when the next one runs.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = self._function(value)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:  # random numbers on the GPU are then spoilt: hence _watch
            if "captur" not in str(error):
                raise
            return None
        return graph, outputs
