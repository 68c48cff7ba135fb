"""Fine-tune an ensemble of checkpoints, each on its own random part of the training set."""

from __future__ import annotations

import dataclasses
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

    from attribution.models import checkpoints
    from attribution.reporting import figures

    checkpoints.check(config, data)
    work = stage_folder("finetune", config, data)
    found = checkpoints.finetune(config, data, work)

    for m, (folder, history) in enumerate(zip(found.folders, found.histories, strict=True)):
        mlflow.log_artifacts(str(folder), f"checkpoints/{m:03d}")
        stage_runs.log_series(
            [
                (f"checkpoint_{m:03d}/{name}", value, int(epoch["epoch"]))
                for epoch in history
                for name, value in epoch.items()
                if name != "epoch"
            ]
        )
    mlflow.log_metrics(found.members.metrics(data))
    with stage_runs.artifact_folder("training") as results:
        np.savez(results / "logits.npz", allow_pickle=False, **found.members.arrays())
        data.examples.to_parquet(results / "examples.parquet", index=False)
        figures.training_curves(found.histories, results / "curves.png")


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
