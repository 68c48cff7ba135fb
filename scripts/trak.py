"""Score how much each training example helps or hurts each validation example (TRAK)."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("error: type python -m scripts.trak, in the project's folder")

from attribution.cli.main import main

if __name__ == "__main__":  # before the imports that take seconds: --help needs none of them
    main("trak")

from pathlib import Path

from attribution.cli import next_steps
from attribution.cli.plan import Estimate
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.experiments.statistics import detection_metrics
from attribution.models.cross_fit import FOLDS, REPEATS
from attribution.reporting import figures, html
from attribution.runtime.progress import say
from attribution.scores import scored, stored_features
from attribution.scores.scored import Scored
from attribution.tracking.artifacts import address, artifact_path
from attribution.tracking.fingerprint import ESTIMATOR_VERSION, fingerprint
from attribution.tracking.job import Job, Upstream
from attribution.tracking.record import Record


def check(config: Config, data: ImageData) -> None:
    """Refuse settings and models that cannot be scored, before anything is trained."""
    scored.check(config, data)


def estimate(config: Config, data: ImageData) -> Estimate:
    """How many gradients are computed, and how much is written."""
    n, targets, test = (len(data.rows(split)) for split in SPLITS)
    length, models = config.proj_dim * config.num_blocks, config.num_checkpoints
    scores, features = 4 * n * targets, models * n * length
    stored = 2 * features if stored_features.are_wanted(config, features) else 0
    # Features of all splits, then each checkpoint's factors and whitened targets.
    work = 4 * models * length * (n + 2 * targets + test + config.proj_dim)
    images, pooled = models * (n + targets + test), n + targets + test
    what, trainings = f"{images:,} gradients and their scores", 0
    if config.cross_fit == "yes":
        trainings = FOLDS * REPEATS
        what += f", {trainings} models of all images but a fifth"
    return Estimate(
        what,
        trained=trainings * config.epochs * pooled * (1 - 1 / FOLDS),
        gradients=images,
        tasks=max(3 * models, trainings),
        retrains=True,
        work=work + scores + stored + 4 * trainings * pooled * len(data.class_names),
        kept=scores + stored,
    )


def run(job: Job) -> Scored:
    """Project the gradients of every example under each checkpoint, and combine them to scores."""
    run_id = job.upstream["finetune"].run_id
    origin = {
        "estimator_version": ESTIMATOR_VERSION,
        "fingerprint": fingerprint("trak", job.config, job.data),
        "finetune_run_id": run_id,
    }
    # Unfinished features of other checkpoints are of no use.
    work = job.stage_folder("trak", run_id)
    return scored.score_training_set(job.config, job.data, job.result("finetune"), work, origin)


def record(job: Job, result: Scored) -> Record:
    """The score artifact, a gallery, the suspects, and how well known flips are found."""

    def write(folder: Path) -> None:
        result.write(folder)
        gallery = figures.score_gallery(job.data, result.scores)
        figures.save(gallery, folder / "scores" / "gallery.png")
        name = Path(job.config.dataset).name
        page = html.suspects(job.data, result.suspects, name, _correct(job.config))
        (folder / "suspects.html").write_text(page, encoding="utf-8")

    is_flipped = result.scores.train["is_flipped"].to_numpy()
    return Record(
        metrics=result.metrics() | detection_metrics(is_flipped, result.rankings()),
        tables={"suspects": result.suspects},
        folders={"features": result.features.folder} if result.features else {},
        write=write,
    )


def _correct(config: Config) -> str:
    """The command that trains on the result of suspects.html, and exports it."""
    files = {"keep": "keep.csv", "labels": "labels.csv", "export": "corrected"}
    return next_steps.with_correction(config, **files)


def load(run_id: str, config: Config, data: ImageData) -> Scored:
    """The result of an earlier run."""
    return Scored.load(artifact_path(run_id, "scores"), artifact_path(run_id, "suspects.csv"))


def outputs(config: Config) -> list[Path]:
    """The files that `show` writes outside MLflow: none."""
    return []


def show(done: Upstream, config: Config, data: ImageData) -> None:
    """Print where the scores are, how to read them, and the next command."""
    result: Scored = done.result
    train = result.scores.train
    metrics = detection_metrics(train["is_flipped"].to_numpy(), result.rankings())
    metrics["share_negative_alignment"] = float((train["alignment"] < 0).mean())
    for name in ("flips_auroc_trust", "flips_auroc_loss", "share_negative_alignment"):
        if name in metrics:
            print(f"{name}: {metrics[name]:.4f}")
    print(
        f"suspects: {len(result.suspects)} of {len(data.examples)} images to check, the most doubtful first"
    )
    print(f"trak run: {done.run_id}")
    print(f'scores: attribution.load_scores("runs:/{done.run_id}/scores")')
    accuracy = float((train["predicted_label"] == train["label"]).mean())
    if accuracy < (1 + 1 / len(data.class_names)) / 2:  # half of the way from chance to 1
        more = next_steps.advice(config, f"more models (--num_models {2 * config.num_models})")
        say(
            f"The models are right about {accuracy:.0%} of the training images, and scores of weak "
            f"models say little. What may help: {more}."
        )
    page = address(done.run_id, "suspects.html")
    next_steps.say_next(
        "To look at the suspects, choose what to keep and to relabel, and download keep.csv and "
        "labels.csv, open:",
        page,
    )
    next_steps.say_next(
        "Then, with both files in this folder, to train with and without the corrections, and write "
        "the corrected data set to a folder:",
        _correct(config),
    )
    again = next_steps.command("ablation", config, trak_run_id=done.run_id)
    next_steps.say_next("To remove examples by these scores, and see what that changes:", again)
