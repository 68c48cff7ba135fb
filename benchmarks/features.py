"""Time of TRAK features against a training step of the same model, batch and precision."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from attribution.gradients.sketch import Sketch
from attribution.models import classifier
from attribution.runtime.device import keep_freed_memory, resolve_device
from attribution.scores.features import feature_batch_size
from benchmarks.common import RESNET18, make_model, measure, summary

SETTINGS = {  # name: (ResNet config, image size, batch, proj_dim, num_blocks)
    "resnet18-224": (RESNET18, 224, 16, 2048, 1),
    "resnet18-224-k4096": (RESNET18, 224, 16, 4096, 1),
    "resnet18-224-8x256": (RESNET18, 224, 16, 256, 8),
    "resnet18-224-8x512": (RESNET18, 224, 16, 512, 8),
    "resnet18-64": (RESNET18, 64, 64, 2048, 1),
    "resnet18-64-k4096": (RESNET18, 64, 64, 4096, 1),
    "resnet18-64-8x256": (RESNET18, 64, 64, 256, 8),
    "resnet18-64-8x512": (RESNET18, 64, 64, 512, 8),
    "resnet18-64-10x512": (RESNET18, 64, 64, 512, 10),  # preset food101
    "resnet18-64-b16": (RESNET18, 64, 16, 2048, 1),
    "mini-32": (None, 32, 256, 512, 1),
    "mini-32-10x256": (None, 32, 256, 256, 10),
    "mini-16": (None, 16, 256, 256, 10),  # preset digits
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, or cuda")
    parser.add_argument("--batch", type=int, default=0, help="0: as listed; on a GPU as in `trak`")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Divide by the fastest step: in either memory layout, or in the one that training uses."""

    keep_freed_memory()  # as every command does; it speeds up the step too
    device = resolve_device(options.device)
    rows = []
    for name in options.settings:
        for precision in options.precisions:
            rows += _compare(name, precision, device, options.repeats, options.batch)
    return rows


def _compare(
    name: str, precision: str, device: Any, repeats: int, batch: int
) -> list[dict[str, Any]]:

    config, size, usual, k, blocks = SETTINGS[name]
    batch = batch or (usual if device.type == "cpu" else feature_batch_size(size, device.type))
    model = make_model(config).eval()
    classifier.place(model, device, size)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    last, other = (
        make_model(config).eval().to(device, memory_format=layout)
        for layout in (torch.channels_last, torch.contiguous_format)
    )
    other_images, sketch = images.contiguous(), Sketch(k, num_blocks=blocks)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(model: Any, images: Any) -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            logits = model(images).logits
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        wait()

    def features() -> None:
        with autocast():
            sketch.features(model, images, labels)
        wait()

    sides = {
        "step, as trained here": lambda: step(model, images),
        "step, channels_last": lambda: step(last, images),
        "step, contiguous": lambda: step(other, other_images),
        "features": features,
    }
    seconds = measure(sides, repeats, warm_up=2)
    base = min(statistics.median(seconds[side]) for side in sides if side != "features")
    return [
        {
            "setting": f"{name}, batch {batch}, {blocks} x {k}, {precision}",
            "side": side,
            **summary(values, batch),
            "ratio": statistics.median(values) / base,
        }
        for side, values in seconds.items()
    ]
