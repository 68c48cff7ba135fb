"""MLflow: a stage's run described, found again or made; its lineage, artifacts and metrics."""

from __future__ import annotations

import atexit
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from attribution.config import STAGE_GROUPS, Config, convert
from attribution.errors import InputError
from attribution.reporting import mlflow_notes
from attribution.runtime.cache_folder import alone, discard
from attribution.runtime.hashing import digest
from attribution.runtime.progress import say
from attribution.tracking.fingerprint import UPSTREAM, fingerprint, stage_folder
from attribution.tracking.run_lifecycle import current_run, open_run, signature

if TYPE_CHECKING:
    import pandas as pd

    from attribution.data.dataset import ImageData

# A finished run without one of these has lost what it was kept for.
NEEDED_ARTIFACTS = {
    "finetune": ("training/logits.npz",),
    "trak": (
        "suspects.csv",
        *(
            f"scores/{name}"
            for name in ("scores.npy", "train.parquet", "targets.parquet", "metadata.json")
        ),
    ),
    "ablation": ("comparison.csv", "report.html"),
    "evaluate": ("evaluation.csv", "bank/spec.json"),
    "explain": ("explanation.html", "explanation.csv"),
}
ENVIRONMENT = "environment.json"  # what a run was made with, beside its parameters
Make = Callable[[Config, "ImageData"], None]


@contextmanager
def making(stage: str, config: Config, data: ImageData) -> Iterator[str | None]:
    """Let one process at a time make a result: the next one then finds it finished.

    Gives the id of the finished run, if there is one; else the block is to make it.
    """
    key = fingerprint(stage, config, data)[:16]
    waiting = f"{stage}: another process is making it; waiting"
    with alone(Path(config.cache_dir), key, waiting):
        yield find_finished(stage, config, data)


def find_finished(stage: str, config: Config, data: ImageData) -> str | None:
    """The newest FINISHED run with the stage's fingerprint whose artifacts are all still there."""
    import mlflow

    key = fingerprint(stage, config, data)
    runs = mlflow.MlflowClient().search_runs(
        [current_run().experiment_id],
        f"tags.stage = '{stage}' and tags.fingerprint = '{key}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    return next((r.info.run_id for r in runs if is_whole(stage, r.info.run_id, config)), None)


def is_whole(stage: str, run_id: str, config: Config) -> bool:
    """Whether a run still has what others would build on."""
    needed = NEEDED_ARTIFACTS[stage]
    if stage == "finetune":
        needed += tuple(f"checkpoints/{m:03d}/model.safetensors" for m in range(config.num_models))
    return all(_has_artifact(run_id, path) for path in needed)


def _has_artifact(run_id: str, path: str) -> bool:
    import mlflow

    folder = path.rpartition("/")[0] or None
    listed = mlflow.MlflowClient().list_artifacts(run_id, folder)
    return any(item.path == path for item in listed)


def obtain(stage: str, config: Config, data: ImageData, make: Make) -> str:
    """The id of a finished upstream run: the one named, one with the same fingerprint, or a new one.

    The active run is tagged with it.
    """
    import mlflow

    named = getattr(config, f"{stage}_run_id")
    with nullcontext(named) if named else making(stage, config, data) as run_id:
        if run_id:
            say(f"{stage}: reusing run {run_id}")
        else:
            tags = signature(Path(config.cache_dir))
            with open_run(run_name=stage, nested=True, tags=tags) as run:
                run_id = run.info.run_id
                # Not a part of the run that needed it first: others will build on it too.
                mlflow.MlflowClient().delete_tag(run_id, "mlflow.parentRunId")
                describe(stage, config, data)
                make(config, data)
                log_environment()
            # Not before the run is FINISHED: a kill in between would lose both.
            discard(stage_folder(stage, config, data))
    mlflow.set_tag(f"{stage}_run_id", run_id)
    return run_id


def describe(stage: str, config: Config, data: ImageData) -> None:
    """Name, tags, parameters and data of the active run."""
    import mlflow
    from mlflow.data.pandas_dataset import from_pandas

    key = fingerprint(stage, config, data)
    mlflow.set_tags(
        {
            "stage": stage,
            "fingerprint": key,
            "data_fingerprint": data.fingerprint,
            **({"replay_of": config.replay} if config.replay else {}),
            mlflow_notes.NOTE: mlflow_notes.NOTES[stage],
        }
    )
    name_run(f"{stage} {Path(config.dataset).name} {key[:6]}")
    log_params(config.group(*STAGE_GROUPS[stage], "execution"))
    source = from_pandas(
        data.examples.drop(columns="file_name"),
        source=config.dataset,
        name=Path(config.dataset).name,
        targets="label",
        digest=data.fingerprint[:8],
    )
    mlflow.log_input(source, context=stage)


def log_environment() -> None:
    """Log what the active run was made with: versions, hardware, command line, commit."""
    import mlflow

    from attribution.runtime import machine

    mlflow.log_dict(machine.environment(), ENVIRONMENT)


def log_params(params: dict[str, Any]) -> None:
    """Log resolved parameters.

    `mlflow run` has logged its command line already, and MLflow lets no parameter change: what a
    value such as 'auto' came to is then the tag `resolved.NAME`.
    """
    import mlflow

    known = mlflow.MlflowClient().get_run(current_run().run_id).data.params
    mlflow.log_params({k: v for k, v in params.items() if k not in known})
    differ = {k: params[k] for k in params.keys() & known if convert(k, known[k]) != params[k]}
    mlflow.set_tags({f"resolved.{k}": v for k, v in differ.items()})


def mark_reused(stage: str, run_id: str) -> None:
    import mlflow

    say(f"{stage}: nothing has changed, reusing run {run_id}")
    link = mlflow_notes.run_link(current_run().experiment_id, run_id)
    note = f"Nothing had changed: the result is in run [{run_id}]({link})."
    mlflow.set_tags({"reused_run_id": run_id, mlflow_notes.NOTE: note})
    name_run(f"{stage} (see {run_id[:8]})")


def name_run(name: str) -> None:
    """Name the active run, unless a person has: MLflow's own names are like shy-cat-123."""
    import mlflow

    run = mlflow.MlflowClient().get_run(current_run().run_id)
    stage = run.data.tags["stage"]
    if re.fullmatch(rf"[a-z]+-[a-z]+-\d+|{stage}", run.info.run_name or stage):
        mlflow.set_tag("mlflow.runName", name)


def save_arms_view() -> None:
    """Let MLflow list a view of the active run's arms: sensible columns, the best arm first."""
    import mlflow

    client, run_id = mlflow.MlflowClient(), current_run().run_id
    run = client.get_run(run_id)
    tag = mlflow_notes.arms_view(run_id, f"Arms of {run.info.run_name}")
    client.set_experiment_tag(run.info.experiment_id, *tag)


def run_tags(run_id: str) -> dict[str, str]:
    import mlflow

    return mlflow.get_run(run_id).data.tags


def artifact_path(run_id: str, path: str) -> Path:
    """A run's artifact as a local path, which is not to be written to.

    Where the store is remote it is downloaded to a folder that goes when this process ends.

    Raises:
        InputError: it is gone.
    """
    import mlflow

    uri = mlflow.get_run(run_id).info.artifact_uri
    if urlparse(uri).scheme in ("", "file"):
        local = Path(unquote(urlparse(uri).path)) / path
        if local.exists():
            return local
        raise InputError(f"run {run_id}: its artifact {path} is gone from {uri}")
    try:
        return Path(
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=path, dst_path=_download_folder(run_id)
            )
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"run {run_id}: its artifact {path} cannot be had ({reason})") from error


