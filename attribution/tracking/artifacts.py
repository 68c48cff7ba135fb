"""Artifacts of MLflow runs: as local files, as addresses for people, and their deletion.

As in MLflow's `runs:/` addresses, the first part of an artifact's path may be the name of a model that
the run logged.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import LoggedModel
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import append_to_uri_path

from attribution.errors import InputError, reason
from attribution.tracking.links import model_link, run_link
from attribution.tracking.run_lifecycle import experiment_of, find_run


def local_root(artifact_uri: str) -> Path | None:
    """The folder that an artifact address stands for; None where it is not on this machine."""
    # As MLflow itself finds it, also where a path holds # or %.
    is_local = urlsplit(artifact_uri).scheme in ("", "file")
    return Path(local_file_uri_to_path(artifact_uri)) if is_local else None


def logged_models(run_id: str) -> dict[str, LoggedModel]:
    """The models that a run logged and still has, by name."""
    where, terms = [experiment_of(run_id)], f"source_run_id = '{run_id}'"
    found = mlflow.search_logged_models(where, filter_string=terms, output_format="list")
    return {model.name: model for model in sorted(found, key=lambda model: model.name)}


def _find(run_id: str, path: str) -> tuple[str, str]:
    """The address of the folder that an artifact lies in, and its path there."""
    name, _, rest = path.partition("/")
    model = logged_models(run_id).get(name)
    if model:
        return model.artifact_location, rest
    return mlflow.get_run(run_id).info.artifact_uri, path


def artifact_path(run_id: str, path: str) -> Path:
    """A run's artifact as a local path, which must not be written to.

    An artifact of a remote store is downloaded to a folder that is deleted when the process ends.

    Raises:
        InputError: the run or the artifact is gone, or cannot be downloaded.
    """
    if not find_run(run_id):
        raise InputError(f"run {run_id}: is not in {mlflow.get_tracking_uri()}, or deleted")
    uri, inner = _find(run_id, path)
    root = local_root(uri)
    if root:
        if (root / inner).exists():
            return root / inner
        raise InputError(f"run {run_id}: its artifact {path} is gone from {uri}")
    try:
        whole = append_to_uri_path(uri, inner)
        return Path(
            mlflow.artifacts.download_artifacts(whole, dst_path=_download_folder(run_id, path))
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise InputError(
            f'run {run_id}: could not download artifact "{path}" ({reason(error)})'
        ) from error


@cache
def _download_folder(run_id: str, path: str) -> str:
    folder = tempfile.mkdtemp(prefix="trak-ablation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def address(run_id: str, path: str = "") -> str:
    """Where a person finds an artifact, or all of a run: on disk, on the tracking server, or its MLflow URI."""
    uri, inner = _find(run_id, path)
    root = local_root(uri)
    if root:
        return str(root / inner)
    model = logged_models(run_id).get(path)
    link = model_link(model) if model else run_link(experiment_of(run_id), run_id, path)
    return server_page(link) or f"runs:/{run_id}/{path}"


def server_page(link: str) -> str:
    """The address of a link's page on the tracking server, without a password; empty without a server."""
    server = urlsplit(mlflow.get_tracking_uri())
    if server.scheme not in ("http", "https"):
        return ""
    base = server._replace(netloc=server.netloc.rpartition("@")[2]).geturl().rstrip("/")
    return f"{base}/{link}"


def artifact_names(run_id: str) -> list[str]:
    """The paths of a run's artifacts that lie in no folder."""
    return [item.path for item in mlflow.MlflowClient().list_artifacts(run_id)]


def has_artifact(run_id: str, path: str) -> bool:
    """Whether a run still has an artifact."""
    uri, inner = _find(run_id, path)
    listed = get_artifact_repository(uri).list_artifacts(inner.rpartition("/")[0] or None)
    return any(item.path == inner for item in listed)


def delete_models(run_id: str, names: list[str]) -> int:
    """Delete those of these models that a run still has, and return how many there were."""
    models = logged_models(run_id)
    there = [models[name] for name in names if name in models]
    for model in there:
        get_artifact_repository(model.artifact_location).delete_artifacts()
        mlflow.MlflowClient().delete_logged_model(model.model_id)
    return len(there)
