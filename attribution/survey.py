"""What shortcuts the passes of a model may take, found by trying them on two images."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attribution.batchnorm import Pair, pairs
from attribution.calls import Stray
from attribution.gradients import Shortcuts, capture, layers_of


@dataclass(frozen=True)
class Survey:
    """What a model has: pairs that Shortcuts.fused can be chosen from, and Shortcuts.copies, or none."""

    pairs: list[Pair]
    copies: Mapping[str, tuple[int, ...]]


def survey(model: nn.Module, images: Tensor, with_copies: bool = True) -> Survey:
    """Look at passes over two random images of the shape of these (B, ...), in eval mode.

    Args:
        with_copies: also try copies, which takes some four passes of two images where any are needed.
    """
    layers, _, strays = layers_of(model)
    generator = torch.Generator().manual_seed(0)
    two = torch.randn(2, *images.shape[1:], generator=generator, dtype=images.dtype)
    copies = _broadcast(model, two, strays) if with_copies else {}
    if strays and not copies:
        return Survey([], {})
    return Survey(pairs(model, two, layers), copies)


def _broadcast(
    model: nn.Module, images: Tensor, strays: dict[str, Tensor]
) -> Mapping[str, tuple[int, ...]]:
    """Shapes of copies that the model adds or multiplies sample by sample, as it does the parameter.

    Most have a first dimension of one for the batch, or are vectors of an activation's channels.
    Found by trial: gradients are those under vmap. None: there are no such shapes.
    """
    if not strays:
        return {}
    labels = torch.arange(len(images))

    def run(copies: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        found = capture(model, images, labels, shortcuts=Shortcuts(copies=copies))
        own = {call.names["weight"]: call.delta for call in found.calls if isinstance(call, Stray)}
        shaped = {name: own[name].flatten(1) for name in own if own[name].any()}
        return {"logits": found.logits} | shaped

    with torch.autocast(images.device.type, enabled=False):
        expected = run({})
        for before, after in ((1, 0), (2, 0), (0, 2)):  # tokens, channels last, channels first
            shapes = {
                name: tuple(p.shape[1:])
                if p.dim() > 1 and len(p) == 1
                else (1,) * before + tuple(p.shape) + (1,) * after
                for name, p in strays.items()
            }
            try:
                if _alike(run(shapes), expected):
                    return shapes
            except Exception:  # of many kinds, where a model cannot take them
                continue
    return {}


def _alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether they differ by rounding alone: others differ in some sample by their own size."""
    return found.keys() == expected.keys() and all(
        found[name].shape == value.shape
        and (found[name] - value).abs().max() <= 1e-3 * value.abs().max()
        for name, value in expected.items()
    )
