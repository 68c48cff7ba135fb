"""Choose fewer models and seeds, so that a command fits into the time that the user gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set
from typing import Any

import numpy as np

from attribution.cli import plan
from attribution.config import FIELDS, Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.experiments.statistics import detectable_effect
from attribution.runtime.cache_folder import cache_folder
from attribution.runtime.hashing import digest
from attribution.runtime.pace import duration
from attribution.runtime.progress import say
from attribution.runtime.safe_files import ResultStore
from attribution.stages import STAGES, Stage
from attribution.tracking import stage_runs
from attribution.tracking.fingerprint import fingerprint

LEAST = {"num_models": 2, "num_seeds": 3}
NAMES = {"num_models": "models", "num_seeds": "seeds"}
STEPS = 10  # in which both numbers are lowered together


def fit(stage: Stage, config: Config, data: ImageData, known: Set[str]) -> Config:
    """Lower the numbers of checkpoints and seeds until the plan fits into `time_budget`; say so.

    The choice is kept in cache_dir, so that the same command chooses the same and continues, although
    the measured speed differs a little each time.

    Args:
        known: parameters that must stay as they are.

    Raises:
        InputError: not even the smallest plan fits, or tasks run on Ray.
    """
    names = [n for n in LEAST if n not in known and FIELDS[n].metadata["group"] in stage.all_groups]
    shown = f"time_budget={config.time_budget}"
    if config.backend == "ray":
        raise InputError(f"{shown}: the speed of a Ray cluster is not known; leave it out")
    store = ResultStore(cache_folder(config, "budgets"))
    key = digest(
        fingerprint(stage.name, config, data), config.time_budget, config.num_splits, names
    )
    chosen: dict[str, Any] = {n: int(v) for n, v in (store.get(key) or {}).items()}
    if not chosen:
        for chosen in _choices(config, names):
            smaller = dataclasses.replace(config, **chosen)
            seconds = config.num_splits * _seconds(stage, smaller, data)
            if seconds <= config.budget_seconds:
                break
        else:
            least = ", ".join(f"{value} {NAMES[name]}" for name, value in chosen.items())
            raise InputError(
                f"{shown}: the smallest plan ({least or 'all numbers are given'}) takes about "
                f"{duration(seconds)}; give it that, or fewer arms, epochs or images"
            )
        store.put(key, {name: np.array(value) for name, value in chosen.items()})
    say(f"{shown}: {_cost(config, chosen)}")
    return dataclasses.replace(config, **chosen)


def _choices(config: Config, names: list[str]) -> Iterator[dict[str, Any]]:
    """The numbers to try, from those of the config to the smallest."""
    for step in range(STEPS, -1, -1):
        yield {
            name: min(most, max(LEAST[name], round(most * step / STEPS)))
            for name in names
            for most in [getattr(config, name)]
        }


def _seconds(stage: Stage, config: Config, data: ImageData) -> float:
    """How long a command takes, less what is finished."""
    if stage_runs.find_finished(stage.name, config, data):
        return 0.0
    runs = stage_runs.reusable(stage, config, data)
    wanted = [stage.name, *(name for name, run_id in runs.items() if not run_id)]
    estimates = {name: STAGES[name].script().estimate(config, data) for name in wanted}
    return sum(plan.seconds_of(estimates, config, data.class_names).values())


def _cost(config: Config, chosen: dict[str, int]) -> str:
    """What the choice costs in detectable effect, in words."""
    fewer = {name: value for name, value in chosen.items() if value < getattr(config, name)}
    if not fewer:
        return "the plan fits"
    words = [f"{v} {NAMES[name]} instead of {getattr(config, name)}" for name, v in fewer.items()]
    text = ", ".join(words)
    if "num_models" in fewer:
        text += "; scores are noisier"
    if seeds := fewer.get("num_seeds"):
        times = detectable_effect(1, seeds) / detectable_effect(1, config.num_seeds)
        text += f"; differences must be about {times:.1f} times as large to be seen"
    return text
