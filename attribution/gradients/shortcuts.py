"""What shortcuts the passes of a model may take, found by trying them on a few images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attribution.gradients.batchnorm import Pair, pairs
from attribution.gradients.per_sample import Shortcuts, capture, layers_of

# Images of a trial: a number that few dimensions of a model have, lest these pass for the batch.
TRIAL = 5
# Dimensions of one that a copy gets before and after its own: of tokens, of channels last and first.
ORDERS = ((1, 0), (0, 0), (2, 0), (0, 2))


@dataclass(frozen=True)
class Survey:
    """What a model has: pairs that Shortcuts.fused can be chosen from, and Shortcuts.copies, or none."""

    pairs: list[Pair]
    copies: Mapping[str, tuple[int, ...]]


def survey(model: nn.Module, images: Tensor, with_copies: bool = True) -> Survey:
    """Look at passes over a few random images of the shape of these (B, ...), in eval mode.

    Args:
        with_copies: also try copies, which takes up to five passes where any are needed.
    """
    layers, _, strays = layers_of(model)
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(TRIAL, *images.shape[1:], generator=generator, dtype=images.dtype)
    try:
        copies = _broadcast(model, few, strays) if strays and with_copies else {}
        return Survey([] if strays and not copies else pairs(model, few, layers), copies)
    except Exception:  # of many kinds: a model may take no images but those that it is for
        return Survey([], {})


def _broadcast(
    model: nn.Module, images: Tensor, strays: dict[str, Tensor]
) -> Mapping[str, tuple[int, ...]]:
    """Shapes of copies that the model adds or multiplies sample by sample, as it does the parameter.

    Most have a first dimension of one for the batch, or are vectors of an activation's channels.
    Found by trial: gradients are those under vmap. None: there are no such shapes, or a parameter's
    gradient is zero, which would be alike whatever became of it.
    """
    with torch.autocast(images.device.type, enabled=False):
        expected = _seen(model, images, {})
        if not all(expected[name][0].any() for name in strays.keys() & expected.keys()):
            return {}
        for before, after in ORDERS:
            shapes = {
                name: tuple(p.shape[1:])
                if p.dim() > 1 and len(p) == 1
                else (1,) * before + tuple(p.shape) + (1,) * after
                for name, p in strays.items()
            }
            try:
                if _alike(_seen(model, images, shapes), expected):
                    return shapes
            except Exception:  # of many kinds, where a model cannot take them
                continue
    return {}


def _seen(
    model: nn.Module, images: Tensor, copies: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Tensor]]:
    """All that gradients are made of, by parameter: strays' own, inputs and output gradients of layers."""
    labels = torch.arange(len(images)) % 2
    found = capture(model, images, labels, shortcuts=Shortcuts(copies=copies))
    seen = {"": [found.logits]}
    for call in found.calls:
        parts = (part for part in (call.delta, call.input) if part is not None)
        seen.setdefault(call.names["weight"], []).extend(parts)
    return {name: [part.reshape(len(images), -1) for part in parts] for name, parts in seen.items()}


def _alike(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> bool:
    """Whether they differ by rounding alone: others differ in some sample by their own size."""
    return found.keys() == expected.keys() and all(
        one.shape == other.shape and (one - other).abs().max() <= 1e-4 * other.abs().max()
        for name, parts in expected.items()
        for one, other in zip(found[name], parts, strict=True)
    )
