"""Addresses of pages in MLflow's web interface.

A link begins with `#`. After a server's address it opens the server's page; inside a note it works
whatever that address is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote

from mlflow.entities import LoggedModel

# Without it MLflow opens its pages for traces of language models, which show no run.
TRAINING = "workflowType=machine_learning"


def run_link(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """The page of a run, or of one of its artifacts."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}{f'/artifacts/{artifact}' if artifact else ''}?{TRAINING}"


def artifact_link(run_id: str, path: str) -> str:
    """The content of an artifact, for a picture in a note."""
    return f"get-artifact?path={quote(path)}&run_uuid={run_id}"


def model_link(model: LoggedModel) -> str:
    """The page of a model that a run logged."""
    return f"#/experiments/{model.experiment_id}/models/{model.model_id}?{TRAINING}"


def compare_link(experiment_id: str, run_ids: Sequence[str]) -> str:
    """MLflow's comparison page with these runs as its columns."""
    runs, experiments = (quote(json.dumps(ids)) for ids in ([*run_ids], [experiment_id]))
    return f"#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"


def arms_link(experiment_id: str, run_id: str) -> str:
    """The table of an ablation's arms, the highest accuracy first."""
    return f"#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={run_id}"
