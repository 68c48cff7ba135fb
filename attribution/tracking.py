"""MLflow: one run a stage, its lineage and fingerprint, and the reuse of finished runs."""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import posixpath
import re
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from attribution import notes
from attribution.config import STAGE_GROUPS, Config, convert
from attribution.errors import InputError
from attribution.files import sha256
from attribution.signals import is_stopping, stop_after
from attribution.store import failure
from attribution.workspace import alone, cache_folder, discard

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import RunInfo

    from attribution.data import ImageData

# Raised whenever training, or scoring, would compute something else from the same parameters and data.
TRAINING_VERSION = 2
ESTIMATOR_VERSION = 5
UPSTREAM = {"trak": "finetune", "ablation": "trak", "evaluate": "trak", "explain": "trak"}
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


def say(message: str) -> None:
    """A line for the person at the terminal; results go to stdout, everything else here."""
    print(message, file=sys.stderr, flush=True)


def digest(*parts: Any) -> str:
    """A short hash of JSON-like values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=8)  # it reads the whole of a model folder, and a command asks for it often
def training_key(config: Config, data: ImageData) -> str:
    """What decides a trained model beside its seed and the examples that it sees."""
    from attribution import models

    settings = config.group("training") | {"model": models.fingerprint(config.model)}
    return digest(TRAINING_VERSION, settings, data.fingerprint)


def fingerprint(stage: str, config: Config, data: ImageData) -> str:
    """Hash of all that a stage's result depends on, its upstream stages included.

    A replay's results have fingerprints of their own: it goes on from itself, and from nothing else.
    """
    if stage == "finetune":
        replay = [config.replay] if config.replay else []
        return digest(stage, training_key(config, data), config.group("finetune"), *replay)
    upstream = fingerprint(UPSTREAM[stage], config, data)
    settings = config.group(stage)
    if stage == "ablation" and config.groups in data.examples:
        settings["groups"] = [config.groups, digest(*data.examples[config.groups])]
    if stage == "explain" and config.image:
        settings["image"] = [Path(config.image).name, _content("image", config.image)]  # both shown
    if stage == "evaluate" and config.bank and not config.bank.startswith("runs:"):
        with suppress(InputError):  # load_bank says what is wrong with it
            settings["bank"] = [
                _content("bank", config.bank, file) for file in ("masks.npy", "margins.npy")
            ]
    return digest(stage, ESTIMATOR_VERSION, upstream, settings)


def _content(parameter: str, value: str, *parts: str) -> str:
    try:
        return sha256(Path(value, *parts).expanduser())
    except OSError as error:
        raise InputError(f"{parameter}={value}: cannot be read ({error.strerror})") from None


def work_folder(config: Config, *parts: str) -> Path:
    """A folder for unfinished work under cache_dir, a replay's its own.

    Raises:
        InputError: it cannot be written.
    """
    top = ("replays", config.replay) if config.replay else ("work",)
    return cache_folder(config, *top, *parts)


def stage_folder(stage: str, config: Config, data: ImageData, *parts: str) -> Path:
    """The work folder of one stage of a command, which goes when the stage's run is FINISHED.

    Args:
        parts: of a folder in it.
    """
    return work_folder(config, fingerprint(stage, config, data)[:16], *parts)


@contextmanager
def making(stage: str, config: Config, data: ImageData) -> Iterator[str | None]:
    """Let one process at a time make a result: the next one then finds it finished.

    Gives the id of the finished run, if there is one; else the block is to make it.
    """
    key = fingerprint(stage, config, data)[:16]
    waiting = f"{stage}: another process is making it; waiting"
    with alone(Path(config.cache_dir), key, waiting):
        yield find_finished(stage, config, data)


def current_run() -> RunInfo:
    """The run that is under way in this process; a command has one from its first line on."""
    import mlflow

    run = mlflow.active_run()
    if run is None:
        raise RuntimeError("no MLflow run is active")
    return run.info


def end_dead_runs(cache: Path) -> None:
    """Mark KILLED what processes of this machine and cache folder left RUNNING when they were killed.

    And what a signal ended: `mlflow run` writes FAILED over that when its command has ended.
    """
    import mlflow

    client, active = mlflow.MlflowClient(), current_run()
    where, own = [active.experiment_id], f"tags.made_in = '{_made_in(cache)}' and attributes.status"
    for run in client.search_runs(where, f"{own} = 'FAILED' and tags.stopped_by = 'signal'"):
        client.set_terminated(run.info.run_id, "KILLED", run.info.end_time)
    for run in client.search_runs(where, f"{own} = 'RUNNING'"):
        if run.info.run_id == active.run_id or _lives(int(run.data.tags.get("process", 0))):
            continue
        parts = [part for part in nested_runs(run.info.run_id) if part.info.status == "RUNNING"]
        for each in (run, *parts):
            if each.info.run_id != active.run_id:
                client.set_terminated(each.info.run_id, "KILLED")


def _lives(process: int) -> bool:
    """Whether another process than this one has the number."""
    if process in (0, os.getpid()):  # what had our number before us has ended
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def signature(cache: Path) -> dict[str, str]:
    """Tags that tell which process makes a run."""
    return {"made_in": _made_in(cache), "process": str(os.getpid())}


def _made_in(cache: Path) -> str:
    """Host and cache folder."""
    return f"{socket.gethostname()}:{cache.expanduser().absolute()}".replace("'", "_")


@contextmanager
def open_run(**options: Any) -> Iterator[Any]:
    """A run that ends as the block does: FINISHED, KILLED by a signal, FAILED by an error.

    The error is raised even where the store cannot be told of it.
    """
    import mlflow

    run = None
    try:
        with stop_after():
            run = mlflow.start_run(**options)
        yield run
        end_run(run)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or is_stopping()
        if stopped:
            _let_go(error)
        if stopped or failure(error):  # the store may be what failed: it is not asked for minutes
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
        if run:
            _mark(run, "KILLED" if stopped else "FAILED")
        raise


def _mark(run: Any, status: str) -> None:
    """End a run that is not as it should be, as far as the store lets itself be told."""
    import mlflow

    client, run_id, active = mlflow.MlflowClient(), run.info.run_id, _is_active(run)
    with suppress(Exception):
        if not active and client.get_run(run_id).info.status != "RUNNING":
            return  # a signal waited until it was ended
    with suppress(Exception):
        if status == "KILLED":
            client.set_tag(run_id, "stopped_by", "signal")
    with suppress(Exception):
        if active:
            mlflow.end_run(status)
        else:
            client.set_terminated(run_id, status)


def end_run(run: Any) -> None:
    """Mark it FINISHED, unless it is already; a signal waits for that."""
    import mlflow

    with stop_after():
        if _is_active(run):
            mlflow.end_run()


def _is_active(run: Any) -> bool:
    import mlflow

    active = mlflow.active_run()
    return active is not None and active.info.run_id == run.info.run_id


def _let_go(error: BaseException) -> None:
    """Free what the frames that an error came through still hold.

    A signal may have interrupted MLflow within a transaction: while that frame lives, its connection
    keeps the database locked for this very process too.
    """
    if getattr(error, "let_go", False):  # by the run within this one
        return
    cause: BaseException | None = error
    while cause:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    gc.collect()  # what SQLAlchemy makes is cyclic
    error.let_go = True  # type: ignore[attr-defined]


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
            notes.NOTE: notes.NOTES[stage],
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

    from attribution import machine

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
    link = notes.run_link(current_run().experiment_id, run_id)
    note = f"Nothing had changed: the result is in run [{run_id}]({link})."
    mlflow.set_tags({"reused_run_id": run_id, notes.NOTE: note})
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
    tag = notes.arms_view(run_id, f"Arms of {run.info.run_name}")
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


def nested_runs(run_id: str, wanted: dict[str, str] | None = None) -> list[Any]:
    """The runs nested in this one that have these values ('params.arm' and the like), oldest first."""
    import mlflow

    client = mlflow.MlflowClient()
    terms = {"tags.`mlflow.parentRunId`": run_id, **(wanted or {})}
    return client.search_runs(
        [client.get_run(run_id).info.experiment_id],
        " and ".join(f"{name} = '{value}'" for name, value in terms.items()),
        order_by=["attributes.start_time ASC"],
    )


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
