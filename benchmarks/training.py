"""Time of fine-tuning against bare training steps on batches that are ready in memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution.config import Config, resolve
from attribution.data.dataset import ImageData, load_data
from attribution.models import classifier, memory_layout
from attribution.models import train as training
from attribution.models.batches import Batches
from attribution.models.retrain import STACK
from attribution.runtime.device import autocast
from benchmarks.common import add_data_options, data_settings, measure, ratio, summary


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    add_data_options(parser)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train some epochs each way, and ten models as one where small models train in stacks."""
    given = {"epochs": options.epochs, "device": options.device}
    config = resolve(data_settings(options) | given)
    data = load_data(config)
    n = len(data.rows("train"))
    keep = np.ones(n, dtype=bool)
    sides = {
        "bare steps": bare_epochs(config, data, keep),
        "epochs": lambda: training.train(config, data, 0, keep, validate=False),
    }
    models = {"bare steps": 1, "epochs": 1, f"epochs of {STACK} as one": STACK}
    if training.stacking_pays(config):
        sides[f"epochs of {STACK} as one"] = lambda: training.train_stacked(
            config, data, range(STACK), [keep] * STACK
        )
    seconds = measure(sides, options.repeats)
    seconds = {side: [s / models[side] for s in values] for side, values in seconds.items()}
    setting = f"{Path(config.dataset).name} at {config.image_size}, {n} images, "
    setting += f"batch {config.batch_size}, {config.precision}, {config.device}"
    return [
        {"setting": setting, "side": side}
        | summary(values, n * config.epochs)
        | {"ratio": ratio(values, seconds["bare steps"])}
        for side, values in seconds.items()
    ]


def bare_epochs(config: Config, data: ImageData, keep: np.ndarray) -> Callable[[], None]:
    """A function that runs the steps of config.epochs epochs on batches made beforehand."""

    device = torch.device(config.device)
    steps = -(-int(keep.sum()) // config.batch_size)
    drawn = Batches(config, data, 0, device)
    batches = list(map(drawn.load, drawn.draws(np.flatnonzero(keep), steps)))
    model = classifier.build(config.model, data.class_names, 0)
    memory_layout.place(model.train(), device, config.image_size)

    def bare() -> None:  # excludes building the model, which training includes
        total = steps * config.epochs
        optimizer, scheduler = training.make_optimizer(config, model.parameters(), total)
        for images, labels in batches * config.epochs:
            with autocast(config, device):
                logits = model(images).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
        loss.item()  # waits for a GPU

    return bare
