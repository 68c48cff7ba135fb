"""What MLflow's own pages show of a run: parts of its note, and saved views."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

# Columns of the view for a headline metric, in this order, with their width in pixels.
COLUMNS = {
    "metrics.`{}`": 80,
    "tags.`verdict`": 200,
    "metrics.`{}_vs_random`": 160,
    "params.`n_removed`": 100,
    "metrics.`{}_vs_random_p_holm`": 210,
}
# Charts of the same view, behind MLflow's chart button.
CHARTS = {"{}": "BAR", "{}_vs_random": "BAR", "seed/{}": "LINE"}
CURVES = ("validation_accuracy", "validation_log_loss", "train_loss")  # of each checkpoint
ARM = "`removed.png` under **Artifacts** shows the examples that it chose."


def arms_view(run_id: str, name: str, metric: str) -> tuple[str, str]:
    """The experiment tag (name, value) that saves the table of arms as a view, which arms_link opens."""
    columns = {column.format(metric): width for column, width in COLUMNS.items()}
    widths = {"attributes.`Run Name`": 120, **columns, "runDateAndNestInfo": 130, "duration": 90}
    charts = [_chart(kind, [key.format(metric)]) for key, kind in CHARTS.items()]
    table = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "columnOrder": list(widths),
        "columnWidths": widths,
    }
    return _view(run_id, name, table, "Arms", charts)


def curves_view(run_id: str, name: str, models: Sequence[str]) -> tuple[str, str]:
    """The experiment tag of a view with the curves of these models in one chart, which view_link opens."""
    charts = [_chart("LINE", [f"{model}/{key}" for model in models]) for key in CURVES]
    where = {"searchFilter": f"attributes.run_id = '{run_id}'"}
    return _view(run_id, name, where, "All checkpoints", charts)


def _chart(kind: str, metrics: list[str]) -> dict[str, Any]:
    found = {
        "uuid": metrics[0],
        "type": kind,
        "metricKey": metrics[0],
        "selectedMetricKeys": metrics,
        "runsCountToCompare": 20,
    }
    # MLflow would smooth the line through the points of the seeds.
    axes = {"xAxisKey": "step", "scaleType": "linear", "lineSmoothness": 0}
    return found | (axes if kind == "LINE" else {})


def _view(
    run_id: str, name: str, table: dict[str, Any], section: str, charts: list[dict[str, Any]]
) -> tuple[str, str]:
    """A view as MLflow keeps it; of its sections MLflow shows the first in the alphabet on top."""
    kept = {"deleted": False, "isGenerated": False}
    state = {
        **table,
        "compareRunSections": [
            {"uuid": "arms", "name": section, "display": True, "isReordered": False, **kept}
        ],
        "compareRunCharts": [{**chart, "metricSectionId": "arms", **kept} for chart in charts],
    }
    now = int(1000 * time.time())
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    return f"mlflow.sharedViewState.{run_id}", json.dumps(view)
