"""The machine and the versions: what a figure means nothing without."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attribution.errors import redact

PACKAGES = (
    "torch", "torchvision", "transformers", "datasets", "traker", "mlflow", "numpy", "scikit-learn",
    "cleanlab", "joblib", "ray", "dattri", "captum", "kronfluence",
)  # fmt: skip


def hardware() -> dict[str, Any]:
    """Date, processor (and GPU), threads, and the versions of what is installed."""
    import torch

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
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """The same with the command line and the commit: what a run has to record to be repeated."""
    return hardware() | {"command": [redact(word) for word in sys.argv]} | _commit()


def _commit() -> dict[str, Any]:
    """The code's commit and whether it was changed since; nothing where it is not in git."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20
        )
        done.check_returncode()
        return done.stdout.strip()

    try:
        if (
            Path(git("rev-parse", "--show-toplevel")).resolve() != root
        ):  # installed within another's
            return {}
        return {"commit": git("rev-parse", "HEAD"), "commit_is_dirty": bool(git("status", "-s"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _processor() -> str:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    bf16 = " with bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{bf16})"
