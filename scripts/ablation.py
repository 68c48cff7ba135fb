"""Remove training examples, retrain, and compare: does it really change accuracy?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attribution.cli import outputs
from attribution.cli.command import main
from attribution.errors import InputError
from attribution.reporting import mlflow_notes
from attribution.runtime.progress import say
from attribution.tracking import stage_runs
from attribution.tracking.fingerprint import work_folder
from attribution.tracking.run_lifecycle import current_run, nested_runs, open_run
from scripts import trak

if TYPE_CHECKING:
    import pandas as pd

    from attribution.config import Config
    from attribution.data.dataset import ImageData
    from attribution.experiments.comparison import Comparison, Outcome
    from attribution.reporting.ablation_html import Removed

NOTED = 40  # arms in the note of a run: MLflow cuts off what is longer than 8,000 characters


def make(config: Config, data: ImageData) -> None:
    """Find or compute scores, retrain every arm over paired seeds, and log the comparison."""
    import mlflow

    from attribution.experiments import comparison
    from attribution.experiments.evidence import gather_evidence
    from attribution.reporting import ablation_html
    from attribution.reporting import figures as plots
    from attribution.runtime import machine
    from attribution.scores.artifact import load_scores

    comparison.check(config, data)
    trak_id = stage_runs.obtain("trak", config, data, trak.make)
    scores = load_scores(stage_runs.artifact_path(trak_id, "scores"))
    evidence = gather_evidence(config, data, scores)
    work = work_folder(config, "retrainings")
    found = comparison.compare_arms(config, data, scores, evidence, work)
    table, classes = found.table, found.per_class
    removed = [
        log_trial(outcome, verdict, data, found)
        for outcome, verdict in zip(found.outcomes, table["verdict"], strict=True)
    ]
    stage_runs.log_table(table, "comparison")
    stage_runs.log_table(classes, "per_class")
    with stage_runs.artifact_folder() as folder:
        figures = {"comparison": folder / "comparison.png"}
        plots.comparison(table, figures["comparison"])
        plots.removal_curves(table, folder / "curves.png")
        if len(config.fracs) > 1:  # of one share a curve shows nothing
            figures["curves"] = folder / "curves.png"
        page = ablation_html.page(
            config,
            data,
            table,
            classes,
            [each for each in removed if each.arm != "none"],
            figures,
            known_quality(trak_id),
            stage_runs.lineage(current_run().run_id),
            machine.hardware(),
        )
        (folder / "report.html").write_text(page, encoding="utf-8")
    mlflow.set_tag(mlflow_notes.NOTE, describe(table, trak_id))
    stage_runs.save_arms_view()


def known_quality(trak_id: str) -> pd.DataFrame | None:
    """The table of the last `evaluate` of these scores, if there was one."""
    import pandas as pd

    run_id = stage_runs.newest("evaluate", {"trak_run_id": trak_id})
    try:
        return pd.read_csv(stage_runs.artifact_path(run_id, "evaluation.csv")) if run_id else None
    except InputError as error:  # nothing was built on it
        say(f"ablation: {error}")
        return None


def log_trial(outcome: Outcome, verdict: str, data: ImageData, found: Comparison) -> Removed:
    """One nested run: what the arm removed (which is returned), per-seed test metrics, their summary."""
    import mlflow

    from attribution.experiments import arms as removal
    from attribution.reporting import figures as plots
    from attribution.reporting.ablation_html import Removed

    trial = outcome.trial
    with open_run(run_name=trial.name, nested=True):
        note = (
            f"{mlflow_notes.first_line(removal.ARMS[trial.arm])}\n\n{verdict}; {mlflow_notes.ARM}"
        )
        tags = {
            "stage": "ablation_arm",
            "arm": trial.arm,
            "verdict": verdict,
            mlflow_notes.NOTE: note,
        }
        mlflow.set_tags(tags)
        mlflow.log_params(
            {
                "arm": trial.arm,
                "frac": f"{trial.frac:.6g}",
                "action": trial.action,
                "n_removed": len(trial.removed[0]),
            }
        )
        stage_runs.log_series(
            [
                (name, value, seed)
                for name, values in outcome.per_seed.items()
                for seed, value in enumerate(values)
            ]
        )
        mlflow.log_metrics(outcome.summary)
        table, counts = found.removed(trial), found.removal_metrics(trial)
        mlflow.log_metrics({stage_runs.metric_name(name): v for name, v in counts.items()})
        # Of `none` too: MLflow's comparison page breaks where one of the runs has no artifact.
        with stage_runs.artifact_folder() as folder:
            table.to_parquet(folder / "removed.parquet", index=False)
            if trial.arm not in ("none", *removal.DRAWN) and trial.action == "remove":
                removal.kept_table(trial, found.train).to_csv(folder / "kept.csv", index=False)
            plots.removed_gallery(data, table, trial.name, folder / "removed.png")
        return Removed(trial.name, trial.arm, trial.action, table, counts)


def describe(table: pd.DataFrame, trak_id: str) -> str:
    """The parent run's note: where to look, and arms with their verdicts, the best first."""
    from attribution.experiments.arms import trial_name
    from attribution.experiments.comparison import verdict

    run = current_run()
    here, run_id = run.experiment_id, run.run_id
    runs = nested_runs(run_id)
    runs.sort(key=lambda each: -each.data.metrics["accuracy_mean"])
    links = {
        "Report": mlflow_notes.run_link(here, run_id, "report.html"),
        "arms, best first": mlflow_notes.arms_link(here, run_id),
        "arms side by side": mlflow_notes.compare_link(here, [r.info.run_id for r in runs[:NOTED]]),
        "scores": mlflow_notes.run_link(here, trak_id),
    }
    rows = table.sort_values("accuracy_mean", ascending=False, kind="stable").to_dict("records")
    arms = [
        f"- **{trial_name(r['arm'], r['action'], r['frac'])}** {r['accuracy_mean']:.4f}, {verdict(r)}"
        for r in rows[:NOTED]
    ]
    if len(rows) > NOTED:
        arms.append(f"- and {len(rows) - NOTED} more: arms, best first")
    return "\n".join([" · ".join(f"[{text}]({to})" for text, to in links.items()), "", *arms])


