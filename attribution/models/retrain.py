"""Models retrained on parts of the training set: what each says about a split, kept as it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models.predict import predict
from attribution.models.train import stacking_pays, train, train_stacked, training_key
from attribution.runtime.device import resolve_device
from attribution.runtime.hashing import digest
from attribution.runtime.parallel import parallel_map, resolve_jobs
from attribution.runtime.progress import progress, say
from attribution.runtime.safe_files import ResultStore

STACK = 10  # models trained as one, at most


class Retrained(Sequence[np.ndarray]):
    """Logits (n_models, n, C) float32 of each series, read from disk where they are asked for.

    Many retrainings of a large split do not fit into memory.

    Raises:
        InputError: on reading, if somebody has deleted them meanwhile.
    """

    def __init__(self, store: ResultStore, keys: Sequence[Sequence[str]]) -> None:
        self._store, self._keys = store, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        found = [self._store.get(key) for key in self._keys[index]]
        if None in found:
            folder = self._store.folder
            raise InputError(f"cache_dir: a finished retraining is gone from {folder}; try again")
        return np.concatenate([each["logits"] for each in found if each])


@dataclass(frozen=True)
class Series:
    """Models to train alike but for their seeds and what they see.

    Attributes:
        name: in messages.
        seeds: of each model.
        keep: (n_models, n_train) bool, what each sees; equally many in every row.
        labels: (n_models, n_train) to train with in place of the data's own, where given.
    """

    name: str
    seeds: Sequence[int]
    keep: np.ndarray
    labels: np.ndarray | None = None

    @classmethod
    def without(
        cls, name: str, seeds: Sequence[int], n_train: int, removed: Sequence[np.ndarray]
    ) -> Series:
        """Models that see all but what `removed` lists for each."""
        keep = np.ones((len(seeds), n_train), dtype=bool)
        for row, gone in zip(keep, removed, strict=True):
            row[gone] = False
        return cls(name, seeds, keep)

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, models: slice) -> Series:
        """Some of its models."""
        labels = None if self.labels is None else self.labels[models]
        return Series(self.name, self.seeds[models], self.keep[models], labels)

    def key(self) -> str:
        """What decides the result beside settings and data."""
        labels = None if self.labels is None else self.labels.astype("<i8").tobytes().hex()
        return digest(list(self.seeds), np.packbits(self.keep, axis=1).tobytes().hex(), labels)


def retrained_logits(
    config: Config,
    data: ImageData,
    wanted: Sequence[Series],
    split: str,
    work: Path,
    stage: str,
) -> Sequence[np.ndarray]:
    """Logits (n_models, n, C) float32 of each series' models on a split.

    What is trained at a time, and kept, is a stack: the next STACK models of a series where small
    models are trained as one, else one model. A stack is kept under what decides it (settings,
    data, seeds, examples seen, labels, kind of device, torch), so that one that an earlier command
    trained, or that is asked for twice, is not trained again. It depends on nothing else: neither
    on what else is asked for or missing, nor on `jobs`, so that a resumed run ends with the bits of
    an undisturbed one.

    Args:
        work: folder of what is finished.
        stage: whose name progress is shown under.
    """
    device = resolve_device(config.device).type
    # Models that are compared have to come from one kind of hardware and one torch.
    settings = training_key(config, data), device, torch.__version__, split
    size = STACK if stacking_pays(config) else 1
    stacks = [[s.part(slice(i, i + size)) for i in range(0, len(s), size)] for s in wanted]
    keys = [[digest(*settings, stack.key()) for stack in series] for series in stacks]
    distinct = dict(zip(sum(keys, []), sum(stacks, []), strict=True))
    store = ResultStore(work)
    shape = len(data.rows(split)), len(data.class_names)
    todo = [
        key for key, series in distinct.items() if not _is_kept(store, key, (len(series), *shape))
    ]
    total, left = (sum(len(distinct[key]) for key in some) for some in (distinct, todo))
    say(f"{stage}: {total} models to compare, {left} of them to train")
    tasks = [(distinct[key], split) for key in todo]
    names = [f"retraining of {distinct[key].name}" for key in todo]
    jobs = resolve_jobs(config.jobs, device, len(distinct))
    with progress(f"{stage}: retrainings", total, total - left) as advance:
        for index, logits in parallel_map(_retrain, tasks, jobs, (config, data), config, names):
            store.put(todo[index], {"logits": logits})
            advance(len(logits))
    return Retrained(store, keys)


def _is_kept(store: ResultStore, key: str, shape: tuple[int, ...]) -> bool:
    """Whether the logits of an earlier command are there, and can be no others."""
    logits = (store.get(key) or {}).get("logits")
    if logits is None or logits.shape != shape or logits.dtype != np.float32:
        return False
    return bool(np.isfinite(logits).all())


def _retrain(config: Config, data: ImageData, stack: Series, split: str) -> np.ndarray:
    labels = [None] * len(stack) if stack.labels is None else list(stack.labels)
    if stacking_pays(config):
        found = train_stacked(config, data, stack.seeds, list(stack.keep), labels)
    else:
        found = [
            train(config, data, seed, keep, validate=False, labels=own).model
            for seed, keep, own in zip(stack.seeds, stack.keep, labels, strict=True)
        ]
    return np.stack([predict(config, model, data, split) for model in found])
