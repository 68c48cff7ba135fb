"""What is known about a model without its weights: preprocessing, operations, number of parameters."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from attribution.errors import InputError
from attribution.models.classifier import check_image_size
from attribution.models.pretrained import MINI_CONFIGS, preprocessing, skeleton

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel that a model's images are normalised with.

    They are those of the model's preprocessor, or ImageNet's where it names none.

    Raises:
        InputError: the preprocessor cannot be read, or has other than three usable numbers each.
    """
    own = {} if name in MINI_CONFIGS else preprocessing(name)
    mean, std = (own.get(f"image_{which}") for which in ("mean", "std"))
    if mean is None or std is None:
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        if len(mean) == len(std) == 3 and np.isfinite([*mean, *std]).all() and min(std) > 0:
            return mean, std
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"model={name}: its preprocessor's image_mean {mean} and image_std {std} must be three finite "
        "numbers each, the latter above 0"
    )


def own_image_size(name: str) -> int:
    """Return the side in pixels that a pretrained model's preprocessor or config names, else 224.

    Raises:
        InputError: the model or its preprocessor cannot be read.
    """
    config = skeleton(name).config  # refuses a broken config, whatever the preprocessor says
    own = preprocessing(name)
    for size in (own.get("crop_size"), own.get("size")):
        side = size and (dict(size).get("height") or dict(size).get("shortest_edge"))
        if side:
            return side
    return getattr(config, "image_size", None) or 224


@cache
def forward_flops(name: str, image_size: int) -> int | None:
    """Count the floating-point operations of one image's forward pass.

    Only shapes are computed, so the count is the same on every machine. None where the model refuses
    the size.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = skeleton(name)
    try:
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            check_image_size(model, image_size)
    except InputError:
        return None
    return counter.get_total_flops()


def parameter_count(name: str, classes: int) -> int:
    """Count the numbers in a checkpoint, buffers included, with heads for `classes`."""
    model = skeleton(name, classes)
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))
