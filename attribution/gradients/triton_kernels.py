"""Triton kernels for a GPU: per-sample weight gradients without patches in memory, and sums over positions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a tile: columns and positions at a time, then warps and stages of its pipeline.
TILES = {
    torch.float32: (64, 32, 4, 3),
    torch.bfloat16: (64, 64, 4, 3),
    torch.float16: (64, 64, 4, 3),
}
SPAN = 1024  # positions that one program of _position_sums adds up

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
    """A tile of sum_t delta_t x a_t of one sample, with t over the output's positions.

    After every row come `gap` zeros.
    """
    b = tl.program_id(2).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    first = tl.program_id(0) * BP
    p = first + tl.arange(0, BP)
    if ALIGNED:  # one tap of the kernel a tile, and neighbouring channels, all of them there
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
    """Write per-sample gradients of a convolution's weight, signed, to `out`, and zeros after each row.

    Args:
        x: its input (b, C, H, W), any strides.
        delta: the gradient at its output (b, O, Y, X), any strides.
        geometry: kernel size, stride, padding at top and left, dilation.
        row_signs: (O,) float32.
        column_signs: (P,) float32, P = kernel size x C, channels last.
        out: (b, O, P) float32, its last stride 1.
        tf32: compute products of float32 in TF32, as PyTorch's convolutions do by default.
    """
    (_, kw), (sy, sx), (top, left), (ddy, ddx) = geometry
    (b, channels, height, width), outputs = x.shape, delta.shape[1]
    patch, positions = out.shape[2], delta[0, 0].numel()
    wide = 128 if outputs >= 128 else 64
    columns, depth, warps, stages = TILES[delta.dtype]
    gap = out.stride(1) - patch
    grid = triton.cdiv(patch + gap, columns), triton.cdiv(outputs, wide), b
    _outer_products[grid](
        x, delta, row_signs, column_signs, out,
        *x.stride(), *delta.stride(), *out.stride()[:2],
        channels, height, width, outputs, delta.shape[3], positions, patch, gap,
        sy, sx, top, left, ddy, ddx,
        KW=kw, ALIGNED=channels % columns == 0, PRECISION="tf32" if tf32 else "ieee",
        BO=wide, BP=columns, BT=depth, num_warps=warps, num_stages=stages,
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
