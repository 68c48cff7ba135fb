"""Exact per-sample gradients of the margin from one forward and one backward pass.

In eval mode the samples of a batch do not mix, so the backward pass of the summed margins
gives, at every layer, each sample's own output gradient. A weight's per-sample gradient is
then a sum over positions t of outer products, G = sum_t delta_t x a_t. A parameter without
such a rule (a class token, a layer scale) is copied once per sample by vmap.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Set
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

from attribution.gradients import GradientError
from attribution.gradients.layer_rules import COVERED, Call, Stray


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """f = log p/(1-p) of the label: its logit minus logsumexp of the others; (B, C), (B,) -> (B,)."""
    label = labels[:, None]
    others = logits.scatter(1, label, -math.inf)
    return logits.gather(1, label)[:, 0] - others.logsumexp(1)


@dataclass
class Captured:
    """What one pass over a batch of B samples leaves behind; everything is detached.

    Attributes:
        logits: (B, C).
        margins: (B,).
        calls: of covered modules, in order, and parameters without a rule.
        shapes: of trained_parameters(model) by name.
    """

    logits: Tensor
    margins: Tensor
    calls: list[Call | Stray] = field(repr=False)
    shapes: dict[str, torch.Size] = field(repr=False)

    def vectors(self) -> dict[str, Tensor]:
        """Per-sample gradients (B, n) of everything but the matrices; repeated calls add up."""
        total: dict[str, Tensor] = {}
        for call in self.calls:
            for name, value in call.vectors().items():
                total[name] = total[name] + value if name in total else value
        return total

    def matrices(self) -> Iterator[tuple[str, Call]]:
        """The calls whose weight's gradient is formed from outer products, with the weight's name."""
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
    call_type: type[Call] = Call,
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> Captured:
    """Record one forward and one backward pass of the summed margins; images (B, ...), labels (B,).

    The model is called as model(images) and may return logits (B, C) or an object with `.logits`.
    The parameters of trained_parameters count. With one that has no rule the model runs under vmap,
    and that parameter takes B times its own memory.

    Args:
        receive: is given each call as soon as the backward pass has reached it, last layer first.
            The call is then released, so that memory stays that of a training step.
        call_type: what a call is recorded as.
        logits_of: called in place of the model; it runs the model's layers that are trained.

    Raises:
        GradientError: something would make a gradient wrong or incomplete: train mode, a parameter
            without a rule in a model that vmap cannot run, a covered module that did not run, an
            activation that was overwritten.
    """
    shapes = {name: p.shape for name, p in trained_parameters(model).items()}
    layers, strays = layers_of(model)
    calls: list[Call] = []
    used: list[Call | Stray] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if x.shape[:1] != images.shape[:1]:
            raise GradientError(
                f"{_path(model, module)}: its input has shape {tuple(x.shape)} for a batch of "
                f"{len(images)}; the samples must stay along the first dimension"
            )
        call = call_type(module, layers[module], x, x._version)
        calls.append(call)
        source = output if output.requires_grad else output.detach().requires_grad_()
        source.register_hook(partial(keep, call))
        # A copy where the graph starts or vmap holds a view: the model may write into outputs.
        return source if source is output and not strays else source.clone()

    def keep(call: Call | Stray, delta: Tensor) -> None:
        call.delta = delta.detach()
        if receive is None:
            used.append(call)
            return
        with torch.autocast(delta.device.type, enabled=False):
            receive(call)
        call.input = call.delta = None

    span = labels.aminmax()  # read before the pass, so that a GPU is not waited for in the middle
    least, most = int(span.min), int(span.max)
    with _requiring_grad(model, False), torch.enable_grad():
        own = {}
        for name, p in strays.items():
            own[name] = p.detach().expand(len(images), *p.shape).requires_grad_()
            own[name].register_hook(partial(keep, Stray({"weight": name})))
        if strays:
            logits = _run_under_vmap(model, images.detach(), layers, record, own)
        else:
            logits = _run(logits_of or model, images.detach(), layers, record)
        _check_labels(logits, labels, least, most)
        _check_calls(model, layers.keys(), calls)
        f = margins(logits.double() if logits.dtype == torch.float64 else logits.float(), labels)
        f.sum().backward()
    f = f.detach()
    if not f.isfinite().all():
        sample = int((~f.isfinite()).nonzero()[0])
        raise GradientError(f"the margin of sample {sample} is not finite")
    return Captured(logits.detach(), f, used[::-1], shapes)


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


def _run(model: Callable, images: Tensor, layers: Iterable[nn.Module], hook: Callable) -> Tensor:
    """Logits, with a forward hook on each layer that runs before the model's own hooks."""
    handles = [module.register_forward_hook(hook, prepend=True) for module in layers]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return getattr(output, "logits", output)


