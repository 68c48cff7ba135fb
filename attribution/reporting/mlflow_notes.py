"""What a person sees in MLflow's own pages: a note on every run, links, and a saved view of the arms.

Notes are markdown, of which a run's page shows the first few lines unfolded.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable

# Columns of the view of arms, in this order, with their width in pixels.
COLUMNS = {
    "metrics.`accuracy_mean`": 130,
    "tags.`verdict`": 220,
    "metrics.`accuracy_vs_random`": 160,
    "params.`n_removed`": 110,
    "metrics.`accuracy_vs_random_p_holm`": 210,
}
# Charts of the same view, for whoever presses the chart button.
CHARTS = {"accuracy_mean": "BAR", "accuracy_vs_random": "BAR", "accuracy": "LINE"}
ARM = "what it removed is `removed.png` under **Artifacts**."


def first_line(function: Callable) -> str:
    """What a function's docstring says first."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def arms_view(run_id: str, name: str) -> tuple[str, str]:
    """The experiment tag that makes the view behind `arms_link`, which MLflow lists under Views."""
    widths = {"attributes.`Run Name`": 150, **COLUMNS, "runDateAndNestInfo": 130, "duration": 90}
    kept = {"deleted": False, "isGenerated": False}
    chart = {"metricSectionId": "arms", "runsCountToCompare": 20, **kept}
    # One point a seed: MLflow would smooth the line through them.
    axes = {"xAxisKey": "step", "scaleType": "linear", "lineSmoothness": 0}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": "metrics.`accuracy_mean`",
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
