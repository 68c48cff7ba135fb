"""The checkpoints of the finetune stage: what each one is trained on, their training, their folders."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.models import classifier, given, memory_layout, model_facts
from attribution.models.ensemble import Ensemble
from attribution.models.predict import predict
from attribution.models.pretrained import trained_paths
from attribution.models.train import noting_epochs, train
from attribution.runtime.device import resolve_device
from attribution.runtime.hashing import derive_seed
from attribution.runtime.parallel import parallel_map, resolve_jobs
from attribution.runtime.progress import progress, say
from attribution.runtime.safe_files import Files, read_arrays, read_folder, read_json, write_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EPOCHS = "epochs"  # the folder of a run with a checkpoint for each of `checkpoint_epochs`


def checkpoint_name(m: int) -> str:
    """The name of a checkpoint in metrics and among MLflow's models."""
    return f"checkpoint_{m:03d}"


def run_name(config: Config, r: int) -> str:
    """The name in metrics of a training run, which is that of its checkpoint unless it leaves several."""
    return f"run_{r:03d}" if config.checkpoint_epochs else checkpoint_name(r)


def check(config: Config, data: ImageData) -> None:
    """Refuse a model, epochs or a subset size that cannot be trained, before any training starts.

    Raises:
        InputError: the model cannot be built, does not take images of this size, a checkpoint would
            see fewer than two training examples, or a run may end before an epoch that is wanted.
    """
    _check_epochs(config)
    if config.checkpoints:
        given.check(config, data.class_names)
    trained_paths(config.model, config.train_layers)
    classifier.check(config.model, data.class_names, config.image_size)
    check_subset_fraction(config, len(data.rows("train")))


def _check_epochs(config: Config) -> None:
    certain, advice = config.epochs, ""
    if config.patience and config.patience + 1 < config.epochs:
        certain = config.patience + 1
        advice = f", or set patience=0: with patience={config.patience} no more are certain"
    if max(map(abs, config.epoch_numbers), default=0) > certain:
        raise InputError(
            f"checkpoint_epochs={config.checkpoint_epochs}: goes beyond the {certain} epochs of a run; "
            f"use numbers up to {certain}, or at most last:{certain}{advice}"
        )
    if config.checkpoint_epochs and config.patience:
        say(
            f"checkpoint_epochs={config.checkpoint_epochs}: these epochs are scored, although "
            f"patience={config.patience} keeps the best epoch of every retraining (tag best_epoch)"
        )


def check_subset_fraction(config: Config, n: int) -> None:
    """Refuse a share that leaves a checkpoint fewer than two of n training examples.

    Raises:
        InputError: it does.
    """
    if config.subset_fraction * n < 2:
        raise InputError(
            f"subset_fraction={config.subset_fraction:g}: a checkpoint needs 2 of the {n} training "
            f"examples; use {math.ceil(2000 / n) / 1000:g} or more"
        )


