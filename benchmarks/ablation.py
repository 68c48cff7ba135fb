"""Seconds of README's main command from an empty folder, start-up of MLflow included."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.common import command_environment, summary


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--num_seeds", type=int, default=10, help="seeds of the command")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the command with an empty tracking store and an empty cache each time."""
    seconds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command = [sys.executable, "-m", "scripts.ablation", "--frac", "0.05"]
            command += ["--num_seeds", str(options.num_seeds)]
            subprocess.run(command, cwd=folder, env=command_environment(folder), check=True)
            seconds.append(time.perf_counter() - start)
    setting = f"digits preset, {options.num_seeds} seeds, whole command"
    return [{"setting": setting, "side": "ablation"} | summary(seconds)]
