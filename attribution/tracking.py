"""MLflow: one run a stage, its lineage and fingerprint, and the reuse of finished runs."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from attribution import notes
from attribution.config import AUTO, FIELDS, STAGE_GROUPS, Config, convert, parse, resolve
from attribution.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from attribution.data import ImageData, Listing

# Raised whenever training, or scoring, would compute something else from the same parameters and data.
TRAINING_VERSION = 2
ESTIMATOR_VERSION = 3
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
    """Hash of all that a stage's result depends on, its upstream stages included."""
    if stage == "finetune":
        return digest(stage, training_key(config, data), config.group("finetune"))
    upstream = fingerprint(UPSTREAM[stage], config, data)
    settings = config.group(stage)
    if stage == "ablation" and config.groups in data.examples:
        settings["groups"] = [config.groups, digest(*data.examples[config.groups])]
    if stage == "explain" and config.image:
        settings["image"] = [Path(config.image).name, _content(config.image)]  # both are shown
    return digest(stage, ESTIMATOR_VERSION, upstream, settings)


def _content(image: str) -> str:
    try:
        return hashlib.blake2b(Path(image).expanduser().read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise InputError(f"image={image}: cannot be read ({error.strerror})") from None


def work_folder(config: Config, *parts: str) -> Path:
    """A folder for unfinished work under cache_dir.

    Raises:
        InputError: it cannot be written.
    """
    return _cache_folder(config, "work", *parts)


def _cache_folder(config: Config, *parts: str) -> Path:
    from attribution.pixels import writing

    folder = Path(config.cache_dir).joinpath(*parts)
    with writing(config):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def run_entry_point(
    stage: str,
    make: Make,
    show: Callable[[str, Config], None],
    argv: Any = None,
    files: Callable[[Config], Iterable[Path]] = lambda config: (),
) -> None:
    """The life of one command: parse, open the run, reuse or make, show, and exit.

    Args:
        make: computes the stage and logs it to the active run.
        show: prints the result of the run with this id, and saves what was asked for.
        files: what `show` will save, and is refused where it is there.
    """
    try:
        given = parse(stage, argv)  # what is wrong with a flag is said before the slow imports
        if not (given.get("trak_run_id") or given.get("finetune_run_id")):
            resolve(given)
        _quiet()
        with _entry_run(stage) as run:
            config, data = _prepare(stage, given)
            refuse_existing(files(config), config)
            with _alone(stage, config, data):
                run_id = find_finished(stage, config, data)
                if run_id:
                    _mark_reused(stage, run_id)
                else:
                    run_id = run.info.run_id
                    _describe(stage, config, data)
                    _say_plan(stage, config, data)
                    make(config, data)
        show(run_id, config)
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from what is finished")
        sys.exit(130)


def _say_plan(stage: str, config: Config, data: ImageData) -> None:
    from attribution import parallel, plan

    jobs = parallel.resolve_jobs(config.jobs, config.device, 1 << 30)
    for line in plan.describe(plan.make_plan(stage, config, data), jobs):
        say(line)


def refuse_existing(files: Iterable[Path], config: Config) -> None:
    """Raise InputError where one of these files is there and may not be replaced, or cannot be made."""
    for file in files:
        if file.exists() and config.overwrite == "no":
            raise InputError(f"output={file}: exists; name another folder, or add --overwrite")
        nearest = next(folder for folder in file.absolute().parents if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"output={config.output}: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK):
            raise InputError(f"output={config.output}: {nearest} cannot be written to")


def _quiet() -> None:
    """Silence what a user of this project can do nothing about."""
    import warnings

    import mlflow  # noqa: F401  (it sets its own levels on import)

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    warnings.filterwarnings("ignore")
    for name in ("mlflow", "mlflow.store.db.utils", "alembic", "datasets", "TRAK", "STORE"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _entry_run(stage: str) -> Iterator[Any]:
    import mlflow

    _check_store()
    with mlflow.start_run() as run:
        mlflow.set_tag("stage", stage)
        _name_run(stage)
        try:
            yield run
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise
        except InputError as error:
            mlflow.set_tag("error", str(error))
            raise


def _check_store() -> None:
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith("file:") or "://" not in uri:
        raise InputError(
            f"MLFLOW_TRACKING_URI={uri}: MLflow has retired its file store; move the old mlruns "
            "folder away or set MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
        )


def _prepare(stage: str, given: dict[str, Any]) -> tuple[Config, ImageData]:
    """Resolve the parameters against the runs built on, and load the data."""
    run_ids = {name: given.get(f"{name}_run_id") for name in ("trak", "finetune")}
    inherited: dict[str, Any] = {}
    for upstream, run_id in run_ids.items():
        if run_id:
            inherited = {**_inherit(upstream, run_id), **inherited}
    # "auto" says nothing that could contradict the run built on.
    asked = {k: v for k, v in given.items() if not (k in inherited and v == "auto")}
    config = _resolve_hardware(resolve(asked, inherited))
    from attribution.data import LEFT_OUT, list_data, load_data

    listing = list_data(config)
    if config.preset == "images":
        config = _settle(stage, config, listing, asked.keys() | inherited.keys())
    data = load_data(config, listing)
    for upstream, run_id in run_ids.items():
        if run_id and _tags(run_id).get("fingerprint") != fingerprint(upstream, config, data):
            raise InputError(
                f"{upstream}_run_id={run_id}: was made from other data, another model, or another "
                f"version of this project than dataset={config.dataset} gives now; leave it out"
            )
    counts = ", ".join(f"{len(data.rows(s))} {s}" for s in ("train", "validation", "test"))
    flips = int(data.table("train")["is_flipped"].sum())
    say(
        f"data: {config.dataset}, {len(data.class_names)} classes, {counts}, {flips} labels flipped"
    )
    for note, count in (("undecodable files skipped", len(data.skipped)),
                        ("copies of test images dropped", data.dropped_duplicates),
                        ("training examples left out by keep", len(data.rows(LEFT_OUT)))):  # fmt: skip
        if count:
            say(f"data: {count} {note}")
    return config, data


def _settle(stage: str, config: Config, listing: Listing, known: Set[str]) -> Config:
    """Choose by the data what neither the caller nor the run built on has said, and tell."""
    from attribution import auto

    groups = STAGE_GROUPS[stage]
    names = [n for n in AUTO if n not in known and FIELDS[n].metadata["group"] in groups]
    if not names:
        return config
    facts = auto.gather(config, listing)
    chosen = auto.choose(facts, {n: getattr(config, n) for n in AUTO if n not in names})
    config = dataclasses.replace(config, **chosen)
    steps = config.epochs * math.ceil(facts.n_train / config.batch_size)
    source = f"median side {facts.side}"
    if facts.own_size:
        capped = ", without a GPU at most 64" * (config.image_size < facts.own_size)
        source = f"the model's own is {facts.own_size}{capped * (not facts.has_gpu)}"
    notes = {"image_size": f" ({source})", "epochs": f" ({steps:,} steps)"}
    said = "" if "model" in known else f"model {config.model}, "
    said += ", ".join(f"{name} {value}{notes.get(name, '')}" for name, value in chosen.items())
    say(f"auto: {said}")
    return config


def _resolve_hardware(config: Config) -> Config:
    from attribution.training import resolve_device, resolve_precision

    device = resolve_device(config.device)
    resolved = {}
    for name in ("precision", "feature_precision"):
        if name == "feature_precision" and config.trak_run_id:
            continue  # the scores are there
        dtype = resolve_precision(getattr(config, name), device, name)
        resolved[name] = str(dtype).removeprefix("torch.")
    # traker's own gradients know no autocast.
    if config.projector == "normal" and not config.trak_run_id:
        if config.feature_precision == "bfloat16":
            raise InputError("feature_precision=bfloat16: projector=normal is float32 only")
        resolved |= {"feature_precision": "float32", "num_blocks": 1}
    return dataclasses.replace(config, device=str(device), **resolved)


def _inherit(stage: str, run_id: str) -> dict[str, Any]:
    """The parameters that an upstream run was made with.

    Raises:
        InputError: no such run, of another stage, or not FINISHED.
    """
    import mlflow

    name = f"{stage}_run_id"
    try:
        run = mlflow.get_run(run_id)
    except mlflow.exceptions.MlflowException:
        raise InputError(f"{name}={run_id}: no such run in {mlflow.get_tracking_uri()}") from None
    found = run.data.tags.get("stage")
    if found != stage:
        raise InputError(f"{name}={run_id}: is a run of stage {found}, not {stage}")
    if run.info.status != "FINISHED":
        raise InputError(f"{name}={run_id}: is {run.info.status}, not FINISHED")
    if "fingerprint" not in run.data.tags:
        other = run.data.tags.get("reused_run_id")
        raise InputError(f"{name}={run_id}: only points to run {other}; name that one")
    names = Config.__dataclass_fields__.keys() & run.data.params.keys()
    wanted = {n for n in names if FIELDS[n].metadata["group"] in STAGE_GROUPS[stage]}
    resolved = {n: run.data.tags.get(f"resolved.{n}", run.data.params[n]) for n in wanted}
    return {n: convert(n, text) for n, text in resolved.items()}


def find_finished(stage: str, config: Config, data: ImageData) -> str | None:
    """The newest FINISHED run with the stage's fingerprint whose artifacts are all still there."""
    import mlflow

    key, needed = fingerprint(stage, config, data), NEEDED_ARTIFACTS[stage]
    if stage == "finetune":
        needed += tuple(f"checkpoints/{m:03d}/model.safetensors" for m in range(config.num_models))
    runs = mlflow.MlflowClient().search_runs(
        [mlflow.active_run().info.experiment_id],
        f"tags.stage = '{stage}' and tags.fingerprint = '{key}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    for run in runs:
        if all(_has_artifact(run.info.run_id, path) for path in needed):
            return run.info.run_id
    return None


def _has_artifact(run_id: str, path: str) -> bool:
    import mlflow

    folder = path.rpartition("/")[0] or None
    try:
        listed = mlflow.MlflowClient().list_artifacts(run_id, folder)
    except (mlflow.exceptions.MlflowException, OSError):
        return False
    return any(item.path == path for item in listed)


def obtain(stage: str, config: Config, data: ImageData, make: Make) -> str:
    """The id of a finished upstream run: the one named, one with the same fingerprint, or a new one.

    The active run is tagged with it.
    """
    import mlflow

    with _alone(stage, config, data):
        run_id = getattr(config, f"{stage}_run_id") or find_finished(stage, config, data)
        if run_id:
            say(f"{stage}: reusing run {run_id}")
        else:
            with mlflow.start_run(run_name=stage, nested=True) as run:
                run_id = run.info.run_id
                # Not a part of the run that needed it first: others will build on it too.
                mlflow.MlflowClient().delete_tag(run_id, "mlflow.parentRunId")
                _describe(stage, config, data)
                make(config, data)
    mlflow.set_tag(f"{stage}_run_id", run_id)
    return run_id


@contextmanager
def _alone(stage: str, config: Config, data: ImageData) -> Iterator[None]:
    """Let one process at a time make a result: the next one then finds it finished."""
    from filelock import FileLock, Timeout

    lock = FileLock(
        _cache_folder(config, "locks") / f"{fingerprint(stage, config, data)[:16]}.lock"
    )
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{stage}: another process is making it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _describe(stage: str, config: Config, data: ImageData) -> None:
    """Name, tags, parameters and data of the active run."""
    import mlflow

    key = fingerprint(stage, config, data)
    mlflow.set_tags(
        {
            "stage": stage,
            "fingerprint": key,
            "data_fingerprint": data.fingerprint,
            notes.NOTE: notes.NOTES[stage],
        }
    )
    _name_run(f"{stage} {Path(config.dataset).name} {key[:6]}")
    log_params(config.group(*STAGE_GROUPS[stage], "execution"))
    source = mlflow.data.from_pandas(
        data.examples.drop(columns="file_name"),
        source=config.dataset,
        name=Path(config.dataset).name,
        targets="label",
        digest=data.fingerprint[:8],
    )
    mlflow.log_input(source, context=stage)


def log_params(params: dict[str, Any]) -> None:
    """Log resolved parameters.

    `mlflow run` has logged its command line already, and MLflow lets no parameter change: what a
    value such as 'auto' came to is then the tag `resolved.NAME`.
    """
    import mlflow

    known = mlflow.MlflowClient().get_run(mlflow.active_run().info.run_id).data.params
    mlflow.log_params({k: v for k, v in params.items() if k not in known})
    differ = {k: params[k] for k in params.keys() & known if convert(k, known[k]) != params[k]}
    mlflow.set_tags({f"resolved.{k}": v for k, v in differ.items()})


def _mark_reused(stage: str, run_id: str) -> None:
    import mlflow

    say(f"{stage}: nothing has changed, reusing run {run_id}")
    link = notes.run_link(mlflow.active_run().info.experiment_id, run_id)
    note = f"Nothing had changed: the result is in run [{run_id}]({link})."
    mlflow.set_tags({"reused_run_id": run_id, notes.NOTE: note})
    _name_run(f"{stage} (see {run_id[:8]})")


def _name_run(name: str) -> None:
    """Name the active run, unless a person has: MLflow's own names are like shy-cat-123."""
    import mlflow

    run = mlflow.MlflowClient().get_run(mlflow.active_run().info.run_id)
    stage = run.data.tags["stage"]
    if re.fullmatch(rf"[a-z]+-[a-z]+-\d+|{stage}", run.info.run_name or stage):
        mlflow.set_tag("mlflow.runName", name)


def save_arms_view() -> None:
    """Let MLflow list a view of the active run's arms: sensible columns, the best arm first."""
    import mlflow

    client, run_id = mlflow.MlflowClient(), mlflow.active_run().info.run_id
    run = client.get_run(run_id)
    tag = notes.arms_view(run_id, f"Arms of {run.info.run_name}")
    client.set_experiment_tag(run.info.experiment_id, *tag)


def _tags(run_id: str) -> dict[str, str]:
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
        [mlflow.active_run().info.experiment_id],
        " and ".join(f"tags.{name} = '{value}'" for name, value in terms.items())
        + " and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    whole = (run.info.run_id for run in found if "fingerprint" in run.data.tags)
    return next(whole, None)


def lineage() -> dict[str, str]:
    """The ids of the active run and of those that it was built on, by name."""
    import mlflow

    run_id, found = mlflow.active_run().info.run_id, {}
    while run_id:
        tags = _tags(run_id)
        found[f"{tags['stage']} run"] = run_id
        run_id = tags.get(f"{UPSTREAM.get(tags['stage'])}_run_id")
    return found


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


def save_artifacts(run_id: str, config: Config, suffixes: tuple[str, ...]) -> Path:
    """Copy a run's uppermost artifacts of these kinds into the folder `output`; returns it.

    Raises:
        InputError: one of them is there and may not be replaced; then none is copied.
    """
    import mlflow

    folder = Path(config.output).expanduser()
    listed = mlflow.MlflowClient().list_artifacts(run_id)
    names = [item.path for item in listed if item.path.endswith(suffixes)]
    refuse_existing([folder / name for name in names], config)
    for name in names:
        save(artifact_path(run_id, name), folder / name)
    return folder


def save(source: Path, file: Path) -> None:
    """Copy a file to where a person wants it, whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, file)
    except OSError as error:
        raise InputError(f"output={file}: cannot be written ({error.strerror})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def file_name(text: str) -> str:
    """A text as the stem of a file's name."""
    return re.sub(r"[^\w\-.]+", "-", text).strip("-.")[:80] or "unnamed"


def metric_name(text: str) -> str:
    """A text with the characters that MLflow refuses in a metric's name replaced."""
    name = re.sub(r"[^\w\-. :/]", "_", text)
    # A name is a path too, and has to be the shortest way to write it.
    return name if posixpath.normpath(name) == name else name.replace("/", "_")


def log_series(metrics: list[tuple[str, float, int]]) -> None:
    """Log (name, value, step) metrics to the active run in as few calls as MLflow takes."""
    import time

    import mlflow
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entities = [Metric(name, float(value), now, step) for name, value, step in metrics]
    client, run_id = mlflow.MlflowClient(), mlflow.active_run().info.run_id
    for start in range(0, len(entities), 1000):
        client.log_batch(run_id, metrics=entities[start : start + 1000])


def log_table(table: pd.DataFrame, name: str) -> None:
    """Log a table twice: for MLflow's table view (json) and for everything else (csv)."""
    import mlflow

    mlflow.log_table(table, f"{name}.json")
    mlflow.log_text(table.to_csv(index=False), f"{name}.csv")
