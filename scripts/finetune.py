"""Fine-tune an ensemble of checkpoints, each on its own random part of the training set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.cli.command import main
from attribution.errors import InputError
from attribution.runtime.progress import say
from attribution.tracking import stage_runs
from attribution.tracking.fingerprint import stage_folder

if TYPE_CHECKING:
    from attribution.config import Config
    from attribution.data.dataset import ImageData


def make(config: Config, data: ImageData) -> None:
    """Train every checkpoint and log weights, masks, logits and curves to the active run."""
    import mlflow
    import numpy as np

    from attribution.models import classifier, ensemble
    from attribution.reporting import figures
    from attribution.runtime import parallel

    parallel.ask(classifier.check, config.model, data.class_names, config.image_size)
    check_subset_fraction(config, len(data.rows("train")))
    work = stage_folder("finetune", config, data)
    masks = ensemble.subset_masks(
        len(data.rows("train")), config.num_models, config.subset_fraction, config.seed
    )
    checkpoints = ensemble.train_checkpoints(config, data, masks, work)

    for m, checkpoint in enumerate(checkpoints):
        mlflow.log_artifacts(str(checkpoint.folder), f"checkpoints/{m:03d}")
        stage_runs.log_series(
            [
                (f"checkpoint_{m:03d}/{name}", value, int(epoch["epoch"]))
                for epoch in checkpoint.history
                for name, value in epoch.items()
                if name != "epoch"
            ]
        )
    members = ensemble.Ensemble.of(masks, checkpoints)
    mlflow.log_metrics(members.metrics(data))
    with stage_runs.artifact_folder("training") as folder:
        np.savez(folder / "logits.npz", allow_pickle=False, **members.arrays())
        data.examples.to_parquet(folder / "examples.parquet", index=False)
        figures.training_curves([c.history for c in checkpoints], folder / "curves.png")


def check_subset_fraction(config: Config, n: int) -> None:
    """Refuse parts too small to train on, before anything is trained.

    Raises:
        InputError: fewer than two of n training examples for a checkpoint.
    """
    if config.subset_fraction * n < 2:
        raise InputError(
            f"subset_fraction={config.subset_fraction:g}: a checkpoint needs 2 of the {n} training "
            f"examples; use {math.ceil(2000 / n) / 1000:g} or more"
        )


def show(run_id: str, config: Config) -> None:
    """Print the ensemble's validation metrics and what to type next."""
    import mlflow

    metrics = mlflow.get_run(run_id).data.metrics
    for name in ("validation_accuracy_mean", "ensemble_validation_accuracy"):
        print(f"{name}: {metrics[name]:.4f}")
    print(f"finetune run: {run_id}")
    say(f"next: python -m scripts.trak --finetune_run_id {run_id}")


def obtain_of(trak_id: str, config: Config, data: ImageData) -> str:
    """The run whose checkpoints a trak run scored; where they are gone, one that trains them anew.

    The active run is tagged with it. Others than then, as under another number of jobs, are told. A
    run that the caller names is taken at their word.
    """
    own = stage_runs.run_tags(trak_id)["finetune_run_id"]
    if not config.finetune_run_id and stage_runs.is_whole("finetune", own, config):
        config = dataclasses.replace(config, finetune_run_id=own)
    found = stage_runs.obtain("finetune", config, data, make)
    if found != own and not _are_alike(own, found):
        say(
            f"finetune: the checkpoints of run {found} are others than those that trak run {trak_id} "
            "scored (another jobs or device?): what follows is of both"
        )
    return found


def _are_alike(*run_ids: str) -> bool:
    """Whether the checkpoints of two runs say the same of every training example, as far as is kept."""
    import numpy as np

    from attribution.models.ensemble import Ensemble

    try:
        files = [stage_runs.artifact_path(run_id, "training/logits.npz") for run_id in run_ids]
        then, now = (Ensemble.load(file).train_logits for file in files)
    except InputError:
        return False
    return np.array_equal(then, now)


def checkpoint_folders(run_id: str, num_models: int) -> list[Path]:
    """The from_pretrained folders of a finetune run, in order."""
    root = stage_runs.artifact_path(run_id, "checkpoints")
    return [root / f"{m:03d}" for m in range(num_models)]


if __name__ == "__main__":
    main("finetune", make, show)
