"""Is the attribution right? Scores against models that were really retrained on random subsets."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from attribution.cli.command import main
from attribution.reporting import mlflow_notes
from attribution.runtime.progress import say
from attribution.tracking import stage_runs
from attribution.tracking.fingerprint import stage_folder, work_folder
from attribution.tracking.run_lifecycle import open_run
from scripts import finetune, trak

if TYPE_CHECKING:
    import pandas as pd

    from attribution.config import Config
    from attribution.data.dataset import ImageData


def make(config: Config, data: ImageData) -> None:
    """Find or compute scores and a bank, judge every method by it, and log table and figure."""
    from attribution.experiments import evaluation
    from attribution.experiments.methods import Subject
    from attribution.experiments.subset_bank import load_bank
    from attribution.reporting import figures
    from attribution.scores.artifact import load_scores

    evaluation.check(config, data)
    bank = load_bank(config.bank, config, data) if config.bank else None
    trak_id = stage_runs.obtain("trak", config, data, trak.make)
    finetune_id = finetune.obtain_of(trak_id, config, data)
    checkpoints = finetune.checkpoint_folders(finetune_id, config.num_models)
    scores = load_scores(stage_runs.artifact_path(trak_id, "scores"))
    work = stage_folder("evaluate", config, data, finetune_id)
    subject = Subject(config, data, checkpoints, scores, work)
    found = evaluation.evaluate(subject, bank, work_folder(config, "retrainings"))
    if found.brittleness is not None:
        stage_runs.log_table(found.brittleness, "brittleness")
    for _, row in found.table.iterrows():
        log_method(row)
    stage_runs.log_table(found.table, "evaluation")
    with stage_runs.artifact_folder("bank") as folder:
        found.bank.save(folder, config, data)
    with stage_runs.artifact_folder() as folder:
        figures.evaluation(found.table, found.brittleness, folder / "evaluation.png")


def log_method(row: pd.Series) -> None:
    """One nested run a method, so that they can be picked and compared in MLflow."""
    import mlflow
    import pandas as pd

    from attribution.experiments import methods

    name = row["method"]
    with open_run(run_name=name, nested=True):
        note = mlflow_notes.first_line(methods.METHODS[name])
        mlflow.set_tags({"stage": "evaluate_method", "method": name, mlflow_notes.NOTE: note})
        mlflow.log_param("method", name)
        mlflow.log_metrics(
            {key: float(v) for key, v in row.items() if key != "method" and pd.notna(v)}
        )


def show(run_id: str, config: Config) -> None:
    """Print the table of methods, and what the removal for single targets did."""
    import pandas as pd

    from attribution.errors import InputError
    from attribution.reporting import terminal

    terminal.print_evaluation(pd.read_csv(stage_runs.artifact_path(run_id, "evaluation.csv")))
    with suppress(InputError):  # none was asked for
        terminal.print_brittleness(pd.read_csv(stage_runs.artifact_path(run_id, "brittleness.csv")))
    print(f"evaluate run: {run_id}")
    say(f"bank: runs:/{run_id}/bank   # --bank takes it for other scores of the same data")


if __name__ == "__main__":
    main("evaluate", make, show)
