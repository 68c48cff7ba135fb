"""How BatchNorms run within a captured pass: as a part of the convolution before, or with less work backward.

In eval mode a BatchNorm is an affine map of every channel, y = s (x - mean) + bias with
s = weight / sqrt(variance + eps). After a convolution with weight W and bias c it is the
convolution with weight s W and bias s (c - mean) + bias, which saves its passes over the map.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attribution.errors import InputError
from attribution.gradients.layer_rules import Call

# From so many positions for every entry of a patch on, passes over the map cost more than <W, G>.
POSITIONS_OF_ENTRY = 0.5
LEAST_WEIGHT = 1e-20  # of a BatchNorm's channel, by which <W, s G> is divided


@dataclass
class Pair:
    """A convolution whose output one BatchNorm reads, and nothing else."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    shape: tuple[int, int, int]  # positions, outputs and patch length, as Call.shape
    dtype: torch.dtype  # of the convolution's output

    def pays(self) -> bool:
        """Whether it is faster as one, and can still be: nobody looks at what comes out in between.

        A channel that is switched off would leave nothing of <W, s G>, nor would float16's range.
        """
        positions, _, patch = self.shape
        return (
            positions >= POSITIONS_OF_ENTRY * patch
            and self.dtype != torch.float16
            and self.conv.weight.dtype == self.norm.weight.dtype
            and self.norm.weight.dtype in (torch.float32, torch.float64)
            and self.norm.weight.abs().min().item() >= LEAST_WEIGHT
            and _is_unwatched(self.conv)
            and _is_unwatched(self.norm)
        )


def _is_unwatched(module: nn.Module) -> bool:
    """Whether it runs its own forward, and no hook sees what it gives; nor takes, if it is a BatchNorm."""
    return not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (module._forward_pre_hooks and isinstance(module, nn.BatchNorm2d))
    )


def pairs(
    model: nn.Module, images: Tensor, layers: Mapping[nn.Module, Mapping[str, str]]
) -> list[Pair]:
    """Pairs among `layers` that run once each, by a pass that records who reads a convolution's output.

    Args:
        layers: the names in the model of the parameters of each.
    """
    unwatched = [module for module in layers if _is_unwatched(module)]
    convs = [module for module in unwatched if isinstance(module, nn.Conv2d)]
    norms = {m for m in unwatched if isinstance(m, nn.BatchNorm2d) and m.bias is not None}
    if not norms or not convs:
        return []
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # kept, so that no other tensor has its id
    readers: dict[int, set[nn.Module | None]] = {}
    runs: Counter[nn.Module] = Counter()
    inside: list[nn.BatchNorm2d] = []

    class Readers(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(
            self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in made:
                    readers[id(leaf)].add(inside[-1] if inside else None)
            return operation(*args, **(kwargs or {}))

    def after_conv(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[conv] += 1
        made[id(output)], readers[id(output)] = (conv, output), set()

    def before_norm(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        runs[norm] += 1
        inside.append(norm)

    def after_norm(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        inside.pop()

    handles = [conv.register_forward_hook(after_conv) for conv in convs]
    for norm in norms:
        handles.append(norm.register_forward_pre_hook(before_norm))
        handles.append(norm.register_forward_hook(after_norm))
    try:
        with torch.no_grad(), Readers():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for key, (conv, output) in made.items():
        reader, *others = readers[key] or {None}
        if others or reader not in norms or not runs[conv] == runs[reader] == 1:
            continue
        if not set(layers[conv].values()) & set(layers[reader].values()):
            shape = output[0, 0].numel(), len(conv.weight), conv.weight[0].numel()
            found.append(Pair(conv, reader, shape, output.dtype))
    return found


@dataclass(kw_only=True)
class Fused(Call):
    """A convolution that ran as one with its BatchNorm; delta is the gradient at that one's output.

    With G = sum_t delta_t x a_t and b = sum_t delta_t the gradients are s G of the convolution's
    weight, s b of its bias c, b of the BatchNorm's bias and, row by row,
    (<W, G> + (c - mean) b) / sqrt(variance + eps) of its weight, since what it read is W a + c.
    """

    norm: nn.BatchNorm2d
    norm_names: dict[str, str]

    @cached_property
    def sums(self) -> Tensor:
        """b, (B, O)."""
        return self.delta.sum((2, 3)).to(self.norm.weight.dtype)

    def vectors(self) -> dict[str, Tensor]:
        """Those of the biases, (B, O); see `norm_weight`."""
        found = {self.norm_names["bias"]: self.sums}
        if "bias" in self.names:
            found[self.names["bias"]] = self.sums * _scale(self.norm)
        return found

    def products(
        self, rows: slice, signs: tuple[Tensor, Tensor] | None = None, stride: int | None = None
    ) -> Tensor:
        """As of any call."""
        _, outputs, patch = self.shape()
        ones = self.norm.weight.new_ones
        of_rows, of_columns = signs or (ones(outputs), ones(patch))
        return super().products(rows, (of_rows * _scale(self.norm), of_columns), stride)

    def norm_weight(
        self, rows: slice, formed: Tensor, signs: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """The gradient (b, O) of the BatchNorm's weight by name, from what `products` returned."""
        of_rows, of_columns = signs
        conv, norm = self.module, self.norm
        # As the products are: signed, and without their scale once <W, s G> is formed.
        weight = formed.new_empty(formed.shape[1:])
        entries = self._entries(weight[None])[0]
        signed = (of_rows / _scale(norm))[:, None] * of_columns
        torch.mul(conv.weight.permute(0, 2, 3, 1), signed.view(entries.shape), out=entries)
        inner = torch.linalg.vecdot(formed, weight).to(norm.weight.dtype)
        shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        return {self.norm_names["weight"]: (inner + shift * self.sums[rows]) * _deviation(norm)}


def _deviation(norm: nn.BatchNorm2d) -> Tensor:
    """1 / sqrt(variance + eps)."""
    return (norm.running_var + norm.eps).rsqrt()


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    """What it multiplies every channel by."""
    scale = _deviation(norm)
    return scale if norm.weight is None else scale * norm.weight.detach()


@contextmanager
def running(
    norms: Collection[nn.BatchNorm2d], fused: Mapping[nn.Conv2d, nn.BatchNorm2d], outputs: dict
) -> Iterator[None]:
    """In the block, `fused` convolutions do their BatchNorm's work too, and other norms that of _Normalise.

    Args:
        outputs: what each fused convolution has returned, hooks included; None once its BatchNorm took it.

    Raises:
        InputError: a fused convolution's output was not what its BatchNorm was given next, or was
            given to none.
    """
    forwards: dict[nn.Module, Callable] = {norm: partial(_Normalise.apply, norm) for norm in norms}
    for conv, norm in fused.items():
        forwards[conv], forwards[norm] = partial(_both, conv, norm), partial(_take, outputs, conv)
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
        if any(output is not None for output in outputs.values()):
            raise diverged()
    finally:
        for module in forwards:
            del vars(module)["forward"]


def _both(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    scale = _scale(norm)
    shift = norm.bias - scale * norm.running_mean
    bias = shift if conv.bias is None else shift + scale * conv.bias
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], bias)


def _take(outputs: dict[nn.Conv2d, Tensor | None], conv: nn.Conv2d, x: Tensor) -> Tensor:
    if outputs.get(conv) is not x:
        raise diverged()
    outputs[conv] = None
    return x


def diverged() -> InputError:
    """For a model whose layers do not run as they did for the images that it was looked at with."""
    return InputError("the model's layers run in another order for some images than for others")


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
    return torch.mul(delta, _scale(norm)[:, None, None], out=torch.empty_like(delta))
