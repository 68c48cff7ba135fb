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

from benchmarks.common import command_environment, measure, summary

EPOCHS = 3  # of the bare steps


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--num_seeds", type=int, default=10, help="of the command")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds from an empty folder to the comparison, and the steps that they could have held.

    `efficiency` is the time of all training steps of the command, one after the other at the bare
    single-thread rate of one model, over cores times the command's time. Scoring and logging count
    as idle; training in stacks is faster than that rate, so that 1 is not the most.
    """
    import torch

    cores, seconds, bare = os.cpu_count() or 1, [], []
    threads = torch.get_num_threads()
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command = [sys.executable, "-m", "scripts.ablation", "--frac", "0.05"]
            command += ["--num_seeds", str(options.num_seeds)]
            subprocess.run(command, cwd=folder, env=command_environment(folder), check=True)
            seconds.append(time.perf_counter() - start)
            torch.set_num_threads(1)
            per_step, steps = _bare(folder)
            torch.set_num_threads(threads)
        bare.append(per_step * steps)
    setting = f"digits preset, {options.num_seeds} seeds, whole command"
    row = {"setting": setting, "side": "ablation", "steps": steps}
    efficiency = sorted(b / (cores * s) for b, s in zip(bare, seconds, strict=True))
    return [row | summary(seconds) | {"efficiency": efficiency[len(efficiency) // 2]}]


def _bare(folder: str) -> tuple[float, int]:
    """Seconds of a bare step on one thread now, and how many the command in this folder took."""
    import dataclasses
    import statistics

    import numpy as np
    import pandas as pd

    from attribution.config import resolve
    from attribution.data.dataset import load_data
    from attribution.runtime.memory import keep_freed_memory
    from benchmarks.training import bare_epochs

    keep_freed_memory()
    config = resolve({"cache_dir": folder, "device": "cpu"})
    data = load_data(config)
    n = len(data.rows("train"))
    keep = np.ones(n, dtype=bool)

    def per_epoch(kept: Any) -> Any:
        return np.ceil(kept / config.batch_size)

    short = dataclasses.replace(config, epochs=EPOCHS)
    seconds = measure({"bare": bare_epochs(short, data, keep)}, 5)["bare"]
    table = pd.read_csv(next(Path(folder).rglob("comparison.csv")))
    steps = float((per_epoch(n - table["n_removed"]) * table["n_seeds"]).sum())
    steps += config.num_models * float(per_epoch(config.subset_fraction * n))
    return statistics.median(seconds) / (EPOCHS * per_epoch(n)), int(steps * config.epochs)
