"""Exact per-sample gradients of the margin from one forward and one backward pass, and their random sketch.

In eval mode the samples of a batch do not mix, so the backward pass of the summed margins
gives, at every layer, each sample's own output gradient. A weight's per-sample gradient is
then a sum over positions t of outer products, G = sum_t delta_t x a_t; it is formed only where
that is cheaper than sketching the factors.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.errors import InputError

# Exact types, not subclasses: a subclass may compute something else from the same weight.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
COVERED = (nn.Conv2d, nn.Linear, *NORMS)

# Where the library's weight-gradient convolution beats patches and GEMM. One AVX-512 core, us per
# image, 3x3: 64 channels at 8x8 29 / 13, at 16x16 201 / 201, at 56x56 956 / 2740; 128 at 16x16
# 586 / 1246; 256 at 14x14 1559 / 2667; the 7x7 stem at 32x32 142 / 220.
LONG_MAP, LARGE_PRODUCT = 512, 2**24
# Floats of scratch per step: 1 MiB stays in a core's cache; a GPU wants large steps instead.
CPU_SCRATCH, GPU_SCRATCH = 2**18, 2**26


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """f = log p/(1-p) of the label: its logit minus logsumexp of the others; (B, C), (B,) -> (B,)."""
    label = labels[:, None]
    others = logits.scatter(1, label, -math.inf)
    return logits.gather(1, label)[:, 0] - others.logsumexp(1)


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
        x, delta, found = self.input, self.delta, {}
        if isinstance(self.module, nn.LayerNorm):
            over = slice(1, x.dim() - len(self.module.normalized_shape))
            normal = F.layer_norm(x, self.module.normalized_shape, eps=self.module.eps)
        elif isinstance(self.module, nn.GroupNorm):
            over = slice(2, x.dim())
            normal = F.group_norm(x, self.module.num_groups, eps=self.module.eps)
        elif isinstance(self.module, nn.Linear):
            over = slice(1, x.dim() - 1)
        else:
            over = slice(2, x.dim())
        axes = tuple(range(x.dim()))[over]

        def total(values: Tensor) -> Tensor:
            return (values.sum(axes) if axes else values).flatten(1)

        sums = total(delta)
        if "bias" in self.names:
            found[self.names["bias"]] = sums
        if self.has_matrix:
            return found
        if isinstance(self.module, BATCH_NORMS):
            # sum delta (x - mean)/std without a normalised copy of x
            mean, scale = (
                self.module.running_mean,
                (self.module.running_var + self.module.eps).rsqrt(),
            )
            found[self.names["weight"]] = (total(delta * x) - mean * sums) * scale
        elif "weight" in self.names:
            found[self.names["weight"]] = total(delta * normal)
        return found

    def deltas(self, rows: slice) -> Tensor:
        """Output gradients of some samples as (b, groups, positions, outputs per group)."""
        delta = self.delta[rows]
        if isinstance(self.module, nn.Linear):
            return delta.reshape(len(delta), 1, -1, delta.shape[-1])
        return delta.unflatten(1, (self.module.groups, -1)).flatten(3).transpose(2, 3)

    def windows(self, rows: slice) -> Tensor:
        """The input patch at each position, (b, groups, Y, X, kh, kw, channels per group).

        A strided view of the zero-padded, channels-last input, so that patches are written
        once, already signed, where they are needed. A Linear has patches of kh = kw = 1.
        """
        x, conv = self.input[rows], self.module
        if isinstance(conv, nn.Linear):
            return x.reshape(len(x), 1, -1, 1, 1, 1, x.shape[-1])
        (top, bottom), (left, right) = _padding(conv)
        b, channels, height, width = x.shape
        padded = x.new_zeros(b, height + top + bottom, width + left + right, channels)
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

    def by_convolution(self) -> bool:
        """Whether the weight gradient is better left to the convolution library."""
        if isinstance(self.module, nn.Linear) or any(a != b for a, b in _padding(self.module)):
            return False
        positions, outputs, patch = self.shape()
        large = positions >= 128 and positions * outputs * patch >= LARGE_PRODUCT
        return positions >= LONG_MAP or large

    def convolution(self, row: int, delta: Tensor) -> Tensor:
        """Weight gradient (O, C/groups, kh, kw) of one sample for output gradient (1, O, Y, X)."""
        conv = self.module
        (top, _), (left, _) = _padding(conv)
        return torch.ops.aten.convolution_backward(
            delta,
            self.input[row : row + 1],
            conv.weight.detach(),
            None,
            conv.stride,
            (top, left),
            conv.dilation,
            False,
            (0, 0),
            conv.groups,
            (False, True, False),
        )[1]

    def weight_gradient(self) -> Tensor:
        """Exact per-sample gradient of the weight, (B, *weight.shape)."""
        if self.by_convolution():
            rows = (self.convolution(b, self.delta[b : b + 1]) for b in range(len(self.delta)))
            return torch.stack(list(rows))
        deltas, windows = self.deltas(slice(None)), self.windows(slice(None))
        patches = windows.flatten(4).flatten(2, 3)
        formed = (deltas.transpose(2, 3) @ patches).flatten(1, 2)
        if isinstance(self.module, nn.Linear):
            return formed
        return formed.unflatten(2, windows.shape[4:]).permute(0, 1, 4, 2, 3)


def _padding(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """Zeros before and after, by dimension; 'same' puts the odd one after, as torch does."""
    if conv.padding == "valid":
        return [(0, 0), (0, 0)]
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in conv.padding]


@dataclass
class Captured:
    """What one pass over a batch of B samples leaves behind; everything is detached.

    logits (B, C); margins (B,); probability (B,) of the label; calls of covered modules, in
    order; shapes of the model's parameters by name, in the order of named_parameters().
    """

    logits: Tensor
    margins: Tensor
    probability: Tensor
    calls: list[Call] = field(repr=False)
    shapes: dict[str, torch.Size] = field(repr=False)

    def vectors(self) -> dict[str, Tensor]:
        """Per-sample gradients (B, n) of biases and normalisations; repeated calls add up."""
        total: dict[str, Tensor] = {}
        for call in self.calls:
            for name, value in call.vectors().items():
                total[name] = total[name] + value if name in total else value
        return total

    def matrices(self) -> Iterator[tuple[str, Call]]:
        """The calls that have a weight to be formed from outer products, with its name."""
        return ((c.names["weight"], c) for c in self.calls if c.has_matrix)

    def per_sample(self) -> dict[str, Tensor]:
        """Exact gradient of each sample's margin: parameter name -> (B, *parameter.shape)."""
        total = self.vectors()
        for name, call in self.matrices():
            value = call.weight_gradient()
            total[name] = total[name] + value if name in total else value
        empty = self.margins.new_zeros
        batch = len(self.margins)
        return {
            name: total[name].reshape(batch, *shape) if name in total else empty(batch, *shape)
            for name, shape in self.shapes.items()
        }