def _run_under_vmap(
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
    mha.set_fastpath_enabled(False)  # under vmap it would be taken, and it has no derivative
    try:
        with sdpa_kernel(SDPBackend.MATH):  # vmap would run a CPU's fused kernel sample by sample
            return vmap(one)(images, copies).flatten(0, 1)
    except RuntimeError as error:
        if not re.search("vmap|batching rule", str(error), re.IGNORECASE):
            raise
        reason = " ".join(str(error).split())[:200]
        raise GradientError(
            f"no rule gives the per-sample gradient of {', '.join(copies)} (covered are Conv2d "
            "with zero padding, Linear, BatchNorm, LayerNorm and GroupNorm), and vmap cannot run "
            f"the model with one copy per sample ({reason})"
        ) from error
    finally:
        mha.set_fastpath_enabled(fast)


class _OutOfVmap(torch.autograd.Function):
    """Call record((input,), output) with the whole batch's tensors from within vmap.

    A tensor that does not depend on the sample is repeated, so that its gradient is per sample too.
    """

    @staticmethod
    def setup_context(*_: object) -> None:
        """Required by torch.func; `vmap` below records its own graph."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: Tensor, output: Tensor, image: Tensor, record: partial
    ) -> tuple[Tensor, int]:
        """Run once for the batch; `image` is passed because a tensor must depend on the sample."""
        x, output = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((x, output), in_dims)
        )
        if isinstance(record.args[0], (nn.Linear, nn.LayerNorm)):
            return record((x,), output), 0
        # The channels of all other layers are the second dimension, after a batch of one.
        return record((x.flatten(0, 1),), output.flatten(0, 1)).unsqueeze(1), 0


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name, or all of them where none does."""
    named = dict(model.named_parameters())
    return {name: p for name, p in named.items() if p.requires_grad} or named


def layers_of(model: nn.Module) -> tuple[dict[nn.Module, dict[str, str]], dict[str, Tensor]]:
    """Find the modules with a rule and the parameters without one, among those that are trained.

    Returns:
        For each module, the names in the model of its "weight" and "bias"; and the parameters of all
        other modules by name. Tied weights share a name.
    """
    names = {p: name for name, p in trained_parameters(model).items()}
    layers: dict[nn.Module, dict[str, str]] = {}
    strays: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if module.training:
            raise GradientError(f"{path or 'the model'} is in train mode; call model.eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise GradientError(f"{path}: without running statistics the samples of a batch mix")
        own = {kind: p for kind, p in module._parameters.items() if p in names}
        if own and _has_rule(module):
            layers[module] = {kind: names[p] for kind, p in own.items()}
        else:
            strays |= {names[p]: p for p in own.values()}
    tied = strays.keys() & {name for own in layers.values() for name in own.values()}
    if tied:
        raise GradientError(f"{', '.join(sorted(tied))}: shared by modules with and without a rule")
    return layers, strays


def _path(model: nn.Module, module: nn.Module) -> str:
    """The module's name in the model, or its type if it is the model itself."""
    path = next(path for path, each in model.named_modules() if each is module)
    return path or type(module).__name__


def _has_rule(module: nn.Module) -> bool:
    """Whether a module computes what a covered type does; a subclass may have its own forward."""
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


def _is_close(found: Tensor, expected: Tensor, least: float) -> bool:
    """Whether no entry differs by more than a thousandth of the largest, plus `least`."""
    error = (found - expected).abs().max()
    return bool(error <= 1e-3 * expected.abs().max() + least)


def check(model: nn.Module, images: Tensor) -> None:
    """Compare per-sample gradients with autograd's, and samples in one batch with each sample alone.

    Args:
        images: at least two different ones, (B, ...), whose margins depend on all trained parameters.

    Raises:
        GradientError: as capture does; or for a parameter that something besides its own layer reads;
            or for a layer in which samples mix or change places.
    """
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    together = capture(model, images, labels).per_sample()
    trained = list(trained_parameters(model).values())
    with _requiring_grad(model, True), torch.enable_grad():
        output = model(images)
        total = margins(getattr(output, "logits", output), labels).sum()
        whole = torch.autograd.grad(total, trained, materialize_grads=True)
    least = 1e-5 * max(float(expected.abs().max()) for expected in whole)
    for (name, found), expected in zip(together.items(), whole, strict=True):
        if not _is_close(found.sum(0), expected, least):
            raise GradientError(
                f"{name}: the gradients of single images do not add up to the gradient of their sum; "
                "is it read by anything other than its own layer?"
            )
    for i in range(2):
        # Given twice, because torch 2.15 computes wrong gradients of a single image through
        # BatchNorm in some models on a CPU.
        alone = capture(model, images[[i, i]], labels[:2]).per_sample()
        for name, found in together.items():
            if not _is_close(found[i], alone[name][0], least):
                raise GradientError(
                    f"{name}: the gradient of an image depends on the other images of its batch; "
                    "samples mix or change places in the model"
                )


def _check_labels(logits: Tensor, labels: Tensor, least: int, most: int) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise GradientError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: a margin needs "
            "(B, C) with at least two classes, and (B,)"
        )
    if least < 0 or most >= logits.shape[1]:
        raise GradientError(f"labels must lie in 0..{logits.shape[1] - 1}")


def _check_calls(model: nn.Module, layers: Set[nn.Module], calls: list[Call]) -> None:
    silent = [_path(model, module) for module in layers - {call.module for call in calls}]
    if silent:
        raise GradientError(
            f"{', '.join(sorted(silent))} did not run in the forward pass, or its weight was read "
            "without calling it; its gradient would be missing"
        )
    for call in calls:
        if call.input._version != call.version:
            raise GradientError(
                f"the input of {_path(model, call.module)} was overwritten by an in-place operation "
                "after the layer had run; make that operation out of place"
            )
