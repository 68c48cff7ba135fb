"""A stage's MLflow run: described, found again, and connected with the runs that it was built on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Run
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from attribution.config import Config, convert
from attribution.data.dataset import ImageData
from attribution.data.listing import folder_of
from attribution.errors import InputError, reason
from attribution.runtime import machine
from attribution.runtime.cache_folder import alone
from attribution.runtime.progress import say
from attribution.runtime.safe_files import read_json
from attribution.stages import STAGES, Stage
from attribution.tracking.artifacts import artifact_path, has_artifact
from attribution.tracking.database import is_machine_error
from attribution.tracking.fingerprint import fingerprint
from attribution.tracking.links import run_link
from attribution.tracking.run_lifecycle import current_run, find_run

NOTE = "mlflow.note.content"  # the tag with the markdown at the top of a run's page
ENVIRONMENT = "environment.json"  # what a run was made with, beside its parameters
MOST_RUNS = 100  # that are looked at for parameters to take over
LONG_PARAMS = "parameters.json"  # the parameters that are too long for MLflow


@contextmanager
def making(stage: str, config: Config, data: ImageData) -> Iterator[str | None]:
    """Let one process at a time make a result, so that the next process finds it finished.

    Yields the id of the finished run if there is one; otherwise the block must make it.
    """
    key = fingerprint(stage, config, data)[:16]
    waiting = f"{stage}: another process is making it; waiting"
    with alone(Path(config.cache_dir), key, waiting):
        yield find_finished(stage, config, data)


def find_finished(stage: str, config: Config, data: ImageData) -> str | None:
    """The newest FINISHED run of the active experiment with this stage's fingerprint and artifacts.

    A run that was built on one that is gone does not count.
    """
    terms = f"tags.stage = '{stage}' and tags.fingerprint = '{fingerprint(stage, config, data)}'"
    for run in mlflow.MlflowClient().search_runs(
        [current_run().experiment_id],
        f"{terms} and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    ):
        if _has_upstream(run) and is_whole(stage, run.info.run_id, config):
            return run.info.run_id
    return None


def reusable(stage: Stage, config: Config, data: ImageData) -> dict[str, str | None]:
    """The run to reuse for each upstream stage, in the order of computation; None: compute it."""
    found: dict[str, str | None] = {}
    wanted = list(stage.needed(config))
    while wanted:
        name = wanted.pop(0)
        if name not in found:
            found[name] = (
                getattr(config, f"{name}_run_id")
                or _scored_by(found.get("trak"), name, config)
                or find_finished(name, config, data)
            )
            if not found[name]:
                wanted += STAGES[name].needed(config)
    return {name: found[name] for name in STAGES if name in found}


def _scored_by(trak_id: str | None, name: str, config: Config) -> str | None:
    """The finetune run whose checkpoints a trak run scored, if they are still there."""
    if not trak_id or name != "finetune":
        return None
    own = run_tags(trak_id)["finetune_run_id"]
    return own if is_whole(name, own, config) else None


def _has_upstream(run: Run) -> bool:
    """Whether the runs that a run was built on are still there."""
    ids = [run.data.tags.get(f"{stage}_run_id") for stage in STAGES]
    return all(find_run(run_id) for run_id in ids if run_id)


def newest_lineages() -> Iterator[dict[str, str]]:
    """The lineages of the newest FINISHED runs of the active experiment, one after the other."""
    for run in mlflow.MlflowClient().search_runs(
        [current_run().experiment_id],
        "attributes.status = 'FINISHED' and tags.stage != 'ablation_arm'",
        order_by=["attributes.start_time DESC"],
        max_results=MOST_RUNS,
    ):
        found = lineage(run.data.tags.get("reused_run_id", run.info.run_id))
        if found:
            yield found


def is_whole(stage: str, run_id: str, config: Config) -> bool:
    """Whether a run is still there, with the artifacts that later stages need."""
    paths = STAGES[stage].artifacts
    numbers = range(config.num_checkpoints)
    needed = dict.fromkeys(path.format(m=m) for path in paths for m in numbers)
    return bool(find_run(run_id)) and all(has_artifact(run_id, path) for path in needed)


def run_tags(run_id: str) -> dict[str, str]:
    """The tags of a run."""
    return mlflow.get_run(run_id).data.tags


def lineage(run_id: str | None) -> dict[str, str]:
    """The ids of a run and of the runs that it was built on, by stage, as far as they are there."""
    found = {}
    while run_id and (run := find_run(run_id)) and run.data.tags["stage"] in STAGES:
        tags = run.data.tags
        found[tags["stage"]] = run_id
        upstream = STAGES[tags["stage"]].upstream[:1]
        run_id = tags.get(f"{upstream[0]}_run_id") if upstream else None
    return found


def describe(stage: str, config: Config, data: ImageData) -> None:
    """Give the active run its name, tags, parameters and data set."""
    key = fingerprint(stage, config, data)
    tags = {
        "stage": stage,
        "fingerprint": key,
        "data_fingerprint": data.fingerprint,
        NOTE: STAGES[stage].note,
    }
    mlflow.set_tags(tags | ({"replay_of": config.replay} if config.replay else {}))
    name_run(_name_of(stage, config, key))
    log_params(_params(stage, config))
    table = from_pandas(
        data.examples.drop(columns="file_name"),
        source=_source(config.dataset),
        name=Path(config.dataset).name,
        targets="label",
        digest=data.fingerprint[:8],
    )
    mlflow.log_input(table, context=stage)


def _source(dataset: str) -> DatasetSource | str:
    """Where the images come from, as MLflow describes it: code, a folder, or the Hub."""
    if dataset == "digits":
        return CodeDatasetSource({"mlflow.source.name": "sklearn.datasets.load_digits"})
    folder = folder_of(dataset)
    return str(folder) if folder else HuggingFaceDatasetSource(dataset)


def _name_of(stage: str, config: Config, key: str) -> str:
    """A name that tells runs apart: data, for an ablation shares and arms, and the fingerprint's start."""
    words = [stage, Path(config.dataset).name]
    if stage == "ablation":
        words += [f"frac {config.frac}", config.arms if len(config.arms) < 30 else "several arms"]
    return " ".join([*words, key[:6]])


