"""Models retrained on parts of the training set: what each says about a split, kept as it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from attribution.config import Config
from attribution.data import ImageData
from attribution.parallel import ResultStore, parallel_map, resolve_jobs
from attribution.progress import progress
from attribution.tracking import digest, say, training_key
from attribution.training import predict, resolve_device, stacking_pays, train, train_stacked

STACK = 10  # models trained as one, at most


class Training(NamedTuple):
    """A model to train: its name in messages, its seed, and the examples that it sees, (n_train,)."""

    name: str
    seed: int
    keep: np.ndarray


def retrained_logits(
    config: Config,
    data: ImageData,
    trainings: Sequence[Training],
    split: str,
    work: Path,
    stage: str,
) -> list[np.ndarray]:
    """Logits (n, C) float32 of each training's model on a split.

    A model's logits are kept under what decides them (settings, data, seed, the examples seen,
    kind of device, torch), so that one that an earlier command trained, or that is asked for
    twice, is not trained again.

    Args:
        work: folder of what is finished.
        stage: whose name progress is shown under.
    """
    device = resolve_device(config.device).type
    # Models that are compared have to come from one kind of hardware and one torch.
    settings = training_key(config, data), device, torch.__version__, split
    keys = [digest(*settings, t.seed, np.packbits(t.keep).tobytes().hex()) for t in trainings]
    wanted: dict[str, Training] = {}
    for key, training in zip(keys, trainings, strict=True):
        wanted.setdefault(key, training)
    store = ResultStore(work)
    results = {key: found["logits"] for key in wanted if (found := store.get(key))}
    say(f"{stage}: {len(wanted)} models to compare, {len(wanted) - len(results)} of them to train")
    missing = [key for key in wanted if key not in results]
    todo = _stacks(config, {key: wanted[key] for key in missing}, device)
    jobs = resolve_jobs(config.jobs, device, len(_stacks(config, wanted, device)))
    tasks = [([wanted[key][1:] for key in stack], split) for stack in todo]
    names = [f"retraining of {wanted[stack[0]].name}" for stack in todo]
    with progress(f"{stage}: retrainings", len(wanted), len(results)) as advance:
        for index, logits in parallel_map(_retrain, tasks, jobs, (config, data), config, names):
            for key, each in zip(todo[index], logits, strict=True):
                store.put(key, {"logits": each})
                results[key] = np.array(each)  # Ray's own would pin its store's memory
                advance()
    return [results[key] for key in keys]


def _stacks(config: Config, wanted: dict[str, Training], device: str) -> list[list[str]]:
    """Keys of models that are trained as one: neighbours that see equally many examples."""
    size = 1
    if stacking_pays(config):
        size = min(STACK, -(-len(wanted) // resolve_jobs(config.jobs, device, len(wanted))))
    runs = [list(run) for _, run in groupby(wanted, lambda key: wanted[key].keep.sum())]
    stacks = [run[i : i + size] for run in runs for i in range(0, len(run), size)]
    # The last ones are halved, so that no worker waits long for another.
    jobs = resolve_jobs(config.jobs, device, len(stacks))
    while len(stacks) % jobs and len(stacks[-1]) > 2:
        half = len(stacks[-1]) // 2
        stacks[-1:] = [stacks[-1][:half], stacks[-1][half:]]
    return stacks


def _retrain(
    config: Config, data: ImageData, stack: list[tuple[int, np.ndarray]], split: str
) -> list[np.ndarray]:
    if stacking_pays(config):
        found = train_stacked(config, data, *zip(*stack, strict=True))
    else:
        found = [train(config, data, *each, validate=False).model for each in stack]
    return [predict(config, model, data, split) for model in found]
