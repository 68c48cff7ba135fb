"""Time of TRAK features against a training step of the same model, batch and precision.

With --before FOLDER, the features of another checkout are timed in turn with these.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch

from attribution.gradients.sketch import Sketch
from attribution.models import memory_layout
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

# Run in another checkout: for every line of its input, features of the model and images in a file.
OTHER = """
import sys, torch
try:
    from attribution.gradients.sketch import Sketch
    from attribution.models.memory_layout import place
    from attribution.runtime.device import keep_freed_memory
except ImportError:  # before the rooms
    from attribution.memory import keep_freed_memory
    from attribution.models import place
    from attribution.sketch import Sketch
keep_freed_memory()
model, images, labels, k, blocks, bfloat16, threads = torch.load(sys.argv[1], weights_only=False)
place(model, images.device, images.shape[-1])
torch.set_num_threads(threads)
sketch = Sketch(k, num_blocks=blocks)
for _ in sys.stdin:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        sketch.features(model, images, labels)[0].cpu()
    print(flush=True)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, or cuda")
    parser.add_argument("--batch", type=int, default=0, help="0: as listed; on a GPU as in `trak`")
    parser.add_argument(
        "--before", default="", help="folder of another checkout whose features are timed too"
    )


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Divide by the fastest step: in either memory layout, or in the one that training uses."""

    keep_freed_memory()  # as every command does; it speeds up the step too
    device = resolve_device(options.device)
    rows = []
    for name in options.settings:
        for precision in options.precisions:
            rows += _compare(name, precision, device, options)
    return rows


@contextlib.contextmanager
def _features_before(folder: str, job: tuple) -> Iterator[Callable[[], Any]]:
    """A function that computes features once in a process of the checkout in `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.pt"
        torch.save(job, file)
        environment = os.environ | {"PYTHONPATH": folder}
        command = [sys.executable, "-c", OTHER, str(file)]
        with subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, text=True, cwd=scratch, env=environment
        ) as process:
            lines, replies = process.stdin, process.stdout
            assert lines and replies

            def features() -> None:
                lines.write("\n")
                lines.flush()
                if not replies.readline():
                    raise RuntimeError(f"{folder}: its features ended with an error, printed above")

            yield features
            lines.close()


def _compare(
    name: str, precision: str, device: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:

    config, size, usual, k, blocks = SETTINGS[name]
    usual = usual if device.type == "cpu" else feature_batch_size(size, device.type)
    batch = options.batch or usual
    model = make_model(config).eval()
    memory_layout.place(model, device, size)
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
    bfloat16, threads = precision == "bfloat16", torch.get_num_threads()
    job = last, images, labels, k, blocks, bfloat16, threads
    with contextlib.ExitStack() as stack:
        if options.before:
            before = stack.enter_context(_features_before(options.before, job))
            sides["features, before"] = before
        seconds = measure(sides, options.repeats, warm_up=2)
    base = min(statistics.median(seconds[side]) for side in sides if side.startswith("step"))
    rows = [
        {
            "setting": f"{name}, batch {batch}, {blocks} x {k}, {precision}",
            "side": side,
            **summary(values, batch),
            "ratio": statistics.median(values) / base,
        }
        for side, values in seconds.items()
    ]
    if options.before:
        pairs = zip(seconds["features"], seconds["features, before"], strict=True)
        row = {"setting": rows[0]["setting"], "side": "features / before, median of rounds"}
        rows.append(row | {"ratio": statistics.median(now / then for now, then in pairs)})
    return rows
