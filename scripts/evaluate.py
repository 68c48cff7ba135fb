"""Is the attribution right? Scores against models that were really retrained on random subsets."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("error: type python -m scripts.evaluate, in the project's folder")

from attribution.cli.main import main

if __name__ == "__main__":  # before the imports that take seconds: --help needs none of them
    main("evaluate")

from pathlib import Path

import pandas as pd

from attribution.cli.plan import Estimate, retraining_estimate
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.experiments import evaluation
from attribution.experiments.evaluation import Evaluation
from attribution.experiments.methods import FEATURISING, Subject
from attribution.experiments.names import METHOD_WORDS
from attribution.experiments.subset_bank import Bank, load_bank
from attribution.models import given
from attribution.reporting import figures, terminal
from attribution.runtime.progress import say
from attribution.tracking.artifacts import artifact_path, has_artifact
from attribution.tracking.job import Job, Upstream
from attribution.tracking.record import Record
from attribution.tracking.stage_runs import NOTE
from scripts.finetune import warn_of_other_checkpoints


def check(config: Config, data: ImageData) -> None:
    """Refuse methods, subsets and banks that cannot be judged by, before anything is trained."""
    given.check_start(config)
    evaluation.check(config, data)
    _named_bank(config, data)


def _named_bank(config: Config, data: ImageData) -> Bank | None:
    """The bank that the caller names, if any."""
    return load_bank(config.bank, config, data) if config.bank else None


def estimate(config: Config, data: ImageData) -> Estimate:
    """How many models are retrained, at most, and how much is written."""
    n, targets = (len(data.rows(split)) for split in ("train", "validation"))
    bank, brittle = evaluation.count_retrainings(config)
    size = (bank * config.alpha + brittle) * n / max(1, bank + brittle)
    kept = bank * targets * (4 * len(data.class_names) + 8)
    matrices = sum(name not in ("loss", "confident", "random") for name in config.method_names)
    work, gradients = kept + matrices * 4 * n * targets, 0
    if FEATURISING.intersection(config.method_names):
        gradients = config.num_checkpoints * (n + targets)
        length = config.proj_dim * config.num_blocks
        work += 4 * config.num_checkpoints * length * (n + 2 * targets + config.proj_dim)
    return retraining_estimate(config, bank + brittle, round(size), gradients, work, kept)


def run(job: Job) -> Evaluation:
    """Retrain models on random subsets, and judge every method by them."""
    warn_of_other_checkpoints(job)
    subject = Subject(
        job.config,
        job.data,
        job.result("finetune").folders,
        job.result("trak").scores,
        work=job.stage_folder("evaluate", job.upstream["finetune"].run_id),
    )
    return evaluation.evaluate(subject, _named_bank(job.config, job.data), job.retrainings)


def record(job: Job, result: Evaluation) -> Record:
    """The tables, the bank, and a nested run for each method."""

    def write(folder: Path) -> None:
        (folder / "bank").mkdir()
        if result.bank:
            result.bank.save(folder / "bank", job.config, job.data)
        figure = figures.evaluation(result.table, result.brittleness)
        figures.save(figure, folder / "evaluation.png")

    tables = {"evaluation": result.table, "brittleness": result.brittleness}
    return Record(
        tables={name: table for name, table in tables.items() if table is not None},
        write=write,
        children=[_method(row) for _, row in result.table.iterrows()],
    )


def _method(row: pd.Series) -> Record:
    """The nested run of one method."""
    name = row["method"]
    figures = row.drop("method").dropna().astype(float)
    return Record(
        name=name,
        tags={"stage": "evaluate_method", "method": name, NOTE: METHOD_WORDS[name]},
        params={"method": name},
        metrics=figures.to_dict(),
    )


def load(run_id: str, config: Config, data: ImageData) -> Evaluation:
    """The result of an earlier run, without its bank."""
    brittle = None
    if has_artifact(run_id, "brittleness.csv"):
        brittle = pd.read_csv(artifact_path(run_id, "brittleness.csv"))
    return Evaluation(pd.read_csv(artifact_path(run_id, "evaluation.csv")), brittle)


def outputs(config: Config) -> list[Path]:
    """The files that `show` writes outside MLflow: none."""
    return []


def show(done: Upstream, config: Config, data: ImageData) -> None:
    """Print the table of methods, and what removal did to single targets."""
    terminal.print_evaluation(done.result.table)
    if done.result.brittleness is not None:
        terminal.print_brittleness(done.result.brittleness)
    print(f"evaluate run: {done.run_id}")
    print(f"bank: runs:/{done.run_id}/bank")
    say("--bank takes it for other scores of the same data")
