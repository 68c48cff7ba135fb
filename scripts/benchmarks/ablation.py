"""The README's main command in an empty store and cache, start-up of MLflow included."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import summary


def add_options(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds from an empty folder to the comparison."""
    seconds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(__file__).resolve().parents[2]
            # Nothing of the caller's store: a finished run in it would be reused.
            environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
            environment |= {"TRAK_ABLATION_CACHE": folder, "PYTHONPATH": str(root)}
            start = time.perf_counter()
            command = [sys.executable, "-m", "scripts.ablation", "--frac", "0.05"]
            subprocess.run(command, cwd=folder, env=environment, check=True)
            seconds.append(time.perf_counter() - start)
    return [{"setting": "digits preset, whole command", "side": "ablation"} | summary(seconds)]
