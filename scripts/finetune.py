"""Fine-tune an ensemble of checkpoints, each on its own random part of the training set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attribution import tracking
from attribution.command import main

if TYPE_CHECKING:
    from attribution.config import Config
    from attribution.data import ImageData


def make(config: Config, data: ImageData) -> None:
    """Train every checkpoint and log weights, masks, logits and curves to the active run."""
    import mlflow
    import numpy as np

    from attribution import ensemble, models, plots

    models.check_image_size(models.build(config.model, data.class_names, seed=0), config.image_size)
    work = tracking.stage_folder("finetune", config, data)
    masks = ensemble.subset_masks(
        len(data.rows("train")), config.num_models, config.subset_fraction, config.seed
    )
    checkpoints = ensemble.train_checkpoints(config, data, masks, work)

    for m, checkpoint in enumerate(checkpoints):
        mlflow.log_artifacts(str(checkpoint.folder), f"checkpoints/{m:03d}")
        tracking.log_series(
            [
                (f"checkpoint_{m:03d}/{name}", value, int(epoch["epoch"]))
                for epoch in checkpoint.history
                for name, value in epoch.items()
                if name != "epoch"
            ]
        )
    members = ensemble.Ensemble.of(masks, checkpoints)
    mlflow.log_metrics(members.metrics(data))
    with tracking.artifact_folder("training") as folder:
        np.savez(folder / "logits.npz", allow_pickle=False, **members.arrays())
        data.examples.to_parquet(folder / "examples.parquet", index=False)
        plots.training_curves([c.history for c in checkpoints], folder / "curves.png")


def show(run_id: str, config: Config) -> None:
    """Print the ensemble's validation metrics and what to type next."""
    import mlflow

    metrics = mlflow.get_run(run_id).data.metrics
    for name in ("validation_accuracy_mean", "ensemble_validation_accuracy"):
        print(f"{name}: {metrics[name]:.4f}")
    print(f"finetune run: {run_id}")
    tracking.say(f"next: python -m scripts.trak --finetune_run_id {run_id}")


def checkpoint_folders(run_id: str, num_models: int) -> list[Path]:
    """The from_pretrained folders of a finetune run, in order."""
    root = tracking.artifact_path(run_id, "checkpoints")
    return [root / f"{m:03d}" for m in range(num_models)]


if __name__ == "__main__":
    main("finetune", make, show)