def delete_artifacts(run_id: str, paths: list[str]) -> int:
    """Delete artifacts of a run, and count them; those that are gone already stay so."""
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    store = get_artifact_repository(mlflow.get_run(run_id).info.artifact_uri)
    there = [path for path in paths if store.list_artifacts(path)]
    for path in there:
        store.delete_artifacts(path)
    return len(there)


@cache
def _download_folder(run_id: str) -> str:
    folder = tempfile.mkdtemp(prefix="trak-ablation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def artifact_folder(path: str | None = None) -> Iterator[Path]:
    """A temporary folder whose content becomes artifacts of the active run under `path`."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        mlflow.log_artifacts(folder, path)


def newest(stage: str, tags: dict[str, str]) -> str | None:
    """The id of the newest FINISHED run of a stage with these tags in the active experiment."""
    import mlflow

    terms = {"stage": stage, **tags}
    found = mlflow.MlflowClient().search_runs(
        [current_run().experiment_id],
        " and ".join(f"tags.{name} = '{value}'" for name, value in terms.items())
        + " and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    whole = (run.info.run_id for run in found if "fingerprint" in run.data.tags)
    return next(whole, None)


def lineage(run_id: str | None) -> dict[str, str]:
    """The ids of a run and of those that it was built on, by name ('trak run')."""
    found = {}
    while run_id:
        tags = run_tags(run_id)
        found[f"{tags['stage']} run"] = run_id
        run_id = tags.get(f"{UPSTREAM.get(tags['stage'])}_run_id")
    return found


def finetune_run(run_id: str) -> str:
    """The run whose checkpoints this run used itself, or else those that it was built on."""
    return run_tags(run_id).get("finetune_run_id") or lineage(run_id)["finetune run"]


def file_name(text: str) -> str:
    """A text as the stem of a file's name."""
    return re.sub(r"[^\w\-.]+", "-", text).strip("-.")[:80] or "unnamed"


def metric_name(text: str) -> str:
    """A text with the characters that MLflow refuses in a metric's name replaced.

    Texts that differ in these alone are told apart by a hash at the end.
    """
    name = re.sub(r"[^\w\-. :/]", "_", text)
    name = name if len(name) < 248 else name[:240]  # with a hash; MLflow takes 250
    # A name is a path too, and has to be the shortest way to write it.
    name = name if posixpath.normpath(name) == name else name.replace("/", "_")
    return name if name == text else f"{name}_{digest(text)[:6]}"


def log_series(metrics: list[tuple[str, float, int]]) -> None:
    """Log (name, value, step) metrics to the active run in as few calls as MLflow takes."""
    import time

    import mlflow
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entities = [Metric(name, float(value), now, step) for name, value, step in metrics]
    client, run_id = mlflow.MlflowClient(), current_run().run_id
    for start in range(0, len(entities), 1000):
        client.log_batch(run_id, metrics=entities[start : start + 1000])


def log_table(table: pd.DataFrame, name: str) -> None:
    """Log a table twice: for MLflow's table view (json) and for everything else (csv)."""
    import mlflow

    mlflow.log_table(table, f"{name}.json")
    mlflow.log_text(table.to_csv(index=False), f"{name}.csv")
