"""What a stage leaves in its MLflow run, and the one place that logs it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Metric

from attribution.tracking.logged_models import TrainedModel, log_models
from attribution.tracking.names import metric_name
from attribution.tracking.run_lifecycle import current_run, open_run
from attribution.tracking.stage_runs import NOTE

BATCH = 1000  # metrics in one request, MLflow's limit


@dataclass(frozen=True)
class Record:
    """The content of one MLflow run.

    Attributes:
        name: of a child run; a stage's own run has its name already.
        tags, params, metrics: by name.
        series: (name, value, step) of curves.
        tables: by name; each becomes NAME.csv and, for MLflow's table view, NAME.json.
        models: trained models by name.
        folders: existing folders by the artifact path that they are logged under.
        write: writes the other artifacts into an empty folder.
        children: nested runs.
        note: markdown for the run's page, from the ids of the children's runs.
        experiment_tags: tags of the experiment, such as a saved view.
    """

    name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Sequence[tuple[str, float, int]] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    models: Mapping[str, TrainedModel] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    write: Callable[[Path], None] | None = None
    children: Sequence[Record] = ()
    note: Callable[[list[str]], str] | None = None
    experiment_tags: Mapping[str, str] = field(default_factory=dict)


def log_record(record: Record) -> None:
    """Log a record to the active run, its children to nested runs."""
    mlflow.set_tags(dict(record.tags))
    mlflow.log_params(dict(record.params))
    mlflow.log_metrics({metric_name(name): value for name, value in record.metrics.items()})
    _log_series(record.series)
    for name, table in record.tables.items():
        mlflow.log_table(table, f"{name}.json")
        mlflow.log_text(table.to_csv(index=False), f"{name}.csv")
    if record.models:
        log_models(record.models)
    for path, folder in record.folders.items():
        mlflow.log_artifacts(str(folder), path)
    if record.write:
        with tempfile.TemporaryDirectory() as unlogged:
            record.write(Path(unlogged))
            mlflow.log_artifacts(unlogged)
    client = mlflow.MlflowClient()
    for name, value in record.experiment_tags.items():
        client.set_experiment_tag(current_run().experiment_id, name, value)
    children = [_log_child(child) for child in record.children]
    if record.note:
        mlflow.set_tag(NOTE, record.note(children))


def _log_child(record: Record) -> str:
    with open_run(run_name=record.name, nested=True) as run:
        log_record(record)
        return run.info.run_id


def _log_series(series: Sequence[tuple[str, float, int]]) -> None:
    """Log (name, value, step) metrics in as few requests as MLflow allows."""
    now = int(time.time() * 1000)
    entities = [Metric(metric_name(name), float(value), now, step) for name, value, step in series]
    client, run_id = mlflow.MlflowClient(), current_run().run_id
    for start in range(0, len(entities), BATCH):
        client.log_batch(run_id, metrics=entities[start : start + BATCH])
