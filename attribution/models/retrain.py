"""Retrains models on parts of the training set, and keeps their logits on a split as they finish."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models.predict import predict
from attribution.models.train import (
    noting_epochs,
    stacking_pays,
    train,
    train_stacked,
    training_key,
)
from attribution.runtime.device import resolve_device
from attribution.runtime.hashing import digest
from attribution.runtime.parallel import parallel_map, resolve_jobs
from attribution.runtime.progress import progress, say
from attribution.runtime.safe_files import ResultStore

STACK = 10  # models trained as one, at most


@dataclass(frozen=True)
class Series:
    """Models to train that differ only in seed, training examples and labels.

    Attributes:
        name: in messages.
        seeds: of each model.
        keep: (n_models, n_train) bool, what each model sees; equally many in every row.
        labels: (n_models, n_train) to train with in place of the data's.
    """

    name: str
    seeds: Sequence[int]
    keep: np.ndarray
    labels: np.ndarray | None = None

    @classmethod
    def without(
        cls, name: str, seeds: Sequence[int], n_train: int, removed: Sequence[np.ndarray]
    ) -> Series:
        """Make a series whose models each see all but the positions in their entry of `removed`."""
        keep = np.ones((len(seeds), n_train), dtype=bool)
        for row, gone in zip(keep, removed, strict=True):
            row[gone] = False
        return cls(name, seeds, keep)

    def __len__(self) -> int:
        return len(self.seeds)

    def stacks(self, size: int) -> list[Series]:
        """Split the series into series of at most `size` models."""
        return [self._part(slice(i, i + size)) for i in range(0, len(self), size)]

    def _part(self, models: slice) -> Series:
        labels = None if self.labels is None else self.labels[models]
        return Series(self.name, self.seeds[models], self.keep[models], labels)

    def key(self) -> str:
        """Hash what the trained models depend on besides settings and data."""
        labels = None if self.labels is None else self.labels.astype("<i8").tobytes().hex()
        return digest(list(self.seeds), np.packbits(self.keep, axis=1).tobytes().hex(), labels)


def retrained_logits(
    config: Config,
    data: ImageData,
    wanted: Sequence[Series],
    split: str,
    work: Path,
    stage: str,
) -> Iterator[np.ndarray]:
    """Train the models, then return the logits (n_models, n, C) float32 of each series' on a split.

    They are read from disk one series at a time: those of many retrainings do not fit into memory.

    The unit of work is a stack: STACK consecutive models of a series where small models are trained
    as one, else one model. Its logits are kept under a hash of everything they depend on: settings,
    data, seeds, examples, labels, device type, torch version. A stack that an earlier command
    finished, or that two series share, is trained once. Nothing else enters the hash (neither the
    other series nor `jobs`), so a resumed run ends with the same bits as an undisturbed one.

    Args:
        work: folder of finished stacks.
        stage: shown in front of the progress.

    Raises:
        InputError: while the logits are read, if somebody has deleted a file.
    """
    device = resolve_device(config.device).type
    # Models that are compared must come from one kind of hardware and one torch.
    settings = training_key(config, data), device, torch.__version__, split
    stacks = [series.stacks(STACK if stacking_pays(config) else 1) for series in wanted]
    keys = [[digest(*settings, stack.key()) for stack in series] for series in stacks]
    distinct = dict(zip(chain(*keys), chain(*stacks), strict=True))
    store = ResultStore(work)
    shape = len(data.rows(split)), len(data.class_names)
    todo = [k for k, stack in distinct.items() if not _is_kept(store, k, (len(stack), *shape))]
    total = sum(map(len, distinct.values()))
    left = sum(len(distinct[key]) for key in todo)
    say(f"{stage}: {total} models, {left} of them to train")
    names = [f"retraining of {distinct[key].name}" for key in todo]
    jobs = resolve_jobs(config.jobs, device, len(distinct))
    with (
        tempfile.TemporaryDirectory() as notes,
        progress(f"{stage}: retrainings", total, total - left, notes) as advance,
    ):
        tasks = [(distinct[key], split, f"{notes}/{key}") for key in todo]
        for index, logits in parallel_map(_retrain, tasks, jobs, (config, data), config, names):
            store.put(todo[index], {"logits": logits})
            advance(len(logits))
    return (_read(store, own) for own in keys)


def _read(store: ResultStore, keys: Sequence[str]) -> np.ndarray:
    found = [store.get(key) for key in keys]
    if None in found:
        raise InputError(f"cache_dir: a finished retraining is gone from {store.folder}; try again")
    return np.concatenate([each["logits"] for each in found if each])


def _is_kept(store: ResultStore, key: str, shape: tuple[int, ...]) -> bool:
    """Whether usable logits of this shape are kept under a key."""
    logits = (store.get(key) or {}).get("logits")
    if logits is None or logits.shape != shape or logits.dtype != np.float32:
        return False
    return bool(np.isfinite(logits).all())


def _retrain(config: Config, data: ImageData, stack: Series, split: str, notes: str) -> np.ndarray:
    """Train the models of a stack; return their logits on a split, (n_models, n, C)."""
    labels = [None] * len(stack) if stack.labels is None else list(stack.labels)
    if stacking_pays(config):
        models = train_stacked(config, data, stack.seeds, list(stack.keep), labels)
    else:
        with noting_epochs(config, notes, stack.name) as on_epoch:
            models = [
                train(config, data, seed, keep, on_epoch, validate=False, labels=own).model
                for seed, keep, own in zip(stack.seeds, stack.keep, labels, strict=True)
            ]
    return np.stack([predict(config, model, data, split) for model in models])
