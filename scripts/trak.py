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
    import time

    import mlflow

    from attribution.experiments import statistics
    from attribution.models.ensemble import Ensemble, label_issues, label_quality
    from attribution.reporting import figures
    from attribution.runtime import parallel
    from attribution.scores import alignment, stored_features
    from attribution.scores.artifact import load_scores, write_scores
    from attribution.scores.features import featurize
    from attribution.scores.suspects import suspects
    from attribution.scores.trak import check_proj_dim, score

    check_proj_dim(config, len(data.rows("train")))
    parallel.ask(check_gradients, config, data.class_names)
    finetune_id = stage_runs.obtain("finetune", config, data, finetune.make)
    members = Ensemble.load(stage_runs.artifact_path(finetune_id, "training/logits.npz"))
    if not members.is_out_of_sample:
        say("trak: some examples were seen by every checkpoint: losses are in-sample")
    targets = data.table("validation").assign(
        loss=members.validation_loss(data.labels("validation"))
    )
    groups = alignment.group_ids(targets, "label")
    weights = alignment.group_weights(targets["loss"].to_numpy(), groups, "exp_loss")
    held_out = None
    if members.is_out_of_sample:
        held_out = alignment.held_out_weights(members.masks, data.labels("train"))
    # What others' checkpoints left is not gone on with.
    work = stage_folder("trak", config, data, finetune_id)
    start = time.monotonic()
    folders = finetune.checkpoint_folders(finetune_id, config.num_models)
    stores = featurize(config, data, folders, work)
    scores = score(config, stores, work / "scores.npy", held_out)
    seconds = time.monotonic() - start

    aligned = alignment.group_alignment(scores.values, groups, weights)
    trust = alignment.unweighted(aligned, scores.row_weight)
    if scores.held_out is not None:
        trust = scores.held_out
    probabilities = members.train_probabilities()
    train = data.table("train").assign(
        alignment=aligned,
        row_weight=scores.row_weight,
        trust=trust,
        self_influence=scores.self_influence,
        loss=members.train_loss(data.labels("train")),
        label_quality=label_quality(data.labels("train"), probabilities),
        predicted_label=probabilities.argmax(axis=1),
    )
    metadata = {
        "estimator": config.group("trak") | {"num_models": config.num_models},
        "estimator_version": ESTIMATOR_VERSION,
        "alignment": {"groups": "label", "group_weights": "exp_loss"},
        "loss_is_out_of_sample": members.is_out_of_sample,
        "fingerprint": fingerprint("trak", config, data),
        "data_fingerprint": data.fingerprint,
        "finetune_run_id": finetune_id,
    }
    with stage_runs.artifact_folder("scores") as folder:
        write_scores(folder, scores.file, train, targets, metadata)
        figures.score_gallery(data, load_scores(folder), folder / "gallery.png")
    issues = label_issues(data.labels("train"), probabilities)
    stage_runs.log_table(suspects(data, train, issues), "suspects")
    if stored_features.are_wanted(config, stores):
        with stage_runs.artifact_folder("features") as folder:
            stored_features.write_features(folder, stores, config)
    images = config.num_models * (len(train) + len(targets))
    mlflow.log_metrics(
        {
            "seconds": seconds,
            "milliseconds_per_gradient": 1000 * seconds / images,
            "share_negative_alignment": float((train["alignment"] < 0).mean()),
            **statistics.detection_metrics(
                train["is_flipped"].to_numpy(),
                {
                    "trust": train["trust"].to_numpy(),
                    "alignment": train["alignment"].to_numpy(),
                    "loss": -train["loss"].to_numpy(),
                    "label_quality": train["label_quality"].to_numpy(),
                    "self_influence": -train["self_influence"].to_numpy(),
                },
            ),
        }
    )


def check_gradients(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuse a model that has no gradient rule before its checkpoints are trained."""
    import torch

    from attribution.gradients import per_sample
    from attribution.models import classifier

    model = classifier.build(config.model, class_names, seed=0).eval()
    classifier.check_image_size(model, config.image_size)
    if config.projector == "sketch":
        size = (2, 3, config.image_size, config.image_size)
        per_sample.check(model, torch.randn(size, generator=torch.Generator().manual_seed(0)))


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
