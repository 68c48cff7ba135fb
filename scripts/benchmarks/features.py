"""TRAK features against the forward + backward pass of the same model, batch and precision."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from scripts.benchmarks.common import (
    RESNET18,
    make_model,
    measure,
    peak_memory_mib,
    reset_peak_memory,
    summary,
)

SETTINGS = {  # name: (ResNet config, image size, batch, proj_dim)
    "resnet18-224": (RESNET18, 224, 16, 2048),
    "resnet18-64": (RESNET18, 64, 64, 2048),
    "mini-16": (None, 16, 64, 512),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both memory layouts of the step are measured, and the faster one is the denominator."""
    import torch

    from attribution.sketch import Sketch

    rows = []
    for name in options.settings:
        config, size, batch, k = SETTINGS[name]
        model = make_model(config).eval()
        images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch,))
        plain_model = make_model(config).eval().to(memory_format=torch.contiguous_format)
        plain_images = images.contiguous()
        sketch = Sketch(k)

        def step(model: Any, images: Any, labels: Any = labels) -> None:
            model.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(images).logits, labels).backward()

        sides = {
            "step, channels_last": lambda m=model, x=images: step(m, x),
            "step, contiguous": lambda m=plain_model, x=plain_images: step(m, x),
            "features": lambda m=model, x=images, y=labels, s=sketch: s.features(m, x, y),
        }
        reset_peak_memory()
        seconds = measure(sides, options.repeats)
        base = min(statistics.median(seconds[s]) for s in list(sides)[:2])
        for side, values in seconds.items():
            rows.append(
                {"setting": f"{name}, batch {batch}, k {k}", "side": side}
                | summary(values, batch)
                | {"ratio": statistics.median(values) / base, "peak_mib": peak_memory_mib()}
            )
    return rows
