"""Overhead of a task, and speed-up from one worker to two, with local processes and with Ray."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from typing import Any

from benchmarks.common import measure, ratio, summary

BACKENDS = ("local", "ray")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--tasks", type=int, default=200, help="empty tasks per round")
    parser.add_argument(
        "--retrainings", type=int, default=8, help="retrainings per round, two in a task"
    )
    parser.add_argument("--epochs", type=int, default=15, help="epochs of a retraining")
    parser.add_argument("--ray_address", default="local", help="host:port of a running cluster")
    parser.add_argument("--cache_dir", default=tempfile.gettempdir() + "/trak-ablation-benchmark")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time empty tasks and retrainings; workers are started before, and each has one thread."""
    import numpy as np
    import torch

    from attribution.config import resolve
    from attribution.data.dataset import load_data
    from attribution.models.retrain import Series, _retrain
    from attribution.runtime.parallel import parallel_map

    torch.set_num_threads(1)  # as each of two workers has
    given = {"cache_dir": options.cache_dir, "device": "cpu", "epochs": options.epochs}
    config = resolve(given | {"ray_address": options.ray_address})
    data = load_data(config)
    keep = np.ones((2, len(data.rows("train"))), dtype=bool)

    def mapped(function: Any, tasks: list, backend: str, jobs: int, shared: tuple = ()) -> None:
        settings = dataclasses.replace(config, backend=backend, jobs=jobs)
        list(parallel_map(function, tasks, jobs, shared, settings))

    calls = [(i,) for i in range(options.tasks)]
    pairs = [Series("pair", [2 * i, 2 * i + 1], keep) for i in range(options.retrainings // 2)]
    retrainings = [(pair, "test") for pair in pairs]
    empty, with_data, speed = {}, {}, {}
    for b in options.backends:
        empty[b] = lambda b=b: mapped(_nothing, calls, b, 2)
        with_data[b] = lambda b=b: mapped(_nothing, calls, b, 2, (config, data))
        for jobs in (1, 2):
            speed[b, jobs] = lambda b=b, jobs=jobs: mapped(
                _retrain, retrainings, b, jobs, (config, data)
            )
    seconds = {
        "empty task": measure(empty, options.repeats),
        "task with the digits": measure(with_data, options.repeats),
    }
    rows = [
        {"setting": f"{name}, {options.tasks} on 2 workers", "side": backend}
        | summary(values, options.tasks)
        for name, sides in seconds.items()
        for backend, values in sides.items()
    ]
    rounds = measure(speed, options.repeats)
    return rows + [
        {
            "setting": f"digits retraining, {options.epochs} epochs, {options.retrainings} in all",
            "side": f"{backend}, {jobs} worker{'s' * (jobs > 1)}",
        }
        | summary(values, options.retrainings)
        | {"speed_up": ratio(rounds[backend, 1], values)}
        for (backend, jobs), values in rounds.items()
    ]


def _nothing(*_: Any) -> None:
    """A task that takes no time."""
