"""What a finetune run leaves in MLflow: models, masks, logits and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.models import checkpoints
from attribution.models.checkpoints import Finetuned, checkpoint_name
from attribution.reporting import figures
from attribution.tracking.job import Job
from attribution.tracking.logged_models import TrainedModel
from attribution.tracking.record import Record
from attribution.tracking.stage_runs import NOTE

BEST = {"best": "validation loss", NOTE: "The lowest validation loss of this run's checkpoints."}

GIVEN_NOTE = """\
Checkpoints that were trained elsewhere (parameter `checkpoints`), as they were found: each one is a model
of this run. What they were trained on is not known; every training example counts as seen.
"""


def make(job: Job, result: Finetuned) -> Record:
    """The record of a finetune run."""

    def write(folder: Path) -> None:
        training = folder / "training"
        training.mkdir()
        np.savez(training / "logits.npz", allow_pickle=False, **result.members.arrays())
        job.data.examples.to_parquet(training / "examples.parquet", index=False)
        histories = [run.history for run in result.runs]
        if any(histories):
            figures.save(figures.training_curves(histories), training / "curves.png")

    is_given = bool(job.config.checkpoints)
    return Record(
        tags={"source": "given"} if is_given else {},
        metrics=result.members.metrics(job.data) | result.test,
        series=[
            (f"{checkpoints.run_name(job.config, r)}/{name}", value, int(epoch["epoch"]))
            for r, run in enumerate(result.runs)
            for epoch in run.history
            for name, value in epoch.items()
            if name != "epoch"
        ],
        models=_models(job.data, result, origins(job.config, result)),
        write=write,
        note=(lambda _: GIVEN_NOTE) if is_given else None,
    )


def _models(
    data: ImageData, result: Finetuned, origins: Sequence[dict[str, str]]
) -> dict[str, TrainedModel]:
    """The checkpoints by name, with tags of their origins and one for the best on validation."""
    labels = data.labels("validation")
    best, found = result.members.best(labels), {}
    for m, metrics in enumerate(result.members.metrics_of_each(labels)):
        name = checkpoint_name(m)
        shown = {f"validation_{key}": value for key, value in metrics.items()}
        if f"{name}/test_accuracy" in result.test:
            shown["test_accuracy"] = result.test[f"{name}/test_accuracy"]
        tags = origins[m] | (BEST if m == best else {})
        found[name] = TrainedModel(result.folders[m], shown, tags)
    return found


def origins(config: Config, result: Finetuned) -> list[dict[str, str]]:
    """Tags of each checkpoint: the folder of a given one, or run (from 0), epoch (from 1) and patience's best epoch."""
    if config.checkpoints:
        return [{"folder": folder} for folder in config.given_folders]
    if not config.checkpoint_epochs:
        return [{} for _ in result.folders]
    found = []
    for r, run in enumerate(result.runs):
        tags = {"training_run": f"{r}"}
        if config.patience:
            losses = [epoch["validation_log_loss"] for epoch in run.history]
            tags["best_epoch"] = f"{1 + int(np.argmin(losses))}"
        found += [tags | {"epoch": f"{len(each.history)}"} for each in run.epochs]
    return found
