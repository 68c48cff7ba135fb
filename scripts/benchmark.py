"""Measure speed and memory: features, training, ablation; both sides of a ratio in turn, medians."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

RESNET18 = {
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}
SETTINGS = {  # name: (ResNet config, image size, batch, proj_dim)
    "resnet18-224": (RESNET18, 224, 16, 2048),
    "resnet18-64": (RESNET18, 64, 64, 2048),
    "mini-16": (None, 16, 64, 512),
}


def measure(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, taken in turn after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float], per: int = 1) -> dict[str, float]:
    """min, median and max in milliseconds a unit."""
    values = [1000 * s / per for s in seconds]
    return {
        "n": len(values),
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def peak_memory_mib() -> float:
    """Peak resident memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_model(config: dict[str, Any] | None, classes: int = 10):  # noqa: ANN201
    """A ResNet of random weights in channels_last; None is the mini model."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    from attribution.models import MINI_CONFIGS

    torch.manual_seed(0)
    config = config or MINI_CONFIGS["resnet-mini"]
    model = ResNetForImageClassification(ResNetConfig(**config, num_labels=classes))
    return model.to(memory_format=torch.channels_last)


def features(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Sketched per-sample gradients against forward + backward of the same batch, float32.

    The step is measured in both memory layouts and the faster one is the denominator.
    """
    import torch

    from attribution.gradients import Sketch, capture

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
            "features": lambda m=model, x=images, y=labels, s=sketch: s.project(capture(m, x, y)),
        }
        seconds = measure(sides, options.repeats)
        base = min(statistics.median(seconds[s]) for s in list(sides)[:2])
        for side, values in seconds.items():
            rows.append(
                {"setting": f"{name}, batch {batch}, k {k}", "side": side}
                | summary(values, batch)
                | {"ratio": statistics.median(values) / base, "peak_mib": peak_memory_mib()}
            )
    return rows


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Three epochs of fine-tuning from the pixel cache against the bare steps on such batches."""
    import numpy as np
    import torch

    from attribution import models, training
    from attribution.config import resolve
    from attribution.data import load_data

    epochs = 3
    given = {"epochs": epochs, "cache_dir": options.cache_dir, "device": "cpu"}
    if options.dataset:
        given |= {"preset": "food101", "dataset": options.dataset, "image_size": 64, "patience": 0}
        given |= {"model": options.model, "precision": "auto"}
    config = resolve(given)
    data = load_data(config)
    n = min(len(data.rows("train")), options.images)
    keep = np.arange(len(data.rows("train"))) < n
    steps = -(-n // config.batch_size)
    device = torch.device("cpu")
    batches = list(training.Batches(config, data, 0, device)(np.flatnonzero(keep), steps))
    model = models.build(config.model, data.class_names, 0)
    model.to(memory_format=torch.channels_last).train()

    def bare() -> None:  # without the building of a model, which the epochs include
        optimizer, scheduler = training.make_optimizer(config, model, steps * epochs)
        for images, labels in batches * epochs:
            with training.autocast(config, device):
                logits = model(images).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()

    sides = {
        "bare steps": bare,
        "epochs": lambda: training.train(config, data, 0, keep, validate=False),
    }
    seconds = measure(sides, options.repeats)
    base = statistics.median(seconds["bare steps"])
    setting = f"{Path(config.dataset).name} at {config.image_size}, {n} images, {config.precision}"
    return [
        {"setting": setting, "side": side}
        | summary(values, n * epochs)
        | {"ratio": statistics.median(values) / base, "peak_mib": peak_memory_mib()}
        for side, values in seconds.items()
    ]


def ablation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The README's main command in an empty store and cache, start-up of MLflow included."""
    seconds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(__file__).resolve().parents[1]
            # Nothing of the caller's store: a finished run in it would be reused.
            environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
            environment |= {"TRAK_ABLATION_CACHE": folder, "PYTHONPATH": str(root)}
            start = time.perf_counter()
            command = [sys.executable, "-m", "scripts.ablation", "--frac", "0.05"]
            subprocess.run(command, cwd=folder, env=environment, check=True)
            seconds.append(time.perf_counter() - start)
    return [{"setting": "digits preset, whole command", "side": "ablation"} | summary(seconds)]


def main() -> None:
    """Parse, measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("features", "training", "ablation"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--dataset", default="", help="training: a folder, in place of the digits")
    parser.add_argument("--model", default="resnet-mini", help="training: with --dataset")
    parser.add_argument("--images", type=int, default=2000, help="training: images in the epoch")
    parser.add_argument("--cache_dir", default=tempfile.gettempdir() + "/trak-ablation-benchmark")
    parser.add_argument("--json", default="", help="file to write")
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    rows = {"features": features, "training": training, "ablation": ablation}[options.what](options)
    hardware = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    _print(rows, hardware)
    if os.environ.get("MLFLOW_RUN_ID"):  # under `mlflow run` the table goes to its run
        import mlflow
        import pandas as pd

        with mlflow.start_run():
            mlflow.log_table(pd.DataFrame(rows), "benchmark.json")
            mlflow.log_params(hardware)
    if options.json:
        Path(options.json).write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=2))


def _print(rows: list[dict[str, Any]], hardware: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=", ".join(f"{k} {v}" for k, v in hardware.items()))
    for name in rows[0]:
        table.add_column(
            {"n": "n", "min": "min (ms)", "median": "median", "max": "max"}.get(name, name)
        )
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
