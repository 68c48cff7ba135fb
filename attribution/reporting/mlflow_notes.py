"""What MLflow's own pages show of a run: parts of its note, and saved views."""

from __future__ import annotations

import json
import time
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
ARM = "`removed.png` under **Artifacts** shows the examples that it chose."


def arms_view(run_id: str, metric: str) -> tuple[str, str]:
    """The experiment tag (name, value) that saves the table of arms as a view, which arms_link opens."""
    columns = {column.format(metric): width for column, width in COLUMNS.items()}
    widths = {"attributes.`Run Name`": 120, **columns, "runDateAndNestInfo": 130, "duration": 90}
    kept = {"deleted": False, "isGenerated": False}
    section = {"uuid": "arms", "name": "Arms", "display": True, "isReordered": False}
    charts = [_chart(key.format(metric), kind) for key, kind in CHARTS.items()]
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "columnOrder": list(widths),
        "columnWidths": widths,
        # MLflow shows the first section in the alphabet on top.
        "compareRunSections": [section | kept],
        "compareRunCharts": [{**chart, "metricSectionId": "arms", **kept} for chart in charts],
    }
    now = int(1000 * time.time())
    view = {
        "name": f"Arms of run {run_id}",
        "createdAt": now,
        "updatedAt": now,
        "state": json.dumps(state),
    }
    return f"mlflow.sharedViewState.{run_id}", json.dumps(view)


def _chart(metric: str, kind: str) -> dict[str, Any]:
    found = {
        "uuid": metric,
        "type": kind,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "runsCountToCompare": 20,
    }
    # MLflow would smooth the line through the points of the seeds.
    axes = {"xAxisKey": "step", "scaleType": "linear", "lineSmoothness": 0}
    return found | (axes if kind == "LINE" else {})