def subset_masks(n: int, num_models: int, fraction: float, seed: int) -> np.ndarray:
    """Draw which training examples each checkpoint sees: (num_models, n) bool.

    Every row holds floor(fraction * n) examples, at least one. Consecutive checkpoints leave out
    disjoint parts of one random permutation, as in repeated cross-validation: with fraction 0.5 and
    an even number of checkpoints, half of them leave out any given example.
    """
    masks = np.ones((num_models, n), dtype=bool)
    size = n - max(1, math.floor(fraction * n + 1e-9))
    if size == 0:
        return masks
    folds = -(-n // size)  # the last fold wraps around where size does not divide n
    for m in range(num_models):
        rng = np.random.default_rng(derive_seed(seed, "subset", m // folds))
        start = (m % folds) * size
        left_out = rng.permutation(n).take(range(start, start + size), mode="wrap")
        masks[m, left_out] = False
    return masks


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in a folder, with its logits on each split.

    Attributes:
        history: the metrics of every epoch that was run; up to its own for an epoch of a run.
        logits: by split, (n, C).
        epochs: the same model after each of `checkpoint_epochs`, ascending.
    """

    folder: Path
    history: list[dict[str, float]]
    logits: dict[str, np.ndarray]
    epochs: tuple[Checkpoint, ...] = ()


@dataclass(frozen=True)
class Finetuned:
    """The result of the finetune stage.

    Attributes:
        members: masks and logits of all checkpoints, run by run and by epoch within a run.
        folders: the from_pretrained folder of each checkpoint, in order; empty where not loaded.
        runs: the final weights of each training run; empty where loaded from MLflow.
        test: test metrics with and without a cleaning of the training set, if there was one.
    """

    members: Ensemble
    folders: list[Path]
    runs: list[Checkpoint] = field(default_factory=list)
    test: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: np.ndarray, runs: list[Checkpoint]) -> Finetuned:
        """Gather the checkpoints of runs that were just trained, in the order of masks (R, n_train)."""
        found = [each for run in runs for each in run.epochs or (run,)]
        masks = masks.repeat(len(found) // len(runs), axis=0)
        members = Ensemble(masks, *(np.stack([c.logits[s] for c in found]) for s in SPLITS))
        return cls(members, [c.folder for c in found], runs)


def finetune(config: Config, data: ImageData, work: Path) -> Finetuned:
    """Train num_models models, each on its own random share of the training set, or take those given.

    Args:
        work: as of train_checkpoints.
    """
    n = len(data.rows("train"))
    masks = subset_masks(n, config.num_models, config.subset_fraction, config.seed)
    return Finetuned.of(masks, train_checkpoints(config, data, masks, work))


def train_checkpoints(
    config: Config, data: ImageData, masks: np.ndarray, work: Path
) -> list[Checkpoint]:
    """Train a model for each row of masks (num_models, n_train), or take those that are given.

    Args:
        work: holds a folder for each finished checkpoint; those of an earlier call are not trained
            again.
    """
    folders = [work / f"{m:03d}" for m in range(len(masks))]
    missing = [m for m, folder in enumerate(folders) if not _is_whole(folder, config, data)]
    names = [f"checkpoint {m:03d}" for m in missing]
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, len(folders))
    finished = len(folders) - len(missing)
    with (
        tempfile.TemporaryDirectory() as notes,
        progress("finetune: checkpoints", len(folders), finished, notes) as advance,
    ):
        function: Callable[..., Files] = _train_checkpoint
        tasks: list[tuple] = [
            (derive_seed(config.seed, "checkpoint", m), masks[m], f"{notes}/{name}")
            for m, name in zip(missing, names, strict=True)
        ]
        if config.checkpoints:
            function, tasks = _take_checkpoint, [(Path(config.given_folders[m]),) for m in missing]
        results = parallel_map(function, tasks, jobs, (config, data), config, names)
        for index, files in results:
            write_folder(folders[missing[index]], files)
            advance()
    return [_read_checkpoint(folder) for folder in folders]


def _train_checkpoint(
    config: Config, data: ImageData, seed: int, keep: np.ndarray, notes: str
) -> Files:
    """Train one model; return its files as bytes, because workers may not share a disk.

    The files of its final weights are followed by those of `checkpoint_epochs`, in a folder for each
    epoch. Weights are only copied while it trains, so that the training does not change.
    """
    wanted, states = set(config.epoch_numbers), {}
    with noting_epochs(config, notes) as note:

        def on_epoch(metrics: dict[str, float], model: nn.Module) -> None:
            note(metrics, model)
            now = int(metrics["epoch"]) + 1
            if wanted:
                states[now] = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
            for epoch in [e for e in states if not wanted & {e, e - now - 1}]:
                del states[epoch]

        trained = train(config, data, seed, keep, on_epoch)
    files = _files(config, data, trained.model, trained.history)
    for epoch, state in states.items():
        trained.model.load_state_dict(state)
        own = _files(config, data, trained.model, trained.history[:epoch])
        files |= {f"{EPOCHS}/{epoch}/{name}": content for name, content in own.items()}
    return files


def _take_checkpoint(config: Config, data: ImageData, folder: Path) -> Files:
    """Return the files of a checkpoint that was trained elsewhere."""
    config = replace(config, train_layers="all")  # none of its layers is that of another model
    model = given.load(folder, data.class_names)
    memory_layout.place(model, resolve_device(config.device), config.image_size)
    return _files(config, data, model, [])


def _files(
    config: Config, data: ImageData, model: PreTrainedModel, history: list[dict[str, float]]
) -> Files:
    normalisation = model_facts.normalisation(config.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classifier.save(model, folder / "model", config.image_size, *normalisation)
        (folder / "history.json").write_text(json.dumps(history))
        logits = {split: predict(config, model, data, split) for split in SPLITS}
        np.savez(folder / "logits.npz", allow_pickle=False, **logits)
        return read_folder(folder)


def _read_checkpoint(folder: Path) -> Checkpoint:
    logits = dict(zip(SPLITS, read_arrays(folder / "logits.npz", SPLITS), strict=True))
    after = sorted(folder.glob(f"{EPOCHS}/*"), key=lambda path: int(path.name))
    epochs = tuple(map(_read_checkpoint, after))
    history = read_json(folder / "history.json")
    return Checkpoint(folder / "model", history, logits, epochs)


def _is_whole(folder: Path, config: Config, data: ImageData) -> bool:
    """Whether a folder holds a finished checkpoint of this data; a damaged folder is deleted."""
    if not folder.exists():
        return False
    try:
        run = _read_checkpoint(folder)
        wanted = [(len(data.rows(split)), len(data.class_names)) for split in SPLITS]
        fits = len(run.epochs) == len(config.epoch_numbers)
        for found in (run, *run.epochs):
            classifier.load(found.folder)
            fits &= [each.shape for each in found.logits.values()] == wanted
            fits &= all(np.isfinite(each).all() for each in found.logits.values())
        if fits:
            return True
    except Exception:  # numpy, json and zipfile raise many kinds on damaged files
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False