def show(run_id: str, config: Config) -> None:
    """Print the comparison as a table, save an exported arm, and say where to look at both."""
    import mlflow
    import pandas as pd

    from attribution.reporting import terminal

    terminal.print_comparison(pd.read_csv(stage_runs.artifact_path(run_id, "comparison.csv")))
    export(run_id, config)
    print(f"ablation run: {run_id}")
    print(f"report: {stage_runs.artifact_path(run_id, 'report.html')}")
    uri = mlflow.get_tracking_uri()
    is_server = uri.startswith("http")
    start = "" if is_server else f"mlflow ui --backend-store-uri {uri}   # and then "
    address = uri.rstrip("/") if is_server else "http://127.0.0.1:5000"
    experiment = mlflow.get_run(run_id).info.experiment_id
    say(f"next: {start}open {address}/{mlflow_notes.arms_link(experiment, run_id)}")


def exports(config: Config) -> dict[Path, float | None]:
    """The files that an exported arm is written to, each with its frac."""
    from attribution.experiments.arms import export_files

    names = export_files(config.export_arm, config.arm_names, config.fracs, config.action)
    folder = Path(config.output or "cleaned").expanduser()
    return {folder / name: frac for name, frac in names.items()}


def export(run_id: str, config: Config) -> None:
    """Write which training examples an arm keeps, for `keep` of every entry point."""
    wanted = exports(config)
    for file, kept in [(file, kept_by(run_id, config, frac)) for file, frac in wanted.items()]:
        outputs.save(kept, file)
        say(f"kept by {config.export_arm}: --keep {file}")


def kept_by(run_id: str, config: Config, frac: float | None) -> Path:
    """What the exported arm keeps at this frac; fracs that come to as many examples share a trial."""
    import pandas as pd

    terms = {"params.arm": config.export_arm, "params.action": "remove"}
    for run in nested_runs(run_id, terms):
        file = stage_runs.artifact_path(run.info.run_id, "kept.csv")
        removed = int(run.data.params["n_removed"])
        if frac is None or removed == round(frac * (removed + len(pd.read_csv(file)))):
            return file
    raise InputError(f"export_arm={config.export_arm}: its nested run in run {run_id} is gone")


if __name__ == "__main__":
    main("ablation", make, show, exports)
