"""Hardware, library versions, command and commit: the conditions of a measured result."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attribution.errors import redact

ROOT = Path(__file__).resolve().parents[2]
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
    """Everything that is needed to repeat a run: hardware(), the command line and the commit."""
    return hardware() | {"command": [redact(word) for word in sys.argv]} | _commit()


def _commit() -> dict[str, Any]:
    """The commit of this code and whether files were changed; empty if it is not a git checkout."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return {}  # installed inside the checkout of another project
        return {"commit": _git("rev-parse", "HEAD"), "commit_is_dirty": bool(_git("status", "-s"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    bf16 = " with bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{bf16})"
