"""Fine-tune an ensemble of checkpoints, each on its own random part of the training set."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("error: type python -m scripts.finetune, in the project's folder")

from attribution.cli.main import main

if __name__ == "__main__":  # before the imports that take seconds: --help needs none of them
    main("finetune")

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np

from attribution.cli import next_steps
from attribution.cli.plan import Estimate
from attribution.config import Config
from attribution.data import export
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.experiments import cleaning
from attribution.models import checkpoints
from attribution.models.checkpoints import Finetuned, checkpoint_name
from attribution.models.ensemble import Ensemble
from attribution.models.model_facts import parameter_count
from attribution.reporting import finetune_record
from attribution.runtime.progress import say
from attribution.tracking.artifacts import address, artifact_path
from attribution.tracking.job import Job, Upstream
from attribution.tracking.record import Record

LOGITS = "training/logits.npz"


def check(config: Config, data: ImageData) -> None:
    """Refuse what cannot be trained, before anything is."""
    checkpoints.check(config, data)
    export.check(config, data)


def estimate(config: Config, data: ImageData) -> Estimate:
    """How much is trained, and written."""
    n, targets, test = (len(data.rows(split)) for split in SPLITS)
    share = max(1, round(config.subset_fraction * n))
    most = "at most " if config.patience else ""
    weights = 4 * parameter_count(config.model, len(data.class_names))
    logits = 8 * (n + targets + test) * len(data.class_names)
    kept = config.num_checkpoints * (weights + logits)
    if config.checkpoints:
        images = config.num_models * (n + targets + test)
        what = f"{config.num_models} checkpoints as they are given, {images:,} predictions"
        return Estimate(what, images / 3, tasks=config.num_models, work=kept, kept=kept)
    trainings, also = config.num_models, ""
    if cleaning.is_measured(config):
        trainings, also = 2 * trainings, ", twice: with keep and labels, and without"
    work = trainings * (weights + logits)  # of final weights
    what = f"{config.num_checkpoints} checkpoints"
    if config.checkpoint_epochs:
        what, work = f"{what} ({config.checkpoints_per_run} per training run)", work + kept
    return Estimate(
        f"{what}, {most}{config.epochs} epochs of {share:,} images{also}",
        trained=trainings * config.epochs * share,
        tasks=trainings,
        work=work,
        kept=kept,
    )


def run(job: Job) -> Finetuned:
    """Draw each model's part of the training set, then train the models."""
    work = job.stage_folder("finetune")
    found = checkpoints.finetune(job.config, job.data, work)
    if not cleaning.is_measured(job.config):
        return found
    test = cleaning.test_metrics(job.config, job.data, found.runs, work / "uncleaned")
    return replace(found, test=test)


def record(job: Job, result: Finetuned) -> Record:
    """Weights, masks, logits and learning curves."""
    return finetune_record.make(job, result)


def load(run_id: str, config: Config, data: ImageData) -> Finetuned:
    """The result of an earlier run."""
    folders = [artifact_path(run_id, checkpoint_name(m)) for m in range(config.num_checkpoints)]
    metrics = mlflow.get_run(run_id).data.metrics
    test = {name: value for name, value in metrics.items() if name.startswith("test_")}
    return Finetuned(Ensemble.load(artifact_path(run_id, LOGITS), data), folders, test=test)


def outputs(config: Config) -> list[Path]:
    """The files that `show` writes outside MLflow: none. The folder `export` has rules of its own."""
    if config.export:
        export.target(config)
    return []


def show(done: Upstream, config: Config, data: ImageData) -> None:
    """Print the ensemble's validation metrics, export the data if asked to, and say what is next."""
    metrics = done.result.members.metrics(data)
    for name in ("validation_accuracy_mean", "ensemble_validation_accuracy"):
        print(f"{name}: {metrics[name]:.4f}")
    if done.result.test:
        print(*cleaning.sentences(done.result.test, config, len(data.rows("train"))), sep="\n")
        ends = [done.result.test.get(f"{cleaning.CHANGE}_ci_{end}", 0) for end in ("low", "high")]
        if min(ends) < 0 < max(ends):
            more = next_steps.advice(config, f"more models (--num_models {2 * config.num_models})")
            say(f"The interval holds zero: no effect is certain. What may help: {more}.")
    print(f"finetune run: {done.run_id}")
    best = checkpoint_name(done.result.members.best(data.labels("validation")))
    print(f"best model: {address(done.run_id, best)}")
    print(f"best model in MLflow: runs:/{done.run_id}/{best}")
    if config.export:
        table = export.write(config, data)
        changed = (table["label"] != table["given_label"]).sum()
        print(f"export: {len(table)} images, {changed} labels changed, in {config.export}")
    elif done.result.test:
        again = next_steps.command("finetune", config, export="corrected")
        next_steps.say_next("To write the corrected data set to a folder:", again)
    again = next_steps.command("trak", config, finetune_run_id=done.run_id)
    next_steps.say_next("To score the training examples with these checkpoints:", again)


def warn_of_other_checkpoints(job: Job) -> None:
    """Say so if the checkpoints in hand are not those that the trak run scored."""
    scored = job.result("trak").scores.metadata["finetune_run_id"]
    used = job.upstream["finetune"]
    if used.run_id == scored:
        return
    with suppress(InputError):  # raised where nothing is left to compare with
        logits = Ensemble.load(artifact_path(scored, LOGITS), job.data).train_logits
        if np.array_equal(logits, used.result.members.train_logits):
            return
    say(
        f"finetune: the checkpoints of run {used.run_id} differ from those that trak run "
        f"{job.upstream['trak'].run_id} scored (another jobs or device?): the results mix both"
    )
