"""Fine-tune an ensemble of checkpoints, each on its own random part of the training set."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("error: type python -m scripts.finetune, in the project's folder")

from attribution.cli.main import main

if __name__ == "__main__":  # before the imports that take seconds: --help needs none of them
    main("finetune")

from pathlib import Path

import numpy as np

from attribution.cli import next_steps
from attribution.cli.plan import Estimate
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.models import checkpoints
from attribution.models.checkpoints import Finetuned
from attribution.models.ensemble import Ensemble
from attribution.models.model_facts import parameter_count
from attribution.reporting import figures
from attribution.runtime.progress import say
from attribution.tracking.artifacts import address, artifact_path
from attribution.tracking.job import Job, Upstream
from attribution.tracking.record import Record

LOGITS = "training/logits.npz"


def check(config: Config, data: ImageData) -> None:
    """Refuse what cannot be trained, before anything is."""
    checkpoints.check(config, data)


def estimate(config: Config, data: ImageData) -> Estimate:
    """How much is trained, and written."""
    n, targets, test = (len(data.rows(split)) for split in SPLITS)
    share = max(1, round(config.subset_fraction * n))
    most = "at most " if config.patience else ""
    weights = 4 * parameter_count(config.model, len(data.class_names))
    logits = 8 * (n + targets + test) * len(data.class_names)
    size = config.num_models * (weights + logits)
    return Estimate(
        f"{config.num_models} checkpoints, {most}{config.epochs} epochs of {share:,} images",
        trained=config.num_models * config.epochs * share,
        tasks=config.num_models,
        work=size,
        kept=size,
    )


def run(job: Job) -> Finetuned:
    """Draw each checkpoint's part of the training set, then train the checkpoints."""
    return checkpoints.finetune(job.config, job.data, job.stage_folder("finetune"))


def record(job: Job, result: Finetuned) -> Record:
    """Weights, masks, logits and learning curves."""

    def write(folder: Path) -> None:
        training = folder / "training"
        training.mkdir()
        np.savez(training / "logits.npz", allow_pickle=False, **result.members.arrays())
        job.data.examples.to_parquet(training / "examples.parquet", index=False)
        figures.save(figures.training_curves(result.histories), training / "curves.png")

    return Record(
        metrics=result.members.metrics(job.data),
        series=[
            (f"checkpoint_{m:03d}/{name}", value, int(epoch["epoch"]))
            for m, history in enumerate(result.histories)
            for epoch in history
            for name, value in epoch.items()
            if name != "epoch"
        ],
        folders={f"checkpoints/{m:03d}": folder for m, folder in enumerate(result.folders)},
        write=write,
    )


def load(run_id: str, config: Config, data: ImageData) -> Finetuned:
    """The result of an earlier run."""
    logits, folder = (artifact_path(run_id, p) for p in (LOGITS, "checkpoints"))
    return Finetuned.load(logits, folder, config.num_models)


def outputs(config: Config) -> list[Path]:
    """The files that `show` writes outside MLflow: none."""
    return []


def show(done: Upstream, config: Config, data: ImageData) -> None:
    """Print the ensemble's validation metrics and the next command."""
    metrics = done.result.members.metrics(data)
    for name in ("validation_accuracy_mean", "ensemble_validation_accuracy"):
        print(f"{name}: {metrics[name]:.4f}")
    print(f"finetune run: {done.run_id}")
    best = done.result.members.best(data.labels("validation"))
    print(f"best model: {address(done.run_id, f'checkpoints/{best:03d}')}")
    again = next_steps.command("trak", config, finetune_run_id=done.run_id)
    next_steps.say_next("To score the training examples with these checkpoints:", again)


def warn_of_other_checkpoints(job: Job) -> None:
    """Say so if the checkpoints in hand are not those that the trak run scored."""
    scored = job.result("trak").scores.metadata["finetune_run_id"]
    used = job.upstream["finetune"]
    if used.run_id == scored:
        return
    try:
        logits = Ensemble.load(artifact_path(scored, LOGITS)).train_logits
        if np.array_equal(logits, used.result.members.train_logits):
            return
    except InputError:  # nothing is left to compare with
        pass
    say(
        f"finetune: the checkpoints of run {used.run_id} differ from those that trak run "
        f"{job.upstream['trak'].run_id} scored (another jobs or device?): the results mix both"
    )
