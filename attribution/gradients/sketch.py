"""The random sketch that projects per-sample gradients to k numbers, where it can without forming them."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from attribution.gradients import GradientError
from attribution.gradients.layer_rules import Call, Stray, steps
from attribution.gradients.per_sample import Captured, capture, trained_parameters

# Floats of a CPU core's buffers for Fourier transforms, which should stay in its own cache.
WAVE_SCRATCH = 2**19


@dataclass
class _Sums:
    """Running totals of a batch's sketch: what is added to the cells, directly or as a Fourier transform."""

    cells: Tensor  # (B, blocks, k)
    waves: Tensor  # (B, blocks, k // 2 + 1), the transform of further cells
    blocks: dict[str, int]  # the block of each parameter, by name

    def cells_of(self, name: str) -> Tensor:
        """Cells (B, k) of a parameter's block."""
        return self.cells[:, self.blocks[name]]

    def waves_of(self, name: str) -> Tensor:
        """Waves (B, k // 2 + 1) of a parameter's block."""
        return self.waves[:, self.blocks[name]]


def dealt(shapes: Mapping[str, Sequence[int]], num_blocks: int) -> dict[str, int]:
    """The block of each parameter: matrices are dealt in order, vectors go with the matrix before them.

    Args:
        shapes: of a model's trained parameters by name, in the order of named_parameters().
        num_blocks: the largest number of blocks; there are no more of them than matrices.
    """
    # A class token is a vector, whatever the number of its dimensions.
    matrices = [name for name, shape in shapes.items() if sum(n > 1 for n in shape) > 1]
    shares = np.array_split(np.arange(len(matrices)), min(num_blocks, max(1, len(matrices))))
    of_matrix = {matrices[i]: block for block, share in enumerate(shares) for i in share}
    blocks, current = {}, 0
    for name in shapes:
        current = blocks[name] = of_matrix.get(name, current)
    return blocks


@dataclass
class _Hash:
    """Where a weight's entries (o, p) go: cell (offset + o stride + p) mod k, with sign s_o s_p."""

    offset: int
    stride: int
    rows: Tensor  # s_o, (O,)
    columns: Tensor  # s_p, (P,) with p in the order kh, kw, channel
    shifts: Tensor  # (offset + o stride) mod k, of the first k outputs


