"""One call of a layer within a pass over a batch, and the per-sample gradients that follow from it.

A weight's per-sample gradient is a sum over positions t of outer products, G = sum_t delta_t x a_t,
of the gradients delta_t at the layer's output and the patches a_t of its input.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
COVERED = (nn.Conv2d, nn.Linear, *NORMS)

# From so many positions on a CPU's convolution library beats patches and GEMM, and with groups also
# where a patch of one group has no more than so many entries.
LONG_MAP, SMALL_PATCH = 512, 9
# Values of a sample from which PyTorch's own sums for a BatchNorm pay for a call each.
LONG_NORM = 2**13
# Floats of scratch per step: 8 MiB a core stays in its caches; a GPU wants large steps instead.
CPU_SCRATCH, GPU_SCRATCH = 2**21, 2**26


@cache
def kernels(device: torch.device) -> Any:
    """The module of the same name; None where Triton is missing, or has no C compiler to start it with."""
    try:
        from attribution.gradients import triton_kernels

        one = torch.ones(1, 1, 1, 1, device=device)
        triton_kernels.position_sums(one, one)
    except Exception:  # of many kinds: everything is computed without them then
        return None
    return triton_kernels


@dataclass
class Call:
    """One call of a covered module: its input and the margin's gradient at its output."""

    module: nn.Module
    names: dict[str, str]  # "weight" and "bias" -> the parameter's name in the model
    input: Tensor
    version: int  # of the input when it was recorded, to notice later writes
    delta: Tensor | None = None  # stays None where the margin does not depend on the output

    @property
    def has_matrix(self) -> bool:
        return not isinstance(self.module, NORMS)

    def vectors(self) -> dict[str, Tensor]:
        """Per-sample gradients (B, n) of the bias and of a normalisation's weight, by name.

        LayerNorm's parameters may have several dimensions; they come back flattened.
        """
        if self.has_matrix and "bias" not in self.names:
            return {}
        if isinstance(self.module, nn.BatchNorm2d) and self.has_kernels():
            sums = kernels(self.delta.device).position_sums(self.input, self.delta)
            return self._normalisation(*sums)
        if isinstance(self.module, nn.BatchNorm2d) and self._is_long():
            return self._one_by_one()
        parts = [
            self._vectors(r) for r in steps(len(self.input), self.input[0].numel(), self.input)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _vectors(self, rows: slice) -> dict[str, Tensor]:
        x, delta, found = self.input[rows], self.delta[rows], {}
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        if isinstance(self.module, nn.LayerNorm):
            over = slice(1, x.dim() - len(self.module.normalized_shape))
            normal = F.layer_norm(
                x.to(delta.dtype), self.module.normalized_shape, eps=self.module.eps
            )
        elif isinstance(self.module, nn.GroupNorm):
            over = slice(2, x.dim())
            normal = F.group_norm(x.to(delta.dtype), self.module.num_groups, eps=self.module.eps)
        elif isinstance(self.module, nn.Linear):
            over = slice(1, x.dim() - 1)
        else:
            over = slice(2, x.dim())
        axes = tuple(range(x.dim()))[over]

        def total(values: Tensor) -> Tensor:
            return (values.sum(axes) if axes else values).flatten(1)

        sums = total(delta)
        if isinstance(self.module, BATCH_NORMS):
            return self._normalisation(sums, total(delta * x))
        if "bias" in self.names:
            found[self.names["bias"]] = sums
        if not self.has_matrix and "weight" in self.names:
            found[self.names["weight"]] = total(delta * normal)
        return found

    def _is_long(self) -> bool:
        """Whether PyTorch's own sums are faster, and as exact.

        Where layouts differ they are rounded otherwise in bfloat16, and of one image wrong (torch 2.15).
        """
        x, weight = self.input, self.module.weight
        return (
            x.device.type == "cpu"
            and x[0].numel() >= LONG_NORM
            and (x.dtype, x.stride()) == (self.delta.dtype, self.delta.stride())
            and weight.dtype == torch.promote_types(weight.dtype, torch.float32)
        )

    def _one_by_one(self) -> dict[str, Tensor]:
        """BatchNorm's, summed by PyTorch in one pass without copies, a sample a call."""
        norm = self.module
        found = [
            torch.ops.aten.native_batch_norm_backward(
                delta,
                x,
                norm.weight.detach(),
                norm.running_mean,
                norm.running_var,
                None,
                None,
                False,
                norm.eps,
                (False, True, True),
            )[1:]
            for delta, x in zip(self.delta.split(1), self.input.split(1), strict=True)
        ]
        return {
            self.names[kind]: torch.stack(each)
            for kind, each in zip(("weight", "bias"), zip(*found))
            if kind in self.names
        }

    def _normalisation(self, sums: Tensor, weighted: Tensor) -> dict[str, Tensor]:
        """BatchNorm's, of (b, channels) sums over positions of delta and of delta x."""
        # sum delta (x - mean)/std without a normalised copy of x
        mean, variance = self.module.running_mean, self.module.running_var
        scale = (variance + self.module.eps).rsqrt()
        found = {self.names["weight"]: (weighted - mean * sums) * scale}
        return found | ({self.names["bias"]: sums} if "bias" in self.names else {})

    def has_kernels(self) -> bool:
        """Whether a GPU's kernels apply: to types that its matrix units multiply, and without groups."""
        own = kernels(self.delta.device) if self.delta.is_cuda else None
        return (
            own is not None
            and getattr(self.module, "groups", 1) == 1
            and {self.delta.dtype, self.input.dtype} <= own.TILES.keys()
        )

    def deltas(self, rows: slice) -> Tensor:
        """Output gradients of some samples as (b, groups, positions, outputs per group)."""
        delta = self.delta[rows]
        if isinstance(self.module, nn.Linear):
            return delta.reshape(len(delta), 1, -1, delta.shape[-1])
        return delta.unflatten(1, (self.module.groups, -1)).flatten(3).transpose(2, 3)

    def windows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """The input patch at each position, (b, groups, Y, X, kh, kw, channels per group).

        A strided view of the zero-padded, channels-last input, so that patches are written
        once, where they are needed, in the gradient's own type by default. A Linear has patches
        of kh = kw = 1.
        """
        x, conv, dtype = self.input[rows], self.module, dtype or self.delta.dtype
        if isinstance(conv, nn.Linear):
            return x.reshape(len(x), 1, -1, 1, 1, 1, x.shape[-1]).to(dtype)
        (top, bottom), (left, right) = _padding(conv)
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

    def shape(self) -> tuple[int, int, int]:
        """Positions, outputs and patch length of a Conv2d or Linear."""
        outputs, *patch = self.module.weight.shape
        return self.delta[0].numel() // outputs, outputs, math.prod(patch)

    def patch_shape(self) -> tuple[int, int, int]:
        """(kh, kw, channels per group) of a Conv2d; a Linear's is (1, 1, inputs)."""
        _, inner, *kernel = self.module.weight.shape
        return (*kernel, inner) if kernel else (1, 1, inner)

    def convolves(self) -> bool:
        """Whether a CPU's convolution library forms the weight's gradient faster than a GEMM."""
        positions, _, patch = self.shape()
        return (
            isinstance(self.module, nn.Conv2d)
            and self.delta.device.type == "cpu"
            and (positions >= LONG_MAP or (self.module.groups > 1 and patch <= SMALL_PATCH))
            and all(before == after for before, after in _padding(self.module))
        )

    def products(
        self, rows: slice, signs: tuple[Tensor, Tensor] | None = None, stride: int | None = None
    ) -> Tensor:
        """Weight gradients of some samples, (b, O, stride): patches (kh, kw, channel) and then zeros.

        Args:
            signs: (O,) and (patch,) that entries are multiplied by; then kernels may compute in TF32.
            stride: at least a patch's length, which it is by default.
        """
        stride = stride or self.shape()[2]
        if signs and self.has_kernels():
            return self._by_kernel(rows, signs, stride)
        if self.convolves():
            return self._by_convolution(rows, signs, stride)
        return self._by_patches(rows, signs, stride)

    def rows_of_products(self) -> int:
        """Rows of `stride` values that `products` with signs takes room for, a sample."""
        positions, outputs, _ = self.shape()
        if self.has_kernels():
            return outputs
        groups = getattr(self.module, "groups", 1)
        return 2 * outputs + (0 if self.convolves() else groups * positions)

    def _by_kernel(self, rows: slice, signs: tuple[Tensor, Tensor], stride: int) -> Tensor:
        x, delta, module = self.input[rows], self.delta[rows], self.module
        if isinstance(module, nn.Linear):  # a convolution over a column of positions
            x, delta = (t.reshape(len(t), -1, t.shape[-1]).mT[..., None] for t in (x, delta))
            geometry: tuple = (1, 1), (1, 1), (0, 0), (1, 1)
            tf32 = torch.backends.cuda.matmul.allow_tf32
        else:
            (top, _), (left, _) = _padding(module)
            geometry = module.kernel_size, module.stride, (top, left), module.dilation
            tf32 = torch.backends.cudnn.allow_tf32
        _, outputs, patch = self.shape()
        out = delta.new_empty(len(delta), outputs, stride, dtype=torch.float32)
        kernels(delta.device).outer_products(x, delta, geometry, *signs, out[..., :patch], tf32)
        return out

    def _by_convolution(
        self, rows: slice, signs: tuple[Tensor, Tensor] | None, stride: int
    ) -> Tensor:
        """One call of the convolution's own backward pass for each sample."""
        conv, delta = self.module, self.delta[rows]
        x = self.input[rows].to(delta.dtype)
        only_its_shape = torch.empty_like(conv.weight, dtype=delta.dtype)
        (top, _), (left, _) = _padding(conv)
        formed = [
            torch.ops.aten.convolution_backward(
                one_delta,
                one_x,
                only_its_shape,
                None,
                conv.stride,
                (top, left),
                conv.dilation,
                False,
                (0, 0),
                conv.groups,
                (False, True, False),
            )[1]
            for one_delta, one_x in zip(delta.split(1), x.split(1), strict=True)
        ]
        return self._signed(torch.stack(formed).movedim(2, 4), signs, stride)

    def _by_patches(self, rows: slice, signs: tuple[Tensor, Tensor] | None, stride: int) -> Tensor:
        """A GEMM, which is signed before or after, where there is less to be signed."""
        deltas, windows = self.deltas(rows).mT, self.windows(rows)
        positions, outputs, patch = self.shape()
        groups = deltas.shape[1]
        if not signs or positions * (outputs + groups * patch) > outputs * patch:
            formed = (deltas @ windows.flatten(4).flatten(2, 3)).flatten(1, 2)
            return self._signed(formed.unflatten(2, self.patch_shape()), signs, stride)
        of_rows, of_columns = (s.to(windows.dtype) for s in signs)
        patches = windows.new_empty(*windows.shape[:4], stride)
        entries = self._entries(patches)
        torch.mul(windows, of_columns.view(entries.shape[4:]), out=entries)
        deltas = deltas * of_rows.view(groups, -1, 1)
        if deltas.dtype == torch.bfloat16:
            deltas = deltas.contiguous()  # as oneDNN is fastest; MKL does not mind
        return (deltas @ patches.flatten(2, 3)).flatten(1, 2)

    def _signed(self, formed: Tensor, signs: tuple[Tensor, Tensor] | None, stride: int) -> Tensor:
        """Gradients (b, O, kh, kw, channel), any strides, as `products` returns them."""
        out = formed.new_empty(*formed.shape[:2], stride)
        entries = self._entries(out)
        if signs:
            of_rows, of_columns = (s.to(out.dtype) for s in signs)
            torch.mul(formed, (of_rows[:, None] * of_columns).view(formed.shape[1:]), out=entries)
        else:
            entries.copy_(formed)
        return out

    def _entries(self, rows: Tensor) -> Tensor:
        """Patches (..., kh, kw, channel) at the start of rows (..., stride), which are ended with zeros."""
        patch = self.shape()[2]
        rows[..., patch:] = 0
        return rows[..., :patch].unflatten(-1, self.patch_shape())

    def weight_gradient(self) -> Tensor:
        """Exact per-sample gradient of the weight, (B, *weight.shape)."""
        formed = self.products(slice(0, len(self.delta))).unflatten(2, self.patch_shape())
        return formed.movedim(4, 2).reshape(-1, *self.module.weight.shape)


@dataclass
class Stray:
    """A parameter without a rule, of which every sample had a copy of its own."""

    names: dict[str, str]  # "weight" -> its name in the model
    delta: Tensor | None = None  # the margin's gradient, (B, *parameter.shape)
    input: None = None
    has_matrix = False

    def vectors(self) -> dict[str, Tensor]:
        """Its per-sample gradient, flattened to (B, n), by name."""
        return {self.names["weight"]: self.delta.reshape(len(self.delta), -1)}


def _padding(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """Zeros before and after, by dimension; 'same' puts the odd one after, as torch does."""
    if conv.padding == "valid":
        return [(0, 0), (0, 0)]
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in conv.padding]


def steps(batch: int, floats: int, like: Tensor, per_core: int | None = None) -> Iterator[slice]:
    """Slices of the batch whose scratch, `floats` per sample, fits the device."""
    scratch = (per_core or CPU_SCRATCH) * torch.get_num_threads()
    if like.device.type != "cpu":
        scratch = GPU_SCRATCH
    size = max(1, scratch // floats)
    return (slice(i, min(i + size, batch)) for i in range(0, batch, size))
