"""Exact per-sample gradients of the margin from one forward and one backward pass.

In eval mode the samples of a batch do not mix, so the backward pass of the summed margins
gives, at every layer, each sample's own output gradient. A weight's per-sample gradient is
then a sum over positions t of outer products, G = sum_t delta_t x a_t. Of parameters without
such a rule (a class token, a layer scale) every sample is given a copy of its own, by vmap or in
a shape that the model takes.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from attribution.errors import InputError
from attribution.gradients import batchnorm
from attribution.gradients.batchnorm import Fused
from attribution.gradients.layer_rules import COVERED, Call, Stray


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """f = log p/(1-p) of the label: its logit minus logsumexp of the others; (B, C), (B,) -> (B,)."""
    label = labels[:, None]
    others = logits.scatter(1, label, -math.inf)
    return logits.gather(1, label)[:, 0] - others.logsumexp(1)


@dataclass(frozen=True)
class Shortcuts:
    """What a pass may do faster, once survey.py has found that it gives the same gradients.

    fused: convolutions to be run as one with the BatchNorm after them, and handed over as one call;
        only where calls are handed over.
    copies: the shape in which each parameter without a rule is a sample's own; of others: run under vmap.
    """

    fused: Mapping[nn.Module, nn.BatchNorm2d] = field(default_factory=dict)
    copies: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


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
    shortcuts: Shortcuts | None = None,
) -> Captured:
    """Record one forward and one backward pass of the summed margins; images (B, ...), labels (B,).

    With `receive`, each call is handed over as soon as the backward pass has reached it, last
    layer first, and then let go of: memory stays that of a training step.

    The model is called as model(images) and may return logits (B, C) or an object with
    `.logits`. All parameters count, whatever their requires_grad; one that no rule covers takes B
    times its own memory, and the model runs under vmap unless there are shortcuts. Raises InputError for anything
    that would make a gradient wrong or incomplete: train mode, a parameter that no rule covers
    in a model that vmap cannot run, a covered module that did not run, an activation that was
    overwritten.
    """
    layers, paths, strays = layers_of(model)
    calls: list[Call] = []
    shortcuts = shortcuts or Shortcuts()
    sizes = {name: math.prod(shape) for name, shape in shortcuts.copies.items()}
    apart = sizes != {name: p.numel() for name, p in strays.items()}
    fused = {} if apart or receive is None else shortcuts.fused
    fused = {conv: norm for conv, norm in fused.items() if {conv, norm} <= layers.keys()}
    outputs: dict[nn.Module, Tensor | None] = {}
    alone = {module: names for module, names in layers.items() if module not in fused.values()}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if x.shape[:1] != images.shape[:1]:
            raise InputError(
                f"{paths[module]}: its input has shape {tuple(x.shape)} for a batch of "
                f"{len(images)}; the samples must stay along the first dimension"
            )
        call = Call(module, layers[module], x, x._version)
        if norm := fused.get(module):
            if module in outputs:
                raise batchnorm.diverged()
            call = Fused(module, layers[module], x, x._version, norm=norm, norm_names=layers[norm])
        calls.append(call)
        source = output if output.requires_grad else output.detach().requires_grad_()
        source.register_hook(partial(keep, call))
        # A copy where the graph starts or vmap holds a view: the model may write into outputs.
        returned = source if source is output and not apart else source.clone()
        if norm:
            outputs[module] = returned
        return returned

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
    with _requiring_grad(model, False), torch.enable_grad():
        if apart:
            copies = _copies(strays, {}, len(images), keep)
            logits = _run_apart(model, images.detach(), layers, record, copies)
        else:
            copies = _copies(strays, shortcuts.copies, len(images), keep)
            run = partial(functional_call, model, copies) if copies else model
            norms = [module for module in alone if isinstance(module, nn.BatchNorm2d)]
            with batchnorm.running(norms, fused, outputs):
                logits = _run(run, images.detach(), alone, record)
        _check_labels(logits, labels, least, most)
        _check_calls(alone, paths, calls)
        f = margins(logits.double() if logits.dtype == torch.float64 else logits.float(), labels)
        f.sum().backward()
    f = f.detach()
    if not f.isfinite().all():
        raise InputError(f"the margin of sample {int((~f.isfinite()).nonzero()[0])} is not finite")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return Captured(logits.detach(), f, f.sigmoid(), used[::-1], shapes)


@contextmanager
def _requiring_grad(model: nn.Module, flag: bool) -> Iterator[None]:
    """In the block every parameter's requires_grad is `flag`."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(flag)
        yield
    finally:
        for parameter, before in flags:
            parameter.requires_grad_(before)


def _copies(
    strays: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    batch: int,
    keep: Callable[[Stray, Tensor], None],
) -> dict[str, Tensor]:
    """Of each stray parameter one for every sample, in its own shape or the given one."""
    copies = {}
    for name, p in strays.items():
        shape = shapes.get(name, p.shape)
        copies[name] = p.detach().reshape(shape).expand(batch, *shape).requires_grad_()
        copies[name].register_hook(partial(keep, Stray({"weight": name})))
    return copies


def _run(model: Callable, images: Tensor, layers: Iterable[nn.Module], hook: Callable) -> Tensor:
    """Logits, with a forward hook on each layer, which sees its output before hooks of others change it."""
    handles = [module.register_forward_hook(hook, prepend=True) for module in layers]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return getattr(output, "logits", output)


def _run_apart(
    model: nn.Module,
    images: Tensor,
    layers: Iterable[nn.Module],
    record: Callable,
    copies: dict[str, Tensor],
) -> Tensor:
    """Logits from vmap over the samples, each with its own copy of the stray parameters."""

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
            f"no rule gives the per-sample gradient of {', '.join(copies)} (covered are Conv2d "
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


def layers_of(
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
        and not {"forward", "_conv_forward"} & vars(module).keys()
        and getattr(module, "padding_mode", "zeros") == "zeros"
        # MultiheadAttention reads this Linear's weight, and does not call it.
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    )


def check(model: nn.Module, images: Tensor) -> None:
    """Compare per-sample gradients, added up, with what autograd finds for the sum of the margins.

    Args:
        images: a few, (B, ...), in whose margins all that the model is trained with plays a part.

    Raises:
        InputError: as capture does, or for a parameter whose gradient is another: it is read by something
            that the rules do not see, beside its own layer.
    """
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    sums = {name: g.sum(0) for name, g in capture(model, images, labels).per_sample().items()}
    with _requiring_grad(model, True), torch.enable_grad():
        output = model(images)
        total = margins(getattr(output, "logits", output), labels).sum()
        whole = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
    least = 1e-5 * max(float(expected.abs().max()) for expected in whole)
    for (name, found), expected in zip(sums.items(), whole, strict=True):
        if (found - expected).abs().max() > 1e-3 * expected.abs().max() + least:
            raise InputError(
                f"{name}: the gradients of single images do not add up to the gradient of their sum; is "
                "it read by anything other than its own layer?"
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
