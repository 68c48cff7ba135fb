"""What MLflow's own pages show of a run: parts of its note, and saved views."""

from __future__ import annotations

import json
import time

# Columns of the view for a headline metric, in this order, with their width in pixels.
COLUMNS = {
    "metrics.`{}`": 80,
    "tags.`verdict`": 200,
    "metrics.`{}_vs_random`": 160,
    "params.`n_removed`": 100,
    "metrics.`{}_vs_random_p_holm`": 210,
}
ARM = "`removed.png` under **Artifacts** shows the examples that it chose."


def arms_view(run_id: str, metric: str) -> tuple[str, str]:
    """The experiment tag (name, value) that saves the table of arms as a view, which arms_link opens."""
    columns = {column.format(metric): width for column, width in COLUMNS.items()}
    widths = {"attributes.`Run Name`": 120, **columns, "runDateAndNestInfo": 130, "duration": 90}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "selectedColumns": list(columns),
        "columnOrder": list(widths),
        "columnWidths": widths,
    }
    now = int(1000 * time.time())
    view = {
        "name": f"Arms of run {run_id}",
        "createdAt": now,
        "updatedAt": now,
        "state": json.dumps(state),
    }
    return f"mlflow.sharedViewState.{run_id}", json.dumps(view)
