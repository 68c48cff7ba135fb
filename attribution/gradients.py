"""Exact per-sample gradients of the margin from one forward and one backward pass.

In eval mode the samples of a batch do not mix, so the backward pass of the summed margins
gives, at every layer, each sample's own output gradient. A weight's per-sample gradient is
then a sum over positions t of outer products, G = sum_t delta_t x a_t. Of parameters without
such a rule (a class token, a layer scale) every sample is given a copy of its own by vmap.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mha
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from attribution.errors import InputError

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


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """f = log p/(1-p) of the label: its logit minus logsumexp of the others; (B, C), (B,) -> (B,)."""
    label = labels[:, None]
    others = logits.scatter(1, label, -math.inf)
    return logits.gather(1, label)[:, 0] - others.logsumexp(1)


@cache
def kernels(device: torch.device) -> Any:
    """The module of the same name; None where Triton is missing, or has no C compiler to start it with."""
    try:
        from attribution import kernels

        one = torch.ones(1, 1, 1, 1, device=device)
        kernels.position_sums(one, one)
    except Exception:  # of many kinds: everything is computed without them then
        return None
    return kernels


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
        """Whether PyTorch's own sums are faster, and as exact: in bfloat16 not where layouts differ."""
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
        return {self.names["weight"]: self.delta.flatten(1)}


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
    order, and stray parameters; shapes of all parameters by name, as in named_parameters().
    """

    logits: Tensor
    margins: Tensor
    probability: Tensor
    calls: list[Call | Stray] = field(repr=False)
    shapes: dict[str, torch.Size] = field(repr=False)

    def vectors(self) -> dict[str, Tensor]:
        """Per-sample gradients (B, n) of all but the matrices; repeated calls add up."""
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


def capture(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    receive: Callable[[Call | Stray], None] | None = None,
) -> Captured:
    """Record one forward and one backward pass of the summed margins; images (B, ...), labels (B,).

    With `receive`, each call is handed over as soon as the backward pass has reached it, last
    layer first, and then let go of: memory stays that of a training step.

    The model is called as model(images) and may return logits (B, C) or an object with
    `.logits`. All parameters count, whatever their requires_grad; one that no rule covers has
    the model run under vmap, and takes B times its own memory. Raises InputError for anything
    that would make a gradient wrong or incomplete: train mode, a parameter that no rule covers
    in a model that vmap cannot run, a covered module that did not run, an activation that was
    overwritten.
    """
    layers, paths, strays = _layers(model)
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
        source.register_hook(partial(keep, call))
        # A copy where the graph starts or vmap holds a view: the model may write into outputs.
        return source if source is output and not strays else source.clone()

    used: list[Call | Stray] = []

    def keep(call: Call | Stray, delta: Tensor) -> None:
        call.delta = delta.detach()
        if delta.is_cuda and isinstance(call, Call) and isinstance(call.module, nn.Conv2d):
            call.delta = call.delta.contiguous(memory_format=torch.channels_last)
        if receive is None:
            used.append(call)
            return
        with torch.autocast(delta.device.type, enabled=False):
            receive(call)
        call.input = call.delta = None

    span = labels.aminmax()  # before the pass: a GPU would be waited for in the middle
    least, most = int(span.min), int(span.max)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            if strays:
                logits = _run_apart(model, images.detach(), layers, record, strays, keep)
            else:
                with _own_normalisation(layers):
                    logits = _run(model, images.detach(), layers, record)
            _check_labels(logits, labels, least, most)
            _check_calls(layers, paths, calls)
            f = margins(
                logits.double() if logits.dtype == torch.float64 else logits.float(), labels
            )
            f.sum().backward()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    f = f.detach()
    if not f.isfinite().all():
        raise InputError(f"the margin of sample {int((~f.isfinite()).nonzero()[0])} is not finite")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return Captured(logits.detach(), f, f.sigmoid(), used[::-1], shapes)


def _run(model: Callable, images: Tensor, layers: Iterable[nn.Module], hook: Callable) -> Tensor:
    """Logits, with a forward hook on each layer."""
    handles = [module.register_forward_hook(hook) for module in layers]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return getattr(output, "logits", output)


@contextmanager
def _own_normalisation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """BatchNorms run by _Normalise in the block."""
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d) and "forward" not in vars(m)]
    for module in norms:
        vars(module)["forward"] = partial(_Normalise.apply, module)
    try:
        yield
    finally:
        for module in norms:
            del vars(module)["forward"]


class _Normalise(torch.autograd.Function):
    """BatchNorm in eval mode, with a backward pass of less work than PyTorch's.

    That adds up the weight's gradient in any case, and on a GPU leaves a layout that convolutions copy.
    """

    @staticmethod
    def forward(ctx: Any, module: nn.BatchNorm2d, x: Tensor) -> Tensor:
        ctx.module = module
        return F.batch_norm(
            x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
        )

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[None, Tensor]:
        norm = ctx.module
        if delta.is_cuda:
            return None, _scaled(delta, norm)
        # The derivative of an affine map is that map without its shift.
        none = torch.zeros_like(norm.running_mean)
        return None, F.batch_norm(delta, none, norm.running_var, norm.weight, eps=norm.eps)


def _scaled(delta: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """The same as one product, in delta's layout whatever PyTorch's own kernels prefer."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    return torch.mul(delta, scale[:, None, None], out=torch.empty_like(delta))


