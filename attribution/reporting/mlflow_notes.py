"""What a person sees in MLflow's own pages: a note on every run, links, and a saved view of the arms.

Notes are the markdown of the tag `mlflow.note.content`, of which a run's page shows the first few
lines unfolded. Links begin with `#`: put after a server's address they open its page, and inside a
note they open whatever the address is.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

NOTE = "mlflow.note.content"
# Without it MLflow opens its pages for traces of language models, where no run is to be seen.
TRAINING = "workflowType=machine_learning"
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
NOTES = {
    "finetune": """\
An ensemble of checkpoints, each trained on its own random part of the training set.

- **Model metrics**: loss and accuracy of each checkpoint by epoch
- **Artifacts**: `training/curves.png` has all of them; each folder of `checkpoints/` is one that
  `from_pretrained` loads
- next: the *trak* run, which scores the training examples by these checkpoints
""",
    "trak": """\
How much each training example helps (positive) or hurts (negative) each validation example.

- **Artifacts**: `scores/gallery.png` shows the most helpful and most harmful examples of some targets;
  `suspects.json` lists the training examples that a person should look at
- **Metrics**: where labels were flipped on purpose, `flips_auroc_…` says how well they are found
- next: the *ablation* run, which removes examples by these scores and trains again
""",
    "ablation": "Training again without what each arm removes; the comparison is here when it is done.",
    "evaluate": """\
Is the attribution right? Predictions of each method against models really trained on random subsets.

- **Artifacts**: `evaluation.png` and `evaluation.json` set the methods side by side; every method is
  a child run too
- `lds` is the rank correlation of prediction and truth (1 is perfect, 0 is what `random` gets)
""",
    "explain": "Why the model predicts what it does: open `explanation.html` under **Artifacts**.",
}
ARM = "what it removed is `removed.png` under **Artifacts**."


def first_line(function: Callable) -> str:
    """What a function's docstring says first."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def run_link(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """The page of a run, or of one of its artifacts."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}{f'/artifacts/{artifact}' if artifact else ''}?{TRAINING}"


def compare_link(experiment_id: str, run_ids: Sequence[str]) -> str:
    """MLflow's comparison page with these runs as its columns."""
    runs, experiments = (quote(json.dumps(ids)) for ids in ([*run_ids], [experiment_id]))
    return f"#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"


def arms_link(experiment_id: str, run_id: str) -> str:
    """The table of an ablation's arms, the highest accuracy first (see `arms_view`)."""
    return f"#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={run_id}"


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
