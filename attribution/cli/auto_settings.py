"""Settings that preset `images` leaves open, chosen from facts about the data and the model."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attribution.config import Config
from attribution.data.decoding import decode_image
from attribution.data.listing import Listing
from attribution.data.sources import content
from attribution.models import model_facts, pretrained
from attribution.runtime.progress import say

SAMPLE = 128  # images whose size and colour are looked at
MOST_OPERATIONS = 6e13  # of frozen layers on a CPU at more than 64 pixels: ten minutes of a core
SCRATCH_STEPS, FINE_TUNING_STEPS = 1500, 300  # training steps to aim for


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    Attributes:
        n_train: training examples.
        side: median shorter side of a sample of the images, in pixels.
        is_grey: whether that sample has no colour.
        own_size: image size of the pretrained model; None if the model is trained from scratch.
        has_gpu: allows larger images for a pretrained model.
        flops: operations of one image's forward pass at an image size; None if the model refuses it.
        train_layers: the layers that are trained, of a pretrained model.
    """

    n_train: int
    side: int
    is_grey: bool
    own_size: int | None
    has_gpu: bool
    flops: Callable[[int], int | None]
    train_layers: str = "all"


def choose_model(config: Config) -> Config:
    """Replace `auto` by the model that can be had within seconds, the layers to train, and whether to cross-fit."""
    model, layers = config.model, config.train_layers
    if model == "auto":
        model = pretrained.PRETRAINED
        why = "" if pretrained.is_cached(model) else pretrained.why_unreachable(model)
        if why:
            say(
                f"model: {model} is not in the Hub's cache, nor to be downloaded ({why}); a small network "
                "is trained from scratch. To use a pretrained one, type --model FOLDER"
            )
            model = "resnet-mini"
    if layers == "auto":
        # Checkpoints that are given were probably trained whole.
        is_whole = model in pretrained.MINI_CONFIGS or config.checkpoints
        layers = "all" if is_whole or config.device.startswith("cuda") else "head"
    cross_fit = config.cross_fit
    if cross_fit == "auto":
        cross_fit = "yes" if layers == "head" and not config.checkpoints else "no"
    return dataclasses.replace(config, model=model, train_layers=layers, cross_fit=cross_fit)


def choose(facts: Facts, known: dict[str, Any]) -> dict[str, Any]:
    """A value for every open setting; known settings influence the others."""
    scratch, is_head = facts.own_size is None, facts.train_layers == "head"
    size = known.get("image_size") or image_size(facts)
    power_of_two = 2 ** int(math.log2(math.sqrt(facts.n_train)))
    batch = known.get("batch_size") or max(16, min(128, power_of_two))
    steps, least, most = (SCRATCH_STEPS, 5, 60) if scratch else (FINE_TUNING_STEPS, 3, 20)
    wanted = round(steps / math.ceil(facts.n_train / batch))
    epochs = known.get("epochs") or max(least, min(most, wanted))
    # Photographs may be mirrored. Images without colour are often writing, which may not.
    # Frozen layers run once for an image that stays as it is.
    by_colour = "crop" if facts.is_grey else "flip,crop"
    of_pretrained = 2e-3 if is_head else 2e-4
    # Operations of one training; an idle core does about 1e11 a second.
    work = 0 if is_head else 3 * epochs * (facts.flops(size) or 0) * facts.n_train
    values = {
        "image_size": size,
        "augment": by_colour if facts.train_layers == "all" else "none",
        "batch_size": batch,
        "epochs": epochs,
        "learning_rate": 3e-3 if scratch else of_pretrained,
        "weight_decay": 5e-4 if scratch else 0.01,
        "num_models": 10 if work < 3e13 else 4,
        "num_seeds": 10 if work < 2e12 else 5,
    }
    return {name: value for name, value in values.items() if name not in known}


def image_size(facts: Facts) -> int:
    """The sample's side, rounded to 16, from 32 to 64; up to a pretrained model's own where that is cheap."""
    by_data = max(32, 16 * round(facts.side / 16))
    if facts.own_size is None:
        return min(by_data, 64)
    large = min(facts.own_size, max(64, by_data))
    one_pass = facts.n_train * (facts.flops(large) or 0)  # all that a head costs
    is_cheap = facts.has_gpu or facts.train_layers == "head" and one_pass < MOST_OPERATIONS
    size = large if is_cheap else min(facts.own_size, 64)
    return size if facts.flops(size) is not None else facts.own_size


def gather(config: Config, listing: Listing) -> Facts:
    """Look at a sample of the images (always the same one) and at the model's config."""
    sides, colours = [], []
    for cell in listing.source.cells(listing.table["row"].to_numpy()[:SAMPLE]):
        try:
            image = listing.source.open(io.BytesIO(content(cell)))
            sides.append(min(image.size))
            colours.append(int(np.ptp(decode_image(image, 16), axis=2).max()))
        except Exception:  # reported later, when all images are decoded
            continue
    from_scratch = config.model in pretrained.MINI_CONFIGS
    return Facts(
        n_train=listing.n_train(config),
        side=round(float(np.median(sides or [64]))),
        is_grey=float(np.median(colours or [255])) <= 16,
        own_size=None if from_scratch else model_facts.own_image_size(config.model),
        has_gpu=config.device.startswith("cuda"),
        flops=lambda size: model_facts.forward_flops(config.model, size),
        train_layers=config.train_layers,
    )
