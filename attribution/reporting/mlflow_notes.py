"""What MLflow's own pages show of a run: parts of its note, and a saved view of the arms."""

from __future__ import annotations

import json
import time

# Columns of the view, in this order, with their width in pixels.
COLUMNS = {
    "metrics.`accuracy`": 100,
    "metrics.`accuracy_vs_random`": 160,
    "tags.`verdict`": 210,
    "params.`n_removed`": 100,
    "metrics.`accuracy_vs_random_p_holm`": 210,
}
# Charts of the same view, behind MLflow's chart button.
CHARTS = {"accuracy": "BAR", "accuracy_vs_random": "BAR", "seed/accuracy": "LINE"}
ARM = "`removed.png` under **Artifacts** shows the examples that it chose."


def arms_view(run_id: str, name: str) -> tuple[str, str]:
    """The experiment tag (name, value) that saves the table of arms as a view, which arms_link opens."""
    widths = {"attributes.`Run Name`": 140, **COLUMNS, "runDateAndNestInfo": 130, "duration": 90}
    kept = {"deleted": False, "isGenerated": False}
    chart = {"metricSectionId": "arms", "runsCountToCompare": 20, **kept}
    # MLflow would smooth the line through the points of the seeds.
    axes = {"xAxisKey": "step", "scaleType": "linear", "lineSmoothness": 0}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": "metrics.`accuracy`",
        "orderByAsc": False,
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "compareRunSections": [
            {"uuid": "arms", "name": "Arms", "display": True, "isReordered": False, **kept}
        ],
        "compareRunCharts": [
            {"uuid": key, "type": kind, "metricKey": key, "selectedMetricKeys": [key], **chart}
            | (axes if kind == "LINE" else {})
            for key, kind in CHARTS.items()
        ],
    }
    now = int(1000 * time.time())
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    return f"mlflow.sharedViewState.{run_id}", json.dumps(view)
