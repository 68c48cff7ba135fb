"""Where a model's weights lie: on which device, and in which order of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# On a CPU, convolutions of this many channels on maps of this few positions are slow channels last.
WIDE, TINY = 128, 16


def place(model: nn.Module, device: torch.device | str, image_size: int) -> None:
    """Move a model to a device in the memory layout that is fastest there.

    That is channels last, except on a CPU for wide convolutions of tiny maps: oneDNN takes a third
    of the time for them channels first in float32, and no more in bfloat16.
    """
    # torch documents both arguments together; its type hints lack them.
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if torch.device(device).type != "cpu":
        return
    wide = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _is_wide(m)]
    tiny = set()

    def see(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-2:].numel() <= TINY:
            tiny.add(conv)

    if wide:
        see_inputs(model, wide, see, image_size)
    for conv in tiny:
        conv.weight.data = conv.weight.data.contiguous()
        conv.register_forward_pre_hook(_channels_first)


def _is_wide(conv: nn.Conv2d) -> bool:
    return conv.in_channels >= WIDE and conv.groups == 1 and max(conv.kernel_size) > 1


def _channels_first(conv: nn.Conv2d, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].contiguous()


def see_inputs(
    model: nn.Module, modules: Iterable[nn.Module], see: Callable[..., None], image_size: int
) -> Any:
    """Run the model on one black image, and call see(module, inputs) before each of these modules.

    Returns:
        The model's output.
    """
    hooks = [module.register_forward_pre_hook(see) for module in modules]
    training = model.training
    try:
        with torch.no_grad():
            return model.eval()(torch.zeros(1, 3, image_size, image_size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
