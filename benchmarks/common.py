"""Helpers of the sub-benchmarks: timing in turn, medians, peak memory, a model to measure."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = [64, 128, 256, 512]
RESNET18 = {"hidden_sizes": WIDTHS, "depths": [2, 2, 2, 2], "layer_type": "basic"}


def command_environment(cache: Path | str) -> dict[str, str]:
    """The environment of a command with its own cache, without the caller's MLflow store or cluster.

    A finished run in the caller's store would be reused.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
    return {**kept, "TRAK_ABLATION_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


def add_cache_dir(parser: Any) -> None:
    """Add the flag for the folder where models are kept for the next run."""
    parser.add_argument("--cache_dir", default=tempfile.gettempdir() + "/trak-ablation-benchmark")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that data_settings reads."""
    parser.add_argument("--dataset", default="", help="image folder; empty takes the digits")
    parser.add_argument("--model", default="resnet-mini", help="with --dataset")
    parser.add_argument("--epochs", type=int, default=3, help="with --dataset")
    add_cache_dir(parser)


def data_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Parameters of the digits, or with --dataset of photographs at 64x64, a tenth of them flipped."""
    given: dict[str, Any] = {"cache_dir": options.cache_dir}
    if options.dataset:
        given |= {"preset": "food101", "dataset": options.dataset, "model": options.model}
        given |= {"image_size": 64, "patience": 0, "epochs": options.epochs}
        given |= {"learning_rate": 5e-4, "label_noise": 0.1}
    return given


def measure(
    sides: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time each side `repeats` times, the sides in turn, after `warm_up` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warm_up + repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float], per: float = 1) -> dict[str, float]:
    """n, and minimum, median and maximum in milliseconds per unit (each time holds `per` units)."""
    values = [1000 * s / per for s in seconds]
    return {
        "n": len(values),
        "min_ms": min(values),
        "median_ms": statistics.median(values),
        "max_ms": max(values),
    }


def ratio(seconds: list[float], base: list[float]) -> float:
    """Ratio of the medians of two sides."""
    return statistics.median(seconds) / statistics.median(base)


def reset_peak_memory() -> None:
    """Reset the peak memory of this process (Linux only; elsewhere the peak counts from its start)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """Peak resident memory of this process since the last reset, mapped files included."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_model(config: dict[str, Any] | None, classes: int = 10):  # noqa: ANN201
    """A ResNet with random weights in channels_last memory layout; None is `resnet-mini`."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    from attribution.models.pretrained import MINI_CONFIGS

    torch.manual_seed(0)
    config = config or MINI_CONFIGS["resnet-mini"]
    model = ResNetForImageClassification(ResNetConfig(**config, num_labels=classes))
    return model.to(memory_format=torch.channels_last)