def _run_apart(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[nn.Module],
    record: Callable,
    strays: dict[str, Tensor],
    keep: Callable[[Stray, Tensor], None],
) -> Tensor:
    """Logits from vmap over the samples, each with its own copy of the stray parameters."""
    copies = {
        name: p.detach().expand(len(images), *p.shape).requires_grad_()
        for name, p in strays.items()
    }
    for name, copy in copies.items():
        copy.register_hook(partial(keep, Stray({"weight": name})))

    def one(image: Tensor, own: dict[str, Tensor]) -> Tensor:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _OutOfVmap.apply(inputs[0], output, image, partial(record, module))

        return _run(partial(functional_call, model, own), image[None], layers, hook)

    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)  # it does not see from within vmap that it has no derivative
    try:
        with sdpa_kernel(SDPBackend.MATH):  # a CPU's fused one would be run sample by sample
            return vmap(one)(images, copies).flatten(0, 1)
    except RuntimeError as error:
        if not re.search("vmap|batching rule", str(error), re.IGNORECASE):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"no rule gives the per-sample gradient of {', '.join(strays)} (covered are Conv2d "
            "with zero padding, Linear, BatchNorm, LayerNorm and GroupNorm), and vmap cannot run "
            f"the model with a copy of them for every sample ({reason})"
        ) from error
    finally:
        mha.set_fastpath_enabled(fast)


class _OutOfVmap(torch.autograd.Function):
    """Calls record((input,), output) with the whole batch's tensors from within vmap.

    What does not depend on the sample is repeated, so that its gradient is per sample too.
    """

    @staticmethod
    def setup_context(*_: object) -> None:
        """Asked for by torch.func; autograd sees through what is done below."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, output: Tensor, image: Tensor, record: partial
    ) -> tuple[Tensor, int]:
        """`image` depends on the sample in any case; without that, this would not be called."""
        x, output = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((x, output), in_dims)
        )
        if isinstance(record.args[0], (nn.Linear, nn.LayerNorm)):
            return record((x,), output), 0
        # Their channels are the second dimension; the batch of one takes its place.
        return record((x.flatten(0, 1),), output.flatten(0, 1)).unsqueeze(1), 0


def _layers(
    model: nn.Module,
) -> tuple[dict[nn.Module, dict[str, str]], dict[nn.Module, str], dict[str, Tensor]]:
    """Modules to hook, each with its parameters' names in the model, and what they are called.

    Then the parameters of all other modules, by name.
    """
    first: dict[int, str] = {}  # tied weights share a name
    layers, paths, strays = {}, {}, {}
    for path, module in model.named_modules():
        if module.training:
            raise InputError(f"{path or 'the model'} is in train mode; call model.eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(f"{path}: without running statistics its samples mix in every batch")
        prefix = f"{path}." if path else ""
        own = {
            name: first.setdefault(id(p), prefix + name)
            for name, p in module._parameters.items()
            if p is not None
        }
        if own and _has_rule(module):
            layers[module], paths[module] = own, path or type(module).__name__
        else:
            strays |= {name: module._parameters[key] for key, name in own.items()}
    tied = strays.keys() & {name for own in layers.values() for name in own.values()}
    if tied:
        raise InputError(f"{', '.join(sorted(tied))}: shared by modules with and without a rule")
    return layers, paths, strays


def _has_rule(module: nn.Module) -> bool:
    """Whether it computes what a covered type does; a subclass may have its own forward."""
    base = next((kind for kind in COVERED if isinstance(module, kind)), nn.Module)
    names = {name for name, p in module._parameters.items() if p is not None}
    methods = [(getattr(kind, "_conv_forward", 0), kind.forward) for kind in (type(module), base)]
    return (
        {"weight"} <= names <= {"weight", "bias"}
        and base in COVERED
        and methods[0] == methods[1]
        and getattr(module, "padding_mode", "zeros") == "zeros"
        # MultiheadAttention reads this Linear's weight, and does not call it.
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    )


def _check_labels(logits: Tensor, labels: Tensor, least: int, most: int) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: a margin needs "
            "(B, C) with at least two classes, and (B,)"
        )
    if least < 0 or most >= logits.shape[1]:
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


def steps(batch: int, floats: int, like: Tensor, per_core: int | None = None) -> Iterator[slice]:
    """Slices of the batch whose scratch, `floats` per sample, fits the device."""
    scratch = (per_core or CPU_SCRATCH) * torch.get_num_threads()
    if like.device.type != "cpu":
        scratch = GPU_SCRATCH
    size = max(1, scratch // floats)
    return (slice(i, min(i + size, batch)) for i in range(0, batch, size))
