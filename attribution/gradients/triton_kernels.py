"""Everything for GPUs: Triton kernels, calls that use them, and their comparison with the plain path.

The kernels form per-sample weight gradients without patches in memory, and sum over positions. Only
sketch.py imports this module, and only when images are on a GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from attribution.gradients import GradientError
from attribution.gradients.layer_rules import Call, Stray, padding_of
from attribution.gradients.per_sample import capture

COLUMNS = 64  # of a tile
POSITIONS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # of a tile at a time
SPAN = 1024  # positions that one program of _position_sums adds up
# Largest relative error of a layer that passes for rounding of operands to TF32 or bfloat16.
TOLERANCE = 2e-2

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


@triton.jit(
    do_not_specialize=["H", "W", "X", "T", "P", "gap", "sy", "sx", "top", "left", "ddy", "ddx"]
)
def _outer_products(
    x, delta, row_signs, column_signs, out,
    xb, xc, xy, xx, db, do, dy, dx, ob, oo,
    C, H, W, N, X, T, P, gap, sy, sx, top, left, ddy, ddx,
    KW: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BO: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A tile of sum_t delta_t x a_t of one sample, where t runs over the output's positions.

    `gap` zeros follow every row.
    """
    b = tl.program_id(2).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    first = tl.program_id(0) * BP
    p = first + tl.arange(0, BP)
    # A tile has one tap of the kernel, and adjacent channels without any beyond the last.
    if ALIGNED:
        c, tap = first % C + tl.arange(0, BP), first // C
        down, right = (tap // KW) * ddy, (tap % KW) * ddx
    else:
        c, tap = p % C, p // C
        down, right = ((tap // KW) * ddy)[None, :], ((tap % KW) * ddx)[None, :]
    total = tl.zeros((BO, BP), dtype=tl.float32)
    for start in range(0, tl.where(first < P, T, 0), BT):
        t = start + tl.arange(0, BT)
        there = (t < T)[:, None]
        d = tl.load(
            delta + b * db + o[None, :] * do + (t // X * dy + t % X * dx)[:, None],
            mask=there & (o < N)[None, :],
            other=0.0,
        )
        row = (t // X * sy - top)[:, None] + down
        column = (t % X * sx - left)[:, None] + right
        inside = there & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        if not ALIGNED:
            inside = inside & (p < P)[None, :]
        a = tl.load(
            x + b * xb + c[None, :] * xc + row * xy + column * xx,
            mask=inside,
            other=0.0,
        )
        total = tl.dot(tl.trans(d), a.to(d.dtype), total, input_precision=PRECISION)
    signs = tl.load(row_signs + o, mask=o < N)[:, None]
    signs = signs * tl.load(column_signs + p, mask=p < P, other=0.0)[None, :]
    place = out + b * ob + o[:, None].to(tl.int64) * oo + p[None, :]
    tl.store(place, total * signs, mask=(p < P + gap)[None, :] & (o < N)[:, None])


def outer_products(
    x: Tensor,
    delta: Tensor,
    geometry: Geometry,
    row_signs: Tensor,
    column_signs: Tensor,
    out: Tensor,
    tf32: bool,
) -> None:
    """Write signed per-sample gradients of a convolution's weight to `out`, and zeros after each row.

    Args:
        x: its input (b, C, H, W), any strides.
        delta: the gradient at its output (b, O, Y, X), any strides.
        geometry: kernel size, stride, padding at top and left, dilation.
        row_signs: (O,) float32.
        column_signs: (P,) float32, P = kernel size x C, channels last.
        out: (b, O, P) float32, its last stride 1.
        tf32: compute float32 products in TF32, as PyTorch's convolutions do by default.
    """
    (_, kw), (sy, sx), (top, left), (ddy, ddx) = geometry
    (b, channels, height, width), outputs = x.shape, delta.shape[1]
    patch, positions = out.shape[2], delta[0, 0].numel()
    wide = 128 if outputs >= 128 else 64
    gap = out.stride(1) - patch
    grid = triton.cdiv(patch + gap, COLUMNS), triton.cdiv(outputs, wide), b
    _outer_products[grid](
        x, delta, row_signs, column_signs, out,
        *x.stride(), *delta.stride(), *out.stride()[:2],
        channels, height, width, outputs, delta.shape[3], positions, patch, gap,
        sy, sx, top, left, ddy, ddx,
        KW=kw, ALIGNED=channels % COLUMNS == 0, PRECISION="tf32" if tf32 else "ieee",
        BO=wide, BP=COLUMNS, BT=POSITIONS[delta.dtype], num_warps=4, num_stages=3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["X", "T"])
def _position_sums(
    x, delta, out,
    xb, xc, xy, xx, db, dc, dy, dx,
    C, X, T,
    SPAN: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    b, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    plain, weighted = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for start in range(part * SPAN, min(T, (part + 1) * SPAN), BT):
        t = start + tl.arange(0, BT)
        mask = (t < T)[:, None] & (c < C)[None, :]
        y, z = t // X, t % X
        d = tl.load(delta + b * db + c[None, :] * dc + (y * dy + z * dx)[:, None], mask, 0.0)
        a = tl.load(x + b * xb + c[None, :] * xc + (y * xy + z * xx)[:, None], mask, 0.0)
        plain += tl.sum(d.to(tl.float32), 0)
        weighted += tl.sum(d.to(tl.float32) * a.to(tl.float32), 0)
    place = out + (b * tl.num_programs(1) + part) * 2 * C + c
    tl.store(place, plain, mask=c < C)
    tl.store(place + C, weighted, mask=c < C)


def position_sums(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of delta and of delta x, (b, C) float32, of x and delta (b, C, Y, X)."""
    (b, channels, _, width), positions = x.shape, x[0, 0].numel()
    parts = triton.cdiv(positions, SPAN)
    out = torch.empty(b, parts, 2, channels, device=x.device)
    _position_sums[triton.cdiv(channels, 64), parts, b](
        x, delta, out, *x.stride(), *delta.stride(), channels, width, positions,
        SPAN=SPAN, BC=64, BT=32,
    )  # fmt: skip
    plain, weighted = out.sum(1).unbind(1)
    return plain, weighted


@dataclass
class KernelCall(Call):
    """A call whose gradients come from the kernels where they apply, and from the plain path elsewhere."""

    def has_kernels(self) -> bool:
        """Whether the kernels apply: to types that the GPU's matrix units multiply, without groups."""
        return self.groups == 1 and {self.delta.dtype, self.input.dtype} <= POSITIONS.keys()

    def vectors(self) -> dict[str, Tensor]:
        """As Call's."""
        if not (isinstance(self.module, nn.BatchNorm2d) and self.has_kernels()):
            return super().vectors()
        sums, weighted = position_sums(self.input, self.delta)
        found = {"weight": self.batch_norm_weight(sums, weighted), "bias": sums}
        return {name: found[kind] for kind, name in self.names.items()}

    def products(self, rows: slice, signs: tuple[Tensor, Tensor], stride: int) -> Tensor:
        """As Call's; products may be computed in TF32."""
        if not self.has_kernels():
            return super().products(rows, signs, stride)
        x, delta = self.input[rows], self.delta[rows]
        module: Any = self.module
        if isinstance(module, nn.Linear):  # a convolution over a column of positions
            x, delta = (t.reshape(len(t), -1, t.shape[-1]).mT[..., None] for t in (x, delta))
            geometry = (1, 1), (1, 1), (0, 0), (1, 1)
            tf32 = torch.backends.cuda.matmul.allow_tf32
        else:
            (top, _), (left, _) = padding_of(module)
            geometry = module.kernel_size, module.stride, (top, left), module.dilation
            tf32 = torch.backends.cudnn.allow_tf32
            delta = delta.contiguous(memory_format=torch.channels_last)
        _, outputs, patch = self.shape()
        out = delta.new_empty(len(delta), outputs, stride, dtype=torch.float32)
        outer_products(x, delta, geometry, *signs, out[..., :patch], tf32)
        return out

    def rows_of_products(self) -> int:
        """As Call's."""
        return self.shape()[1] if self.has_kernels() else super().rows_of_products()

    def hashing_pays(self, k: int) -> bool:
        """As Call's, by costs in ns measured on one H100."""
        if not self.has_kernels():
            return super().hashing_pays(k)
        positions, outputs, patch = self.shape()
        hashing = positions * (0.026 * k + 0.0073 * (outputs + patch))
        product = 2e-5 if self.delta.dtype == torch.float32 else 1e-5
        return hashing < outputs * patch * (product * positions + 0.004)


def compare(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compare the gradients of these images by kernels and by the plain path, layer by layer.

    Raises:
        GradientError: those of a layer differ by more than rounding.
    """

    def receive(call: Call | Stray) -> None:
        if isinstance(call, Stray):
            return
        found, plain = call.vectors(), Call.vectors(call)
        if call.has_matrix:
            name, (_, outputs, patch), rows = call.names["weight"], call.shape(), slice(len(images))
            signs = torch.ones(outputs + patch, device=call.delta.device).split([outputs, patch])
            found[name] = call.products(rows, signs, patch)
            plain[name] = Call.products(call, rows, signs, patch)
        for name, expected in plain.items():
            error = float((found[name] - expected).norm() / expected.norm().clamp(min=1e-30))
            if not error <= TOLERANCE:
                raise GradientError(f"{name}: kernels differ from the plain path by {error:.1%}")

    capture(model, images, labels, receive, call_type=KernelCall)
