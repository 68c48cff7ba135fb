"""One call of a layer within a pass over a batch, and the per-sample gradients that follow from it.

A weight's per-sample gradient is a sum over positions t of outer products, G = sum_t delta_t x a_t,
of the gradients delta_t at the layer's output and the patches a_t of its input.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
COVERED = (nn.Conv2d, nn.Linear, *NORMS)

# With at least this many positions the CPU's convolution library is faster than patches and a GEMM.
# So it is with groups whose patches have at most SMALL_PATCH entries.
LONG_MAP, SMALL_PATCH = 512, 9
# Floats of scratch memory per step: 8 MiB per core stay in a CPU's caches; a GPU wants large steps.
CPU_SCRATCH, GPU_SCRATCH = 2**21, 2**26


@dataclass
class Call:
    """One call of a covered module: its input and the margin's gradient at its output."""

    module: nn.Module
    names: dict[str, str]  # "weight" and "bias" -> the parameter's name in the model
    input: Tensor
    version: int  # of the input when it was recorded; a later write changes it
    delta: Tensor | None = None  # stays None where the margin does not depend on the output

    @property
    def has_matrix(self) -> bool:
        return "weight" in self.names and not isinstance(self.module, NORMS)

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    def vectors(self) -> dict[str, Tensor]:
        """Per-sample gradients (B, n) of the bias and of a normalisation's weight, by name.

        LayerNorm's parameters may have several dimensions; they come back flattened.
        """
        wanted = [kind for kind in self.names if kind == "bias" or not self.has_matrix]
        if not wanted:
            return {}
        slices = steps(len(self.input), self.input[0].numel(), self.input)
        parts = [self._vectors(rows) for rows in slices]
        return {self.names[kind]: torch.cat([part[kind] for part in parts]) for kind in wanted}

    def _vectors(self, rows: slice) -> dict[str, Tensor]:
        """Those of some samples by kind, "bias" and "weight", summed over positions."""
        x, delta, module = self.input[rows], self.delta[rows], self.module
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        positions = self._position_axes()

        def total(values: Tensor) -> Tensor:
            return (values.sum(positions) if positions else values).flatten(1)

        sums = {"bias": total(delta)}
        if isinstance(module, BATCH_NORMS):
            sums["weight"] = self.batch_norm_weight(sums["bias"], total(delta * x))
        elif isinstance(module, nn.LayerNorm):
            x = F.layer_norm(x.to(delta.dtype), module.normalized_shape, eps=module.eps)
            sums["weight"] = total(delta * x)
        elif isinstance(module, nn.GroupNorm):
            x = F.group_norm(x.to(delta.dtype), module.num_groups, eps=module.eps)
            sums["weight"] = total(delta * x)
        return sums

    def _position_axes(self) -> tuple[int, ...]:
        """Dimensions of the input over which a bias is repeated."""
        dimensions, module = self.input.dim(), self.module
        if isinstance(module, nn.LayerNorm):
            return tuple(range(1, dimensions - len(module.normalized_shape)))
        if isinstance(module, nn.Linear):
            return tuple(range(1, dimensions - 1))
        return tuple(range(2, dimensions))

    def batch_norm_weight(self, sums: Tensor, weighted: Tensor) -> Tensor:
        """Gradient (b, channels) of a BatchNorm's weight from sums over positions of delta and delta x.

        It is sum delta (x - mean) / std, computed without a normalised copy of x.
        """
        mean, variance = self.module.running_mean, self.module.running_var
        return (weighted - mean * sums) * (variance + self.module.eps).rsqrt()

    def shape(self) -> tuple[int, int, int]:
        """Positions, outputs and patch length of a Conv2d or Linear."""
        outputs, *patch = self.module.weight.shape
        return self.delta[0].numel() // outputs, outputs, math.prod(patch)

    def patch_shape(self) -> tuple[int, int, int]:
        """(kh, kw, channels per group) of a Conv2d; a Linear's is (1, 1, inputs)."""
        _, inner, *kernel = self.module.weight.shape
        return (*kernel, inner) if kernel else (1, 1, inner)

    def deltas(self, rows: slice) -> Tensor:
        """Output gradients of some samples as (b, groups, positions, outputs per group)."""
        delta = self.delta[rows]
        if isinstance(self.module, nn.Linear):
            return delta.reshape(len(delta), 1, -1, delta.shape[-1])
        return delta.unflatten(1, (self.groups, -1)).flatten(3).transpose(2, 3)

    def windows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """The input patch at each position, (b, groups, Y, X, kh, kw, channels per group).

        A strided view of the zero-padded, channels-last input in the gradient's type by default, so
        that patches are written only once, where they are needed. A Linear's have kh = kw = 1.
        """
        x, conv, dtype = self.input[rows], self.module, dtype or self.delta.dtype
        if isinstance(conv, nn.Linear):
            return x.reshape(len(x), 1, -1, 1, 1, 1, x.shape[-1]).to(dtype)
        (top, bottom), (left, right) = padding_of(conv)
        b, channels, height, width = x.shape
        size = (b, height + top + bottom, width + left + right, channels)
        padded = x.new_zeros(size, dtype=dtype)
        padded[:, top : top + height, left : left + width] = x.permute(0, 2, 3, 1)
        sample, row, column, _ = padded.stride()
        (sy, sx), (dy, dx) = conv.stride, conv.dilation
        inner = channels // conv.groups
        size = (b, conv.groups, *self.delta.shape[2:], *conv.kernel_size, inner)
        step = (sample, inner, sy * row, sx * column, dy * row, dx * column, 1)
        return padded.as_strided(size, step)

    def convolves(self) -> bool:
        """Whether the CPU's convolution library forms the weight's gradient faster than a GEMM."""
        positions, _, patch = self.shape()
        return (
            isinstance(self.module, nn.Conv2d)
            and self.delta.device.type == "cpu"
            and (positions >= LONG_MAP or (self.groups > 1 and patch <= SMALL_PATCH))
            and all(before == after for before, after in padding_of(self.module))
        )

    def products(self, rows: slice, signs: tuple[Tensor, Tensor], stride: int) -> Tensor:
        """Signed weight gradients of some samples, (b, O, stride): patches (kh, kw, channel), then zeros.

        Args:
            signs: (O,) and (patch,) that the entries are multiplied by.
            stride: at least a patch's length.
        """
        formed, patch = self._formed(rows), self.shape()[2]
        out = formed.new_empty(*formed.shape[:2], stride)
        out[..., patch:] = 0
        entries = out[..., :patch].unflatten(-1, self.patch_shape())
        of_rows, of_columns = (s.to(out.dtype) for s in signs)
        torch.mul(formed, (of_rows[:, None] * of_columns).view(formed.shape[1:]), out=entries)
        return out

    def weight_gradient(self) -> Tensor:
        """Exact per-sample gradient of the weight, (B, *weight.shape)."""
        formed = self._formed(slice(0, len(self.delta)))
        return formed.movedim(4, 2).reshape(-1, *self.module.weight.shape)

    def _formed(self, rows: slice) -> Tensor:
        """Weight gradients (b, O, kh, kw, channel) of some samples."""
        return self._by_convolution(rows) if self.convolves() else self._by_patches(rows)

    def _by_convolution(self, rows: slice) -> Tensor:
        """By one backward call of the convolution per sample."""
        conv, delta = self.module, self.delta[rows]
        pairs = zip(self.input[rows].to(delta.dtype).split(1), delta.split(1), strict=True)
        padding = tuple(before for before, _ in padding_of(conv))
        rest = conv.stride, padding, conv.dilation, conv.groups
        formed = [conv2d_weight(x, conv.weight.shape, d, *rest) for x, d in pairs]
        return torch.stack(formed).movedim(2, 4)

    def _by_patches(self, rows: slice) -> Tensor:
        """By a GEMM."""
        formed = self.deltas(rows).mT @ self.windows(rows).flatten(4).flatten(2, 3)
        return formed.flatten(1, 2).unflatten(2, self.patch_shape())

    def rows_of_products(self) -> int:
        """How many rows of `stride` values `products` needs memory for, per sample."""
        positions, outputs, _ = self.shape()
        return 2 * outputs + (0 if self.convolves() else self.groups * positions)

    def hashing_pays(self, k: int) -> bool:
        """Whether a sketch of k cells is cheaper by hashing deltas and patches than by `products`.

        Costs are in ns, measured on one AVX-512 core. Hashing takes per position two transforms of
        length k, their product, and the hashing of delta and patch. Forming takes a GEMM at 200
        GFLOP/s (bfloat16: 400; 800 for a long map, which needs no patches) and passes over the
        gradient. Other CPUs are two to four times slower at all of it; which route is cheaper is
        nearly always the same.
        """
        positions, outputs, patch = self.shape()
        hashing = positions * (0.15 * k * math.log2(k + 1) + 0.6 * outputs + 0.2 * patch)
        gemm = 0.01
        if self.delta.dtype == torch.bfloat16:
            gemm = 0.0025 if positions >= LONG_MAP else 0.005
        return hashing < outputs * patch * (gemm * positions + 0.15)


@dataclass
class Stray:
    """A parameter without a rule, of which every sample had its own copy."""

    names: dict[str, str]  # "weight" -> its name in the model
    delta: Tensor | None = None  # the margin's gradient, (B, *parameter.shape)
    input: None = None
    has_matrix = False

    def vectors(self) -> dict[str, Tensor]:
        """Its per-sample gradient, flattened to (B, n), by name."""
        return {self.names["weight"]: self.delta.reshape(len(self.delta), -1)}


def padding_of(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """Zeros before and after, for each dimension; "same" puts the odd one after, as PyTorch does."""
    if conv.padding == "valid":
        return [(0, 0), (0, 0)]
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in conv.padding]


def steps(batch: int, floats: int, like: Tensor, per_core: int | None = None) -> Iterator[slice]:
    """Slices of the batch whose scratch memory, `floats` per sample, suits the device."""
    scratch = (per_core or CPU_SCRATCH) * torch.get_num_threads()
    if like.device.type != "cpu":
        scratch = GPU_SCRATCH
    size = max(1, scratch // floats)
    return (slice(i, min(i + size, batch)) for i in range(0, batch, size))
