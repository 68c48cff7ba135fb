"""Artifacts by run: local files as they lie, addresses for people, and no credentials in either."""

from __future__ import annotations

from types import SimpleNamespace

import mlflow
import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from attribution.tracking import artifacts
from attribution.tracking.artifacts import address, local_root

SECRET = "s3cret"


def run_at(artifact_uri: str) -> SimpleNamespace:
    return SimpleNamespace(info=SimpleNamespace(artifact_uri=artifact_uri, experiment_id="7"))


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("/data/run/artifacts", "/data/run/artifacts"),
        ("file:///data/my%20run/artifacts", "/data/my run/artifacts"),
        ("s3://bucket/run", None),
        ("mlflow-artifacts:/run", None),
    ],
)
def test_an_artifact_address_stands_for_a_folder_of_this_machine_or_for_none(uri, folder) -> None:
    found = local_root(uri)
    assert (str(found) if found else None) == folder


@pytest.mark.parametrize("uri", ["/data/a #b%20 c?d é/run", "file:///data/a%20%23b%2520?x/run"])
def test_a_folder_of_any_name_is_found_where_mlflow_writes(uri) -> None:
    assert str(local_root(uri)) == LocalArtifactRepository(uri).artifact_dir


def test_a_person_is_sent_to_the_file_or_the_page_and_never_to_a_download(monkeypatch) -> None:
    """A downloaded copy is deleted when the command ends, so its path is of no use to anybody."""
    monkeypatch.setattr(artifacts, "_download_folder", None)  # to call it would fail
    monkeypatch.setattr(artifacts, "logged_models", lambda run_id: {})
    monkeypatch.setattr(mlflow, "get_run", lambda run_id: run_at("file:///data/run/artifacts"))
    assert address("r1", "report.html") == "/data/run/artifacts/report.html"
    monkeypatch.setattr(mlflow, "get_run", lambda run_id: run_at("s3://bucket/run"))
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "sqlite:///mlflow.db")
    assert address("r1", "report.html") == "runs:/r1/report.html"
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"https://me:{SECRET}@host:5000/")
    found = address("r1", "report.html")
    assert found.startswith("https://host:5000/#/experiments/7/runs/r1/artifacts/report.html")
    assert SECRET not in found
    model = SimpleNamespace(artifact_location="s3://b/m", experiment_id="7", model_id="m-1")
    monkeypatch.setattr(artifacts, "logged_models", lambda run_id: {"checkpoint_000": model})
    found = address("r1", "checkpoint_000")
    assert found.startswith("https://host:5000/#/experiments/7/models/m-1?")
