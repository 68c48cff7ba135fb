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

from attribution.calls import Call
from attribution.errors import InputError

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
        """Whether it is faster as one; a channel that is switched off would leave nothing of <W, G>."""
        positions, _, patch = self.shape
        return (
            positions >= POSITIONS_OF_ENTRY * patch
            and self.norm.weight.abs().min().item() >= LEAST_WEIGHT
        )


def pairs(model: nn.Module, images: Tensor, layers: Collection[nn.Module]) -> list[Pair]:
    """Pairs among `layers` that run once each, found by a look at a pass over some images."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # kept, so that no other tensor has its id
    runs: Counter[nn.Module] = Counter()
    uses: Counter[int] = Counter()
    found: dict[nn.Conv2d, Pair] = {}

    class Uses(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            uses.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in made)
            return operation(*args, **(kwargs or {}))

    def after_conv(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[conv] += 1
        made[id(output)] = conv, output

    def before_norm(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        runs[norm] += 1
        conv, x = made.get(id(inputs[0]), (None, None))
        if conv is not None and not uses[id(x)]:
            shape = x[0, 0].numel(), len(conv.weight), conv.weight[0].numel()
            found[conv] = Pair(conv, norm, shape, x.dtype)

    def after_norm(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        uses[id(inputs[0])] = 0  # its own

    handles = []
    for module in layers:
        if "forward" in vars(module) or module._forward_hooks:
            continue  # someone else looks at what comes out
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_conv))
        elif (
            isinstance(module, nn.BatchNorm2d)
            and module.bias is not None
            and not module._forward_pre_hooks
        ):
            handles.append(module.register_forward_pre_hook(before_norm))
            handles.append(module.register_forward_hook(after_norm))
    try:
        with torch.no_grad(), Uses():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    used = {conv for key, (conv, _) in made.items() if uses[key]}
    return [
        pair
        for conv, pair in found.items()
        if conv not in used and runs[conv] == runs[pair.norm] == 1
    ]


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
        outputs: what each fused convolution has returned, hooks included, until its BatchNorm takes it.

    Raises:
        InputError: a BatchNorm was given something else.
    """
    forwards: dict[nn.Module, Callable] = {
        norm: partial(_Normalise.apply, norm) for norm in norms if "forward" not in vars(norm)
    }
    for conv, norm in fused.items():
        forwards[conv], forwards[norm] = partial(_both, conv, norm), partial(_take, outputs, conv)
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
        if outputs:
            raise _diverged()
    finally:
        for module in forwards:
            del vars(module)["forward"]


def _both(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    scale = _scale(norm)
    shift = norm.bias - scale * norm.running_mean
    bias = shift if conv.bias is None else shift + scale * conv.bias
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], bias)


def _take(outputs: dict[nn.Conv2d, Tensor], conv: nn.Conv2d, x: Tensor) -> Tensor:
    if outputs.pop(conv, None) is not x:
        raise _diverged()
    return x


def _diverged() -> InputError:
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
