"""Artifacts of MLflow runs: as local files, as addresses for people, and their deletion."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from attribution.errors import InputError, reason, redact
from attribution.tracking.links import run_link


def local_root(artifact_uri: str) -> Path | None:
    """The folder that an artifact address stands for; None where it is not on this machine."""
    # As MLflow itself finds it, also where a path holds # or %.
    is_local = urlsplit(artifact_uri).scheme in ("", "file")
    return Path(local_file_uri_to_path(artifact_uri)) if is_local else None


def artifact_path(run_id: str, path: str) -> Path:
    """A run's artifact as a local path, which must not be written to.

    An artifact of a remote store is downloaded to a folder that is deleted when the process ends.

    Raises:
        InputError: the artifact is gone, or cannot be downloaded.
    """
    uri = mlflow.get_run(run_id).info.artifact_uri
    root = local_root(uri)
    if root:
        if (root / path).exists():
            return root / path
        raise InputError(f"run {run_id}: its artifact {path} is gone from {uri}")
    try:
        return Path(
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=path, dst_path=_download_folder(run_id)
            )
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise InputError(
            f'run {run_id}: could not download artifact "{path}" ({reason(error)})'
        ) from error


@cache
def _download_folder(run_id: str) -> str:
    folder = tempfile.mkdtemp(prefix="trak-ablation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def address(run_id: str, path: str = "") -> str:
    """Where a person finds an artifact, or all of a run: on disk, on the tracking server, or its MLflow URI."""
    info = mlflow.get_run(run_id).info
    root = local_root(info.artifact_uri)
    if root:
        return str(root / path)
    server = mlflow.get_tracking_uri()
    if server.startswith("http"):
        return redact(f"{server.rstrip('/')}/{run_link(info.experiment_id, run_id, path)}")
    return f"runs:/{run_id}/{path}"


def artifact_names(run_id: str) -> list[str]:
    """The paths of a run's artifacts that lie in no folder."""
    return [item.path for item in mlflow.MlflowClient().list_artifacts(run_id)]


def has_artifact(run_id: str, path: str) -> bool:
    """Whether a run still has an artifact."""
    folder = path.rpartition("/")[0] or None
    listed = mlflow.MlflowClient().list_artifacts(run_id, folder)
    return any(item.path == path for item in listed)


def delete_artifacts(run_id: str, paths: list[str]) -> int:
    """Delete those of these artifacts that a run still has, and return how many there were."""
    store = get_artifact_repository(mlflow.get_run(run_id).info.artifact_uri)
    there = [path for path in paths if store.list_artifacts(path)]
    for path in there:
        store.delete_artifacts(path)
    return len(there)
