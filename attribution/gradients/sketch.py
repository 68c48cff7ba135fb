"""The random sketch that projects per-sample gradients to k numbers, without forming them where it can."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from attribution.errors import InputError
from attribution.gradients.batchnorm import Fused
from attribution.gradients.layer_rules import LONG_MAP, Call, steps
from attribution.gradients.per_sample import Captured, Shortcuts, capture
from attribution.gradients.shortcuts import Survey, survey

# Floats of a CPU core's buffers for transforms, which should stay in its own cache.
WAVE_SCRATCH = 2**19
# Of fewer images a trial without vmap costs more than it spares.
FEW = 8


@dataclass
class _Sums:
    """What the layers of each block add to: cells (B, blocks, k), and their Fourier transform."""

    cells: Tensor
    waves: Tensor
    blocks: dict[str, int]  # of a parameter

    def cells_of(self, name: str) -> Tensor:
        """Cells (B, k) of a parameter's block."""
        return self.cells[:, self.blocks[name]]

    def waves_of(self, name: str) -> Tensor:
        """Waves (B, k // 2 + 1) of a parameter's block."""
        return self.waves[:, self.blocks[name]]


def dealt(shapes: Mapping[str, Sequence[int]], num_blocks: int) -> dict[str, int]:
    """The block of each parameter: matrices dealt in order, vectors go with the one before them.

    Args:
        shapes: of a model's parameters by name, in the order of named_parameters().
        num_blocks: fewer where there are fewer matrices.
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
    The map depends on (seed, k, parameter names and shapes) alone; the route, on the layer's
    shape, the precision and the kind of device.

    With several blocks, each block of layers has k cells of its own: the features are those of
    the blocks side by side, and added up they are what one block would have.
    """

    def __init__(
        self,
        proj_dim: int,
        seed: int | str = 0,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 1,
    ) -> None:
        if proj_dim < 1:
            raise InputError(f"proj_dim is {proj_dim}; it must be at least 1")
        self.proj_dim, self.seed, self.dtype = proj_dim, seed, dtype
        self.num_blocks = num_blocks
        self._tables: dict[tuple, object] = {}
        self._surveys: WeakKeyDictionary[nn.Module, dict[tuple, Survey]] = WeakKeyDictionary()

    def features(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sketch of each sample's gradient, (B, blocks x proj_dim) in `dtype`, and margin, (B,).

        Layers are sketched while the backward pass is under way, so that no gradient, and no
        more of the activations than a training step needs, is ever held.
        """
        shapes = {name: p.shape for name, p in model.named_parameters()}
        sums = self._start(len(images), next(model.parameters()), shapes)
        shortcuts = self._shortcuts(model, images)
        captured = capture(model, images, labels, lambda call: self._add(call, sums), shortcuts)
        return self._finish(sums), captured.margins

    def project(self, captured: Captured) -> Tensor:
        """Sketch of each captured sample's gradient, (B, blocks x proj_dim) in `dtype`."""
        sums = self._start(len(captured.margins), captured.margins, captured.shapes)
        for call in captured.calls:
            self._add(call, sums)
        return self._finish(sums)

    def _shortcuts(self, model: nn.Module, images: Tensor) -> Shortcuts:
        """Those by which a layer whose weight's gradient is formed in any case gains, and all others.

        What is chosen depends on the model and on whether images are few alone, so that results do
        not depend on what else has been computed here. On a GPU they have not been measured.
        """
        if images.device.type != "cpu" or not images.is_floating_point():
            return Shortcuts()
        known, many = self._surveys.setdefault(model, {}), len(images) >= FEW
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        key = images.shape[1:], images.dtype, autocast, many, _state(model)
        if key not in known:
            for old in [old for old in known if old[-1] != key[-1]]:
                del known[old]
            known[key] = survey(model, images, many)
        fused = {
            pair.conv: pair.norm
            for pair in known[key].pairs
            if pair.pays() and not self._hashes(pair.conv, pair.shape, pair.dtype)
        }
        return Shortcuts(fused, known[key].copies)

    def _start(self, batch: int, like: Tensor, shapes: Mapping[str, Sequence[int]]) -> _Sums:
        blocks = dealt(shapes, self.num_blocks)
        size, dtype = (
            (batch, 1 + max(blocks.values())),
            torch.promote_types(like.dtype, torch.float32),
        )
        cells = torch.zeros(*size, self.proj_dim, dtype=dtype, device=like.device)
        waves = cells.new_zeros(*size, self.proj_dim // 2 + 1, dtype=dtype.to_complex())
        return _Sums(cells, waves, blocks)

    def _add(self, call: Call, sums: _Sums) -> None:
        for name, values in call.vectors().items():
            self._add_vector(name, values, sums.cells_of(name))
        if not call.has_matrix:
            return
        name = call.names["weight"]
        table = self._hash(name, call.module.weight.shape, sums.cells)
        if isinstance(call, Fused):
            hashes = False  # its BatchNorm's gradient comes of the product
        elif call.has_kernels():
            hashes = self.tensorsketches_on_gpu(*call.shape(), call.delta.dtype)
        else:
            hashes = self._hashes(call.module, call.shape(), call.delta.dtype)
        if hashes:
            self._add_waves(call, table, sums.waves_of(name))
        else:
            self._add_folds(call, table, sums)

    def _hashes(self, module: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
        """Whether a layer takes the tensorsketch route, without a GPU's kernels."""
        return getattr(module, "groups", 1) == 1 and self.tensorsketches(*shape, dtype)

    def _finish(self, sums: _Sums) -> Tensor:
        cells = sums.cells + torch.fft.irfft(sums.waves, n=self.proj_dim)
        return cells.flatten(1).to(self.dtype)

    def tensorsketches(
        self, positions: int, outputs: int, patch: int, dtype: torch.dtype = torch.float32
    ) -> bool:
        """Whether the tensorsketch route is cheaper, by costs in ns measured on one AVX-512 core.

        Per position: two transforms of length k and their product, and the hashing of delta
        and patch. Folding: a GEMM at 200 GFLOP/s (bfloat16: 400; of a long map, without patches, 800
        on the Xeon) and passes over the gradient. An Intel Xeon's costs are otherwise two to
        four times these, and their order nearly always the same.
        """
        k = self.proj_dim
        hashing = positions * (0.15 * k * math.log2(k + 1) + 0.6 * outputs + 0.2 * patch)
        gemm = 0.01
        if dtype == torch.bfloat16:
            gemm = 0.0025 if positions >= LONG_MAP else 0.005
        return hashing < outputs * patch * (gemm * positions + 0.15)

    def tensorsketches_on_gpu(
        self, positions: int, outputs: int, patch: int, dtype: torch.dtype = torch.float32
    ) -> bool:
        """The same for a GPU's kernels, by costs in ns measured on one H100."""
        hashing = positions * (0.026 * self.proj_dim + 0.0073 * (outputs + patch))
        product = 2e-5 if dtype == torch.float32 else 1e-5
        return hashing < outputs * patch * (product * positions + 0.004)

    def _add_vector(self, name: str, values: Tensor, cells: Tensor) -> None:
        """A bias or a normalisation's weight (B, n): signed, added up in runs of k."""
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
        # The same cells are written at every step; those between them stay zero.
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

    def _add_folds(self, call: Call, table: _Hash, sums: _Sums) -> None:
        cells, signs = sums.cells_of(call.names["weight"]), (table.rows, table.columns)
        for rows in steps(len(cells), call.rows_of_products() * table.stride, cells):
            formed = call.products(rows, signs, table.stride)
            self._add_runs(formed.flatten(1), table.offset, cells[rows])
            if isinstance(call, Fused):
                for name, values in call.norm_weight(rows, formed, signs).items():
                    self._add_vector(name, values, sums.cells_of(name)[rows])

    def _add_runs(self, values: Tensor, first: int, cells: Tensor) -> None:
        """Values (b, n) added to cells (b, k) in turn, from the first one's cell on."""
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
            # Just above the patch length, so that rows do not overlap and little memory is void.
            stride = patch + second % (patch // 16 + 8)
            while math.gcd(stride, k) > 1:
                stride += 1
            offset = first % k
            # Outputs k apart share a cell, and no others do.
            shifts = (offset + torch.arange(min(outputs, k), device=like.device) * stride) % k
            self._tables[key] = _Hash(offset, stride, signs[:outputs], signs[outputs:], shifts)
        return self._tables[key]

    def _signs(self, label: str, count: int) -> Tensor:
        bits = np.unpackbits(np.frombuffer(self._bytes(label, -(-count // 8)), np.uint8))
        return torch.from_numpy(bits[:count].astype(np.float32) * 2 - 1)

    def _bytes(self, label: str, count: int) -> bytes:
        """Random bytes that stay the same for ever, unlike a library's generator."""
        return hashlib.shake_256(f"{self.seed}/{self.proj_dim}/{label}".encode()).digest(count)


def _state(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes with a model's parameters: what of it was tried may hold for these alone."""
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in model.parameters())


def _fold(rows: Tensor, k: int) -> Tensor:
    """Rows (b, n) added up in runs of k, (b, min(n, k))."""
    if rows.shape[1] <= k:
        return rows
    runs, rest = divmod(rows.shape[1], k)
    total = rows[:, : runs * k].unflatten(1, (runs, k)).sum(1)
    total[:, :rest] += rows[:, runs * k :]
    return total
