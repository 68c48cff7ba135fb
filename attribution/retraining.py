"""Models retrained on parts of the training set: what each says about a split, kept as it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from attribution.config import Config
from attribution.data import ImageData
from attribution.parallel import ResultStore, parallel_map, resolve_jobs
from attribution.progress import progress
from attribution.tracking import digest, say, training_key
from attribution.training import predict, resolve_device, train


def retrained_logits(
    config: Config,
    data: ImageData,
    trainings: Sequence[tuple[int, np.ndarray]],
    split: str,
    work: Path,
    stage: str,
) -> list[np.ndarray]:
    """Logits (n, C) float32 on a split of one model for each (seed, keep); keep (n_train,) bool.

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
    keys = [digest(*settings, s, np.packbits(keep).tobytes().hex()) for s, keep in trainings]
    wanted = dict(zip(keys, trainings, strict=True))
    store = ResultStore(work)
    results = {key: found["logits"] for key in wanted if (found := store.get(key))}
    missing = [key for key in wanted if key not in results]
    say(f"{stage}: {len(wanted)} models to compare, {len(missing)} of them to train")
    jobs = resolve_jobs(config.jobs, device, len(wanted))
    tasks = [(config, data, *wanted[key], split) for key in missing]
    with progress(f"{stage}: retrainings", len(wanted), len(results)) as advance:
        for index, logits in parallel_map(_retrain, tasks, jobs):
            store.put(missing[index], {"logits": logits})
            results[missing[index]] = logits
            advance()
    return [results[key] for key in keys]


def _retrain(
    config: Config, data: ImageData, seed: int, keep: np.ndarray, split: str
) -> np.ndarray:
    trained = train(config, data, seed, keep, validate=False)
    return predict(config, trained.model, data, split)
