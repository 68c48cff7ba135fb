"""Remove training examples, retrain, and compare: does it really change accuracy?"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("error: type python -m scripts.ablation, in the project's folder")

from attribution.cli.main import main

if __name__ == "__main__":  # before the imports that take seconds: --help needs none of them
    main("ablation")

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from attribution.cli import next_steps
from attribution.cli.outputs import save
from attribution.cli.plan import Estimate, retraining_estimate
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.experiments import comparison
from attribution.experiments.arms import count_trials, export_files
from attribution.experiments.comparison import Comparison
from attribution.experiments.evidence import gather_evidence
from attribution.experiments.metrics import headline
from attribution.experiments.names import ARM_SPECS
from attribution.models import given
from attribution.reporting import ablation_record, answer, terminal
from attribution.runtime.progress import say
from attribution.scores.artifact import load_scores
from attribution.scores.scored import Scored
from attribution.tracking.artifacts import address, artifact_path
from attribution.tracking.job import Job, Upstream
from attribution.tracking.links import arms_link
from attribution.tracking.record import Record
from attribution.tracking.run_lifecycle import experiment_of
from attribution.tracking.stage_runs import lineage


def check(config: Config, data: ImageData) -> None:
    """Refuse arms, shares, groups and contrasts that cannot be compared, before anything is trained."""
    given.check_start(config)
    comparison.check(config, data)


def estimate(config: Config, data: ImageData) -> Estimate:
    """How many models are retrained, at most, and how much their logits take."""
    n, test = (len(data.rows(split)) for split in ("train", "test"))
    models = config.num_seeds * count_trials(config, n)
    return retraining_estimate(config, models, n, work=4 * models * test * len(data.class_names))


def run(job: Job) -> Comparison:
    """Let every arm choose what to remove, retrain without it, and compare with random removal."""
    evidence = gather_evidence(job.config, job.data, job.result("trak").scores)
    return comparison.compare_arms(job.config, job.data, evidence, job.retrainings)


def record(job: Job, result: Comparison) -> Record:
    """The tables, the report, and a nested run for each arm."""
    return ablation_record.make(job, result)


@dataclass(frozen=True)
class EarlierComparison:
    """A comparison that an earlier command made, as far as it is shown again."""

    table: pd.DataFrame
    contrasts: pd.DataFrame


def load(run_id: str, config: Config, data: ImageData) -> EarlierComparison:
    """The result of an earlier run."""
    files = (artifact_path(run_id, f"{name}.csv") for name in ("comparison", "contrasts"))
    return EarlierComparison(*map(pd.read_csv, files))


def _exports(config: Config) -> dict[str, Path]:
    """The files that list what the exported arm keeps."""
    folder = Path(config.output or "cleaned").expanduser()
    return {name: folder / name for name in export_files(config)}


def outputs(config: Config) -> list[Path]:
    """The files that `show` writes outside MLflow."""
    report = [Path(config.output).expanduser() / "report.html"] if config.output else []
    return [*_exports(config).values(), *report]


def show(done: Upstream, config: Config, data: ImageData) -> None:
    """Print the comparison, save what was asked for, and say where to look at the rest."""
    if isinstance(done.result, Scored):  # no comparison is finished, and export_arm needs none
        print(f"trak run: {done.run_id}")
        _export(config, data, done, done.run_id)
        again = next_steps.command("ablation", config, trak_run_id=done.run_id)
        next_steps.say_next("To retrain without these images, and see what that changes:", again)
        return
    _, about_metric = headline(config, data.labels("train"), data.class_names)
    contrasts = answer.contrasts(done.result.contrasts)
    terminal.print_comparison(done.result.table, about_metric, contrasts)
    trak_id = lineage(done.run_id)["trak"]
    _export(config, data, done, trak_id)
    report = address(done.run_id, "report.html")
    if config.output:
        report = str(Path(config.output).expanduser() / "report.html")
        save(artifact_path(done.run_id, "report.html").read_bytes(), Path(report))
    print(f"ablation run: {done.run_id}")
    print(f"trak run: {trak_id}")
    print(f"scores: runs:/{trak_id}/scores")
    print(f"report: {report}")
    _say_next(done, config, trak_id)


def _export(config: Config, data: ImageData, done: Upstream, trak_id: str) -> None:
    """Save what the exported arm keeps, and say how to train on it."""
    if not config.export_arm:
        return
    if isinstance(done.result, Comparison):
        evidence = done.result.evidence
    else:  # an earlier command chose by them, or their matrix in hand is gone with unfinished work
        scores = load_scores(artifact_path(trak_id, "scores"))
        evidence = gather_evidence(config, data, scores)
    tables = comparison.exported(config, evidence)
    for name, file in _exports(config).items():
        save(tables[name].to_csv(index=False).encode(), file)
        files = {"keep": file, "export": "corrected"}
        train = next_steps.with_correction(config, **files)
        next_steps.say_next(
            f"{file} lists what {config.export_arm} keeps. To train on it, compare with training on "
            "everything, and write the kept images to a folder:",
            train,
        )


def _say_next(done: Upstream, config: Config, trak_id: str) -> None:
    """How to act on the result, and how to see more of it."""
    top = answer.best(done.result.table)
    is_list = top is not None and not ARM_SPECS[top["arm"]].is_drawn and top["action"] == "remove"
    if top is not None and is_list and top["arm"] != config.export_arm:
        flags = {"trak_run_id": trak_id, "export_arm": top["arm"]}
        again = next_steps.command("ablation", config, **flags)
        next_steps.say_next(f"To list the images that {top['arm']} keeps, for training:", again)
    else:
        suspects = address(trak_id, "suspects.html")
        if top is None:
            more = next_steps.advice(config, f"more seeds (--num_seeds {2 * config.num_seeds})")
            say(f"No arm is better than random removal. What may help: {more}.")
        next_steps.say_next("Images that a person should look at first:", suspects)
    link = arms_link(experiment_of(done.run_id), done.run_id)
    next_steps.say_next("To compare the arms in MLflow:", *next_steps.in_mlflow(link))
