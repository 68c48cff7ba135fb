"""Score how much each training example helps or hurts each validation example (TRAK)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attribution.cli.command import main
from attribution.runtime.progress import say
from attribution.tracking import stage_runs
from attribution.tracking.fingerprint import ESTIMATOR_VERSION, fingerprint, stage_folder
from scripts import finetune

if TYPE_CHECKING:
    from attribution.config import Config
    from attribution.data.dataset import ImageData


def make(config: Config, data: ImageData) -> None:
    """Find or train the checkpoints, score them, and log the score artifact to the active run."""
    import mlflow

    from attribution.experiments import statistics
    from attribution.models.ensemble import Ensemble
    from attribution.reporting import figures
    from attribution.runtime import parallel
    from attribution.scores.scored import score_training_set
    from attribution.scores.trak import check_gradients, check_proj_dim

    check_proj_dim(config, len(data.rows("train")))
    parallel.ask(check_gradients, config, data.class_names)
    finetune_id = stage_runs.obtain("finetune", config, data, finetune.make)
    members = Ensemble.load(stage_runs.artifact_path(finetune_id, "training/logits.npz"))
    folders = finetune.checkpoint_folders(finetune_id, config.num_models)
    # What others' checkpoints left is not gone on with.
    work = stage_folder("trak", config, data, finetune_id)
    origin = {
        "estimator_version": ESTIMATOR_VERSION,
        "fingerprint": fingerprint("trak", config, data),
        "finetune_run_id": finetune_id,
    }
    scored = score_training_set(config, data, members, folders, work, origin)
    with stage_runs.artifact_folder() as folder:
        scores = scored.write(folder, config).scores
        figures.score_gallery(data, scores, folder / "scores" / "gallery.png")
    stage_runs.log_table(scored.suspects, "suspects")
    is_flipped = scores.train["is_flipped"].to_numpy()
    mlflow.log_metrics(scored.metrics())
    mlflow.log_metrics(statistics.detection_metrics(is_flipped, scored.rankings()))


def show(run_id: str, config: Config) -> None:
    """Print where the scores are, how to read them, and what to type next."""
    import mlflow
    import pandas as pd

    metrics = mlflow.get_run(run_id).data.metrics
    for name in ("flips_auroc_trust", "flips_auroc_loss", "share_negative_alignment"):
        if name in metrics:
            print(f"{name}: {metrics[name]:.4f}")
    table = pd.read_csv(stage_runs.artifact_path(run_id, "suspects.csv"))
    print(f"suspects.csv: {len(table)} training examples to look at, the most doubtful first")
    print(f"trak run: {run_id}")
    print(f'scores: attribution.load_scores("runs:/{run_id}/scores")')
    say(f"next: python -m scripts.ablation --trak_run_id {run_id} --frac 0.05")


if __name__ == "__main__":
    main("trak", make, show)
