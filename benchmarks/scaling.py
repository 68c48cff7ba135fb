"""Overhead of a task, and speed-up from one worker to two, with local processes and with Ray."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch

from attribution.config import resolve
from attribution.data.dataset import load_data
from attribution.models.retrain import Series, _retrain
from attribution.runtime.parallel import parallel_map
from benchmarks.common import add_cache_dir, measure, ratio, summary

BACKENDS = ("local", "ray")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--tasks", type=int, default=200, help="empty tasks per round")
    parser.add_argument("--retrainings", type=int, default=8, help="per round, two in a task")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of a retraining")
    parser.add_argument("--ray_address", default="local", help="host:port of a running cluster")
    add_cache_dir(parser)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time empty tasks and retrainings; workers are started before, and each has one thread."""
    torch.set_num_threads(1)  # as each of two workers has
    given = {"cache_dir": options.cache_dir, "device": "cpu", "epochs": options.epochs}
    config = resolve(given | {"ray_address": options.ray_address})
    data = load_data(config)
    keep = np.ones((2, len(data.rows("train"))), dtype=bool)

    def mapped(function: Any, tasks: list, shared: tuple, backend: str, jobs: int) -> None:
        settings = dataclasses.replace(config, backend=backend, jobs=jobs)
        list(parallel_map(function, tasks, jobs, shared, settings))

    rows = []
    calls = [(i,) for i in range(options.tasks)]
    for name, shared in (("empty task", ()), ("task with the digits", (config, data))):
        sides = {b: partial(mapped, _nothing, calls, shared, b, 2) for b in options.backends}
        for side, values in measure(sides, options.repeats).items():
            setting = f"{name}, {options.tasks} on 2 workers"
            rows.append({"setting": setting, "side": side} | summary(values, options.tasks))

    pairs = [Series("pair", [2 * i, 2 * i + 1], keep) for i in range(options.retrainings // 2)]
    tasks = [(pair, "test") for pair in pairs]
    setting = f"digits retraining, {options.epochs} epochs, {options.retrainings} in all"
    sides = {
        f"{b}, workers: {jobs}": partial(mapped, _retrain, tasks, (config, data), b, jobs)
        for b in options.backends
        for jobs in (1, 2)
    }
    seconds = measure(sides, options.repeats)
    for side, values in seconds.items():
        one = seconds[side.replace("workers: 2", "workers: 1")]
        row = {"setting": setting, "side": side, "speed_up": ratio(one, values)}
        rows.append(row | summary(values, options.retrainings))
    return rows


def _nothing(*_: Any) -> None:
    """A task that takes no time."""
