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
    from attribution.experiments.subset_bank import Bank


def make(config: Config, data: ImageData) -> None:
    """Find or compute scores and a bank, judge every method by it, and log table and figure."""
    import numpy as np

    from attribution.experiments import evaluation, methods
    from attribution.reporting import figures
    from attribution.scores.artifact import load_scores

    methods.check_methods(config.method_names)
    evaluation.check_brittleness(config, len(data.rows("train")))
    given = known_bank(config, data)  # refused before any training
    evaluation.check_alpha(config, len(data.rows("train")))
    trak_id = stage_runs.obtain("trak", config, data, trak.make)
    finetune_id = finetune.obtain_of(trak_id, config, data)
    bank = given or new_bank(config, data)
    work = stage_folder("evaluate", config, data, finetune_id)
    subject = methods.Subject(
        config,
        data,
        finetune.checkpoint_folders(finetune_id, config.num_models),
        load_scores(stage_runs.artifact_path(trak_id, "scores")),
        work,
    )
    found = {name: methods.METHODS[name](subject) for name in config.method_names}
    table = evaluation.judge(found, bank, subject.scores.train["is_flipped"].to_numpy())
    brittle = None
    if config.brittleness_targets:
        nearest = np.concatenate(list(methods.penultimate_similarity(subject, signed=False)))
        supports = {"trak": subject.scores.values, "nearest of the same label": nearest}
        retrainings = work_folder(config, "retrainings")
        brittle = evaluation.brittleness(config, data, supports, retrainings)
        stage_runs.log_table(brittle, "brittleness")
    for _, row in table.iterrows():
        log_method(row)
    stage_runs.log_table(table, "evaluation")
    with stage_runs.artifact_folder("bank") as folder:
        bank.save(folder, config, data)
    with stage_runs.artifact_folder() as folder:
        figures.evaluation(table, brittle, folder / "evaluation.png")


def known_bank(config: Config, data: ImageData) -> Bank | None:
    """The bank that the caller names, if any."""
    from attribution.experiments.subset_bank import load_bank

    return load_bank(config.bank, config, data) if config.bank else None


def new_bank(config: Config, data: ImageData) -> Bank:
    """A bank of this size; of what an earlier command trained for it nothing is trained again."""
    from attribution.experiments.subset_bank import build_bank

    work = work_folder(config, "retrainings")
    return build_bank(config, data, config.num_subsets, config.num_repeats, config.alpha, work)


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