def capture(model: nn.Module, images: Tensor, labels: Tensor) -> Captured:
    """Record one forward and one backward pass of the summed margins; images (B, ...), labels (B,).

    The model is called as model(images) and may return logits (B, C) or an object with
    `.logits`. All parameters count, whatever their requires_grad. Raises InputError for
    anything that would make a gradient wrong or incomplete: train mode, a parameter that no
    rule covers, a covered module that did not run, an activation that was overwritten.
    """
    layers = _layers(model)
    calls: list[Call] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if x.shape[:1] != images.shape[:1]:
            raise InputError(
                f"{paths[module]}: its input has shape {tuple(x.shape)} for a batch of "
                f"{len(images)}; the samples must stay along the first dimension"
            )
        call = Call(module, layers[module], x, x._version)
        calls.append(call)
        source = output if output.requires_grad else output.detach().requires_grad_()
        source.register_hook(lambda delta: setattr(call, "delta", delta.detach()))
        # A copy where the graph starts: the model may write into its layers' outputs.
        return source if source is output else source.clone()

    paths = {module: name or type(module).__name__ for name, module in model.named_modules()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    handles = [module.register_forward_hook(record) for module in layers]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            output = model(images.detach())
            logits = getattr(output, "logits", output)
            _check_labels(logits, labels)
            _check_calls(layers, paths, calls)
            f = margins(
                logits.double() if logits.dtype == torch.float64 else logits.float(), labels
            )
            f.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    f = f.detach()
    if not f.isfinite().all():
        raise InputError(f"the margin of sample {int((~f.isfinite()).nonzero()[0])} is not finite")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    used = [call for call in calls if call.delta is not None]
    return Captured(logits.detach(), f, f.sigmoid(), used, shapes)


def _layers(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Modules to hook, each with its parameters' names in the model; refuses what is not covered."""
    first = {id(p): name for name, p in model.named_parameters()}  # tied weights share a name
    layers, refused = {}, []
    for path, module in model.named_modules():
        if module.training:
            raise InputError(f"{path or 'the model'} is in train mode; call model.eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"{path}: without running statistics its samples mix in every batch")
        own = {name: first[id(p)] for name, p in module.named_parameters(recurse=False)}
        zeros = getattr(module, "padding_mode", "zeros") == "zeros"
        if own and (
            type(module) not in COVERED or not own.keys() <= {"weight", "bias"} or not zeros
        ):
            refused += own.values()
        elif own:
            layers[module] = own
    if refused:
        raise InputError(
            f"no rule gives the per-sample gradient of {', '.join(refused)}; covered are Conv2d "
            "(zero padding), Linear, BatchNorm, LayerNorm and GroupNorm, and not their subclasses"
        )
    return layers


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: a margin needs "
            "(B, C) with at least two classes, and (B,)"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InputError(f"labels must lie in 0..{logits.shape[1] - 1}")


def _check_calls(layers: dict, paths: dict[nn.Module, str], calls: list[Call]) -> None:
    silent = [paths[module] for module in layers.keys() - {call.module for call in calls}]
    if silent:
        raise InputError(
            f"{', '.join(sorted(silent))} did not run in the forward pass, or was used behind the "
            "hooks' back; its gradient would be missing"
        )
    for call in calls:
        if call.input._version != call.version:
            raise InputError(
                f"the input of {paths[call.module]} was overwritten by an in-place operation "
                "after the layer had run; make that operation out of place"
            )


@dataclass
class _Hash:
    """Where a weight's entries (o, p) go: cell (offset + o stride + p) mod k, with sign s_o s_p."""

    offset: int
    stride: int
    rows: Tensor  # s_o, (O,)
    columns: Tensor  # s_p, (P,) with p in the order kh, kw, channel
    shifts: Tensor  # (offset + o stride) mod k, (O,)


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
    shape alone.
    """

    def __init__(
        self, proj_dim: int, seed: int | str = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        if proj_dim < 1:
            raise InputError(f"proj_dim is {proj_dim}; it must be at least 1")
        self.proj_dim, self.seed, self.dtype = proj_dim, seed, dtype
        self._tables: dict[tuple, object] = {}

    def project(self, captured: Captured) -> Tensor:
        """Sketch of each sample's gradient, (B, proj_dim) in `dtype`, on the model's device."""
        batch, k, f = len(captured.margins), self.proj_dim, captured.margins
        cells = f.new_zeros(batch, k)
        waves = torch.zeros(batch, k // 2 + 1, dtype=f.dtype.to_complex(), device=f.device)
        self._add_vectors(captured.vectors(), cells)
        for name, call in captured.matrices():
            table = self._hash(name, call.module.weight.shape, f)
            if call.module.__dict__.get("groups", 1) == 1 and self.tensorsketches(*call.shape()):
                self._add_waves(call, table, waves)
            else:
                self._add_folds(call, table, cells)
        return (cells + torch.fft.irfft(waves, n=k)).to(self.dtype)

    def tensorsketches(self, positions: int, outputs: int, patch: int) -> bool:
        """Whether the tensorsketch route is cheaper, by costs in ns measured on one AVX-512 core.

        Per position: two transforms of length k and their product, and the hashing of delta
        and patch. Folding: a GEMM at 100 GFLOP/s and one pass over the gradient.
        """
        k = self.proj_dim
        hashing = positions * (0.15 * k * math.log2(k + 1) + 0.6 * outputs + 0.2 * patch)
        return hashing < outputs * patch * (0.02 * positions + 0.1)

    def _add_vectors(self, vectors: dict[str, Tensor], cells: Tensor) -> None:
        """Biases and normalisations: one long vector, signed, added up in runs of k."""
        if not vectors:
            return
        flat = torch.cat(list(vectors.values()), dim=1).to(cells.dtype)
        sizes = tuple((name, value.shape[1]) for name, value in vectors.items())
        key = (sizes, cells.device, cells.dtype)
        if key not in self._tables:
            signs = [self._signs(f"{name} {n}", n) for name, n in sizes]
            self._tables[key] = torch.cat(signs).to(cells)
        short = -flat.shape[1] % self.proj_dim
        cells += (
            F.pad(flat * self._tables[key], (0, short)).unflatten(1, (-1, cells.shape[1])).sum(1)
        )

    def _add_waves(self, call: Call, table: _Hash, waves: Tensor) -> None:
        k = self.proj_dim
        positions, _, patch = call.shape()
        width = -(-patch // k) * k
        for rows in _steps(len(waves), positions * k, waves.device):
            windows, deltas = call.windows(rows), call.deltas(rows)
            count = len(windows) * positions
            patches = table.columns.new_zeros(count, width)
            self._signed(windows, table, patches[:, :patch])
            if width > k:
                patches = patches.view(count, -1, k).sum(1)
            outputs = torch.zeros_like(patches)
            outputs.index_add_(1, table.shifts, (deltas * table.rows).reshape(count, -1))
            product = torch.fft.rfft(outputs).mul_(torch.fft.rfft(patches))
            waves[rows] += product.unflatten(0, (-1, positions)).sum(1)

    def _add_folds(self, call: Call, table: _Hash, cells: Tensor) -> None:
        k = self.proj_dim
        positions, outputs, patch = call.shape()
        lines = -(-(table.offset + (outputs - 1) * table.stride + patch) // k)
        steps = list(_steps(len(cells), lines * k + positions * patch, cells.device))
        # The gaps between rows are never written, and stay zero from step to step.
        scratch = cells.new_zeros(steps[0].stop, lines * k)
        size, step = (outputs, patch), (lines * k, table.stride, 1)
        for rows in steps:
            b = rows.stop - rows.start
            formed = scratch.as_strided((b, *size), step, table.offset)
            self._form(call, table, rows, formed)
            cells[rows] += scratch[:b].view(b, lines, k).sum(1)

    def _form(self, call: Call, table: _Hash, rows: slice, out: Tensor) -> None:
        """Write the signed weight gradients of some samples into `out` (b, O, P)."""
        if call.by_convolution():
            kernel = call.module.weight.permute(0, 2, 3, 1).shape
            signs = table.columns.view(kernel[1:])
            for b, target in zip(range(rows.start, rows.stop), out, strict=True):
                gradient = call.convolution(b, call.delta[b : b + 1] * table.rows[:, None, None])
                torch.mul(gradient.permute(0, 2, 3, 1), signs, out=target.view(kernel))
            return
        windows = call.windows(rows)
        patches = out.new_empty(*windows.shape[:2], math.prod(windows.shape[2:4]), out.shape[2])
        self._signed(windows, table, patches)
        deltas = call.deltas(rows) * table.rows.view(windows.shape[1], 1, -1)
        deltas = deltas.transpose(2, 3)
        if windows.shape[1] == 1:
            torch.bmm(deltas[:, 0], patches[:, 0], out=out)
        else:
            out.copy_((deltas @ patches).flatten(1, 2))

    @staticmethod
    def _signed(windows: Tensor, table: _Hash, out: Tensor) -> None:
        """Write the signed patches into `out`, whose rows have the length of one patch."""
        signs = table.columns.view(windows.shape[4:])
        step = out.stride(-2)
        grid = [step * math.prod(windows.shape[i + 1 : 4]) for i in range(4)]
        strides = (*grid, windows[0, 0, 0, 0, 0].numel(), windows.shape[6], 1)
        torch.mul(windows, signs, out=out.as_strided(windows.shape, strides))

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
            shifts = (offset + torch.arange(outputs, device=like.device) * stride) % k
            self._tables[key] = _Hash(offset, stride, signs[:outputs], signs[outputs:], shifts)
        return self._tables[key]

    def _signs(self, label: str, count: int) -> Tensor:
        bits = np.unpackbits(np.frombuffer(self._bytes(label, -(-count // 8)), np.uint8))
        return torch.from_numpy(bits[:count].astype(np.float32) * 2 - 1)

    def _bytes(self, label: str, count: int) -> bytes:
        """Random bytes that stay the same for ever, unlike a library's generator."""
        return hashlib.shake_256(f"{self.seed}/{self.proj_dim}/{label}".encode()).digest(count)


def _steps(batch: int, floats: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch whose scratch, `floats` per sample, is about the cache's size."""
    size = max(1, (CPU_SCRATCH if device.type == "cpu" else GPU_SCRATCH) // floats)
    return (slice(i, min(i + size, batch)) for i in range(0, batch, size))
