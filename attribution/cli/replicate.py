"""The command `ablation --num_splits R`: one ablation for each split of the data, and their summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from attribution.cli.command import Command, ended_well, own_run
from attribution.cli.settings import prepare
from attribution.config import resolve
from attribution.errors import InputError
from attribution.experiments import replication
from attribution.experiments.arms import trial_name
from attribution.experiments.metrics import headline
from attribution.experiments.verdicts import judged_metrics
from attribution.reporting import answer, figures, terminal
from attribution.runtime.progress import say
from attribution.stages import Stage
from attribution.tracking.job import Upstream
from attribution.tracking.links import run_link
from attribution.tracking.record import Record, log_record
from attribution.tracking.run_lifecycle import current_run, open_run, signature
from attribution.tracking.stage_runs import log_params, name_run


def run(stage: Stage, given: dict[str, Any]) -> int:
    """Compare the arms on each split in a nested run, summarise them, and return the exit code.

    Raises:
        InputError: a split cannot be compared, or all splits are the same.
        StoreFailure: the tracking store or a disk failed.
    """
    commands: list[Command] = []
    with ended_well(given):
        with own_run(stage, given, commands) as run:
            commands += _commands(stage, given)
            mlflow.set_tag("stage", "splits")  # no other command takes it for one ablation
            done = {each.config.data_seed: _compare(each) for each in commands}
            rows = _rows(done)
            pairs = {seed: each.result.contrasts for seed, each in done.items()}
            table, contrasts = replication.summary(rows, pairs)
            log_record(_record(table, contrasts, rows))
        first = commands[0]
        about = headline(first.config, first.data.labels("train"), first.data.class_names)[1]
        terminal.print_splits(table, rows, about, answer.contrasts(contrasts))
        print(f"splits run: {run.info.run_id}")
        for seed, each in done.items():
            print(f"ablation run of data_seed {seed}: {each.run_id}")
    return 0


def _commands(stage: Stage, given: dict[str, Any]) -> list[Command]:
    """One command for each split, all checked before the first one computes anything."""
    first = resolve(given)
    for name in ("output", "export_arm", "trak_run_id", "finetune_run_id", "replay"):
        if value := getattr(first, name):
            raise InputError(f"{name}={value}: is of one split; leave it out, or num_splits")
    seeds = range(first.data_seed, first.data_seed + first.num_splits)
    commands = [Command(stage, *prepare(stage, {**given, "data_seed": seed})) for seed in seeds]
    replication.check([each.data.fingerprint for each in commands])
    for each in commands:
        stage.script().check(each.config, each.data)
    log_params(first.group(*stage.all_groups, "design"))
    name_run(f"splits {first.dataset} {len(seeds)} from data_seed {first.data_seed}")
    return commands


def _compare(command: Command) -> Upstream:
    """One split's comparison, in a nested run."""
    say(f"\nsplits: data_seed {command.config.data_seed}")
    stage = command.stage.name
    tags = {"stage": stage, **signature(Path(command.config.cache_dir))}
    with open_run(run_name=stage, nested=True, tags=tags) as run:
        done = command.find_or_make(run)
    command.tidy(done)
    return done


def _rows(done: dict[int, Upstream]) -> pd.DataFrame:
    rows = replication.by_split({seed: each.result.table for seed, each in done.items()})
    return rows.assign(run_id=rows["data_seed"].map({s: each.run_id for s, each in done.items()}))


def _record(table: pd.DataFrame, contrasts: pd.DataFrame, rows: pd.DataFrame) -> Record:
    """The summaries and the rows behind them as tables, each arm's difference as a metric, links to the splits' runs."""
    here = current_run().experiment_id
    links = [
        f"- [data_seed {seed}]({run_link(here, run_id)})"
        for seed, run_id in rows.groupby("data_seed")["run_id"].first().items()
    ]
    metrics = {
        f"{trial_name(row['arm'], row['action'], row['frac'])}/{name}": row[name]
        for _, row in answer.judged(table).iterrows()
        for metric in judged_metrics(row["metric"])
        if f"{metric}_vs_random" in row
        for end in ("", "_ci_low", "_ci_high")
        for name in [f"{metric}_vs_random{end}"]
    }
    words = [answer.short(table), *answer.contrasts(contrasts)]
    note = "\n".join([*words, "", "One ablation for each split:", "", *links])
    tables = {"splits": table, "contrasts": contrasts, "by_split": rows}

    def write(folder: Path) -> None:
        figures.save(figures.removal_curves(table), folder / "curves.png")

    return Record(metrics=metrics, tables=tables, write=write, note=lambda _: note)
