"""Hardware, library versions and command line: the conditions of a measured result."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attribution.errors import redact

PACKAGES = (
    "torch", "torchvision", "transformers", "datasets", "traker", "mlflow", "numpy", "scikit-learn",
    "cleanlab", "joblib", "ray", "dattri", "captum", "kronfluence",
)  # fmt: skip


def hardware() -> dict[str, Any]:
    """Date, processor, GPU, threads, and versions of the installed packages."""
    found = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def environment() -> dict[str, Any]:
    """What is needed to repeat a run, besides the commit that MLflow records: hardware(), the command line."""
    return hardware() | {"command": [redact(word) for word in sys.argv]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    bf16 = " with bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{bf16})"