def log_environment(stage: str, config: Config) -> None:
    """Log versions, hardware, command line and long parameters, the first artifacts of the active run.

    Raises:
        InputError: the artifact store cannot be written.
    """
    documents, params = {ENVIRONMENT: machine.environment()}, _params(stage, config)
    if long := {name: value for name, value in params.items() if _is_long(value)}:
        documents[LONG_PARAMS] = long
    try:
        for name, document in documents.items():
            mlflow.log_dict(document, name)
    except Exception as error:  # of many kinds: every store has its own
        place = current_run().artifact_uri
        if place.startswith(("mlflow-artifacts:", "http")) or is_machine_error(error):
            raise
        advice = "make it writable, or set MLFLOW_EXPERIMENT_NAME to the name of another experiment"
        if isinstance(error, ImportError):
            advice = f"type pip install {error.name}"
        raise InputError(
            f"artifact store {place}: cannot be written ({reason(error)}); {advice}"
        ) from None


def _params(stage: str, config: Config) -> dict[str, Any]:
    return config.group(*STAGES[stage].all_groups, "execution")


def _is_long(value: Any) -> bool:
    return len(str(value)) > MAX_PARAM_VAL_LENGTH


def log_params(params: dict[str, Any]) -> None:
    """Log resolved parameters.

    `mlflow run` has logged its command line already, and MLflow does not let a parameter change.
    A value that was resolved later, such as 'auto', therefore becomes the tag `resolved.NAME`.
    A value that is too long for MLflow is cut off.
    """
    params = {k: v[:MAX_PARAM_VAL_LENGTH] if _is_long(v) else v for k, v in params.items()}
    known = mlflow.MlflowClient().get_run(current_run().run_id).data.params
    mlflow.log_params({k: v for k, v in params.items() if k not in known})
    differ = {k: params[k] for k in params.keys() & known if convert(k, known[k]) != params[k]}
    mlflow.set_tags({f"resolved.{k}": v for k, v in differ.items()})


def params_of(run: Run) -> dict[str, str]:
    """The resolved parameters that a run was made with, as texts."""
    logged = run.data.params
    found = {name: run.data.tags.get(f"resolved.{name}", text) for name, text in logged.items()}
    is_cut = MAX_PARAM_VAL_LENGTH in map(len, found.values())
    if is_cut and has_artifact(run.info.run_id, LONG_PARAMS):
        found |= read_json(artifact_path(run.info.run_id, LONG_PARAMS))
    return found


def mark_reused(stage: str, run_id: str) -> None:
    """Let the active run point to the finished run that has its result."""
    say(f"{stage}: nothing has changed, reusing run {run_id}")
    link = run_link(current_run().experiment_id, run_id)
    note = f"Nothing had changed: the result is in run [{run_id}]({link})."
    mlflow.set_tags({"reused_run_id": run_id, NOTE: note})
    name_run(f"{stage} (see {run_id[:8]})")


def name_run(name: str) -> None:
    """Name the active run, unless a person has named it. MLflow's own names look like shy-cat-123."""
    run = mlflow.MlflowClient().get_run(current_run().run_id)
    stage = run.data.tags["stage"]
    if re.fullmatch(rf"[a-z]+-[a-z]+-\d+|{stage}", run.info.run_name or stage):
        mlflow.set_tag("mlflow.runName", name)