class Sketch:
    """A random linear map of the whole gradient to k = proj_dim numbers, E<Sg, Sg'> = <g, g'>.

    Every entry of the gradient is given a random sign and added to one of k cells. The signs
    of a weight's entries are products s_o s_p and its cells are offset + o stride + p mod k,
    with the stride prime to k. Products of independent signs are pairwise uncorrelated, hence
    unbiased, and this form lets one and the same map be computed by two routes:

      fold         form the gradient, lay its rows `stride` apart in memory, add up runs of k;
      tensorsketch per position, hash delta_t and a_t into k cells each and convolve them by
                   FFT (Pham and Pagh, 2013); the sum over positions and layers stays in the
                   frequency domain.

    The stride keeps the entries of one column apart, and rows of at most k entries never meet
    themselves, so the variance stays near that of dense random signs.
    The map depends on (seed, k, parameter names and shapes) alone; the route depends on the layer's
    shape, the precision and the kind of device.

    With several blocks, each block of layers has k cells of its own: the features are those of
    the blocks side by side, and their sum is what one block would give.

    Args:
        proj_dim: k.
        seed: of the map.
        dtype: of the features.
        num_blocks: the largest number of blocks of layers.
        gpu_kernels: on a GPU, use the Triton kernels for models whose first two images they give the
            plain gradients of.
    """

    def __init__(
        self,
        proj_dim: int,
        seed: int | str = 0,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 1,
        gpu_kernels: bool = True,
    ) -> None:
        if proj_dim < 1:
            raise GradientError(f"proj_dim is {proj_dim}; it must be at least 1")
        self.proj_dim, self.seed, self.dtype = proj_dim, seed, dtype
        self.num_blocks, self.gpu_kernels = num_blocks, gpu_kernels
        self._tables: dict[tuple, object] = {}
        self._call_types: WeakKeyDictionary[nn.Module, type[Call]] = WeakKeyDictionary()

    def features(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        logits_of: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sketch of each sample's gradient, (B, blocks x proj_dim) in `dtype`, and margin, (B,).

        Layers are sketched during the backward pass, so that a layer's gradients are released
        before the next are formed, and activations take no more memory than in a training step.

        Args:
            logits_of: as of capture.
        """
        shapes = {name: p.shape for name, p in trained_parameters(model).items()}
        sums = self._start(len(images), next(model.parameters()), shapes)
        call_type = self._call_type(model, images, labels)
        captured = capture(
            model, images, labels, lambda call: self._add(call, sums), call_type, logits_of
        )
        return self._finish(sums), captured.margins

    def project(self, captured: Captured) -> Tensor:
        """Sketch of each captured sample's gradient, (B, blocks x proj_dim) in `dtype`."""
        sums = self._start(len(captured.margins), captured.margins, captured.shapes)
        for call in captured.calls:
            self._add(call, sums)
        return self._finish(sums)

    def _call_type(self, model: nn.Module, images: Tensor, labels: Tensor) -> type[Call]:
        """The plain Call; on a GPU that of the kernels, if they pass a comparison on two images."""
        if not (self.gpu_kernels and images.is_cuda):
            return Call
        if model not in self._call_types:
            self._call_types[model] = _kernel_call(model, images[:2], labels[:2])
        return self._call_types[model]

    def _start(self, batch: int, like: Tensor, shapes: Mapping[str, Sequence[int]]) -> _Sums:
        blocks = dealt(shapes, self.num_blocks)
        size = batch, 1 + max(blocks.values())
        dtype = torch.promote_types(like.dtype, torch.float32)
        cells = torch.zeros(*size, self.proj_dim, dtype=dtype, device=like.device)
        waves = cells.new_zeros(*size, self.proj_dim // 2 + 1, dtype=dtype.to_complex())
        return _Sums(cells, waves, blocks)

    def _add(self, call: Call | Stray, sums: _Sums) -> None:
        for name, values in call.vectors().items():
            self._add_vector(name, values, sums.cells_of(name))
        if not call.has_matrix:
            return
        name = call.names["weight"]
        table = self._hash(name, call.module.weight.shape, sums.cells)
        if call.groups == 1 and self.tensorsketches(call):
            self._add_waves(call, table, sums.waves_of(name))
        else:
            self._add_folds(call, table, sums.cells_of(name))

    def tensorsketches(self, call: Call) -> bool:
        """Whether a layer without groups takes the tensorsketch route."""
        return call.hashing_pays(self.proj_dim)

    def _finish(self, sums: _Sums) -> Tensor:
        cells = sums.cells + torch.fft.irfft(sums.waves, n=self.proj_dim)
        return cells.flatten(1).to(self.dtype)

    def _add_vector(self, name: str, values: Tensor, cells: Tensor) -> None:
        """Add a bias or a normalisation's weight (B, n): signed, in runs of k."""
        n, k, values = values.shape[1], self.proj_dim, values.to(cells.dtype)
        key = (name, n, cells.device, cells.dtype)
        if key not in self._tables:
            label = f"{name} {n}"
            first = np.frombuffer(self._bytes(f"{label} cells", 8), dtype="<u8").tolist()[0]
            self._tables[key] = first % k, self._signs(label, n).to(cells)
        offset, signs = self._tables[key]
        self._add_runs(values * signs, offset, cells)

    def _add_waves(self, call: Call, table: _Hash, waves: Tensor) -> None:
        k, dtype = self.proj_dim, waves.real.dtype
        positions, _, patch = call.shape()
        slices = list(steps(len(waves), positions * (max(patch, k) + k), waves, WAVE_SCRATCH))
        # Every step writes the same cells; all others stay zero.
        all_outputs = waves.real.new_zeros(slices[0].stop * positions, k)
        signs = table.columns.view(call.patch_shape())
        for rows in slices:
            windows = call.windows(rows, dtype)
            patches = torch.mul(windows, signs, out=windows.new_empty(windows.shape))
            patches = patches.view(-1, patch)
            deltas = _fold((call.deltas(rows) * table.rows).reshape(len(patches), -1), k)
            outputs = all_outputs[: len(patches)].index_copy_(1, table.shifts, deltas)
            product = torch.fft.rfft(outputs).mul_(torch.fft.rfft(_fold(patches, k), n=k))
            waves[rows] += product.unflatten(0, (-1, positions)).sum(1)

    def _add_folds(self, call: Call, table: _Hash, cells: Tensor) -> None:
        for rows in steps(len(cells), call.rows_of_products() * table.stride, cells):
            formed = call.products(rows, (table.rows, table.columns), table.stride)
            self._add_runs(formed.flatten(1), table.offset, cells[rows])

    def _add_runs(self, values: Tensor, first: int, cells: Tensor) -> None:
        """Add values (b, n) to cells (b, k) in turn, beginning with cell `first`."""
        runs = _fold(values, self.proj_dim)
        here = self.proj_dim - first
        cells[:, first : first + runs.shape[1]] += runs[:, :here]
        cells[:, : max(0, runs.shape[1] - here)] += runs[:, here:]

    def _hash(self, name: str, shape: torch.Size, like: Tensor) -> _Hash:
        key = (name, shape, like.device, like.dtype)
        if key not in self._tables:
            outputs, patch, k = shape[0], math.prod(shape[1:]), self.proj_dim
            label = f"{name} {tuple(shape)}"
            signs = self._signs(label, outputs + patch).to(like)
            first, second = np.frombuffer(self._bytes(f"{label} cells", 16), dtype="<u8").tolist()
            # Just above the patch length, so that rows do not overlap and little memory is unused.
            stride = patch + second % (patch // 16 + 8)
            while math.gcd(stride, k) > 1:
                stride += 1
            offset = first % k
            # Two outputs share a cell only if they are a multiple of k apart.
            shifts = (offset + torch.arange(min(outputs, k), device=like.device) * stride) % k
            self._tables[key] = _Hash(offset, stride, signs[:outputs], signs[outputs:], shifts)
        return self._tables[key]

    def _signs(self, label: str, count: int) -> Tensor:
        bits = np.unpackbits(np.frombuffer(self._bytes(label, -(-count // 8)), np.uint8))
        return torch.from_numpy(bits[:count].astype(np.float32) * 2 - 1)

    def _bytes(self, label: str, count: int) -> bytes:
        """Random bytes that stay the same in every version, unlike a library's generator."""
        return hashlib.shake_256(f"{self.seed}/{self.proj_dim}/{label}".encode()).digest(count)


def _kernel_call(model: nn.Module, images: Tensor, labels: Tensor) -> type[Call]:
    """The GPU kernels' Call if its gradients of these images are the plain ones, else the plain Call."""
    try:
        from attribution.gradients import triton_kernels

        triton_kernels.compare(model, images, labels)
    except Exception as error:  # of any kind: no Triton, no compiler, a wrong result
        reason = " ".join(str(error).split())[:160]
        _say(f"GPU kernels are off, features are slower: {type(error).__name__}: {reason}")
        return Call
    return triton_kernels.KernelCall


@cache
def _say(message: str) -> None:
    """Print a line to stderr, once in a process."""
    print(message, file=sys.stderr, flush=True)


def _fold(rows: Tensor, k: int) -> Tensor:
    """Rows (b, n) added up in runs of k, (b, min(n, k))."""
    if rows.shape[1] <= k:
        return rows
    runs, rest = divmod(rows.shape[1], k)
    total = rows[:, : runs * k].unflatten(1, (runs, k)).sum(1)
    total[:, :rest] += rows[:, runs * k :]
    return total
