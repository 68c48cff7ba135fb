"""The parameters of a command resolved: against the runs built on, the hardware, and the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set
from pathlib import Path
from typing import Any

import mlflow

from attribution.cli import auto_settings, time_budget
from attribution.config import AUTO, FIELDS, Config, convert, resolve
from attribution.data.dataset import ImageData, load_data
from attribution.data.decisions import LEFT_OUT
from attribution.data.listing import Listing, folder_of, list_data
from attribution.errors import InputError
from attribution.models import given as given_checkpoints
from attribution.runtime.device import resolve_device, resolve_precision
from attribution.runtime.progress import say
from attribution.stages import STAGES, Stage
from attribution.tracking.fingerprint import fingerprint
from attribution.tracking.run_lifecycle import find_run
from attribution.tracking.stage_runs import newest_lineages, params_of, run_tags

# What a replay may change: where and how it is executed. The number of threads decides last bits,
# so that another number is another comparison.
REPLAY_MAY_CHANGE = (
    "jobs", "device", "backend", "gpus_per_task", "ray_address", "keep_checkpoints", "gpu_kernels",
    "cuda_graphs",
)  # fmt: skip
# Times as large with quality=best. A longer projection makes the scores of a head alone worse.
BEST = {"num_models": 3, "proj_dim": 2}


def cache_of(given: dict[str, Any]) -> Path:
    """The cache folder under the parameters that a caller gave."""
    return Path(given.get("cache_dir") or Config().cache_dir).expanduser()


def prepare(stage: Stage, given: dict[str, Any]) -> tuple[Config, ImageData]:
    """Resolve the parameters and load the data.

    Raises:
        InputError: a parameter contradicts a run built on, or the data cannot be read.
    """
    earlier, inherited = _of_earlier_run(stage, given), _inherit_all(stage, given)
    given = earlier | {k: v for k, v in given.items() if not (k in earlier and v == "auto")}
    if given.get("checkpoints") or inherited.get("checkpoints"):
        given = given | given_checkpoints.implied(given, inherited)
    # "auto" cannot contradict the run built on.
    asked = {k: v for k, v in given.items() if not (k in inherited and v == "auto")}
    config = auto_settings.choose_model(_resolve_hardware(stage, resolve(asked, inherited)))
    listing = list_data(config)
    known = {name for name, value in (asked | inherited).items() if value != "auto"}
    if config.preset == "images":
        config = _choose_by_data(stage, config, listing, known)
    if config.quality == "best" and not config.replay:
        config = _better(config, known)
    data = load_data(config, listing)
    config = _by_count(config, len(data.rows("train")))
    _check_unchanged(config, data)
    _say_data(config, data)
    if config.time_budget and not config.replay:
        config = time_budget.fit(stage, config, data, asked.keys() | inherited.keys())
    return config, data


def _better(config: Config, known: Set[str]) -> Config:
    """Raise what makes scores better, where it is left open, and say so.

    Raises:
        InputError: nothing is left open.
    """
    of_head = {"proj_dim"} if config.train_layers == "head" else set()
    open_ = [name for name in BEST if name not in known | of_head]
    chosen = {name: BEST[name] * getattr(config, name) for name in open_}
    if not chosen:
        raise InputError(
            f"quality=best: num_models={config.num_models} and proj_dim={config.proj_dim} are "
            "decided already; leave them out, or quality"
        )
    say(f"quality=best: {', '.join(f'{name} {value}' for name, value in chosen.items())}")
    return dataclasses.replace(config, **chosen)


def _by_count(config: Config, n_train: int) -> Config:
    """Turn `count` into `frac`, so that one comparison has one description.

    Raises:
        InputError: a number below 1, or as large as the training set.
    """
    for count in config.counts:
        if not 0 < count < n_train:
            raise InputError(f"count={count}: must be from 1 to {n_train - 1} training examples")
    fracs = ",".join(f"{count / n_train:.9g}" for count in config.counts)
    return dataclasses.replace(config, count="", frac=fracs) if fracs else config


def _of_earlier_run(stage: Stage, given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of an earlier run that count as if they were typed.

    A command that names no data takes those of the newest run, unless that is one of the digits. An
    explanation of named data takes those of its newest scores that no other flag contradicts.
    """
    dataset = given.get("dataset")
    origins = ("trak_run_id", "finetune_run_id", "replay", "checkpoints")
    if any(map(given.get, origins)) or given.get("preset", "auto") != "auto":
        return {}
    if dataset == "digits" or dataset and stage.name != "explain":
        return {}
    wanted = next(iter(stage.upstream), "finetune")
    for run_ids in newest_lineages():
        name = wanted if wanted in run_ids else next(iter(run_ids))
        found = _inherit(STAGES[name], run_ids[name], f"{name}_run_id")
        if not dataset and found["dataset"] == "digits":
            return {}
        if name == wanted and (not dataset or _agree(found, given)):
            say(
                f"{stage.name}: takes dataset={found['dataset']} and the parameters of {name} run "
                f"{run_ids[name]}" + ("" if dataset else "; --dataset digits takes the digits")
            )
            not_taken = ["keep", "labels"] if stage.name == "finetune" else []
            if given.get("quality") == "best":
                not_taken += BEST
            return {k: v for k, v in found.items() if k not in not_taken}
    return {}


def _agree(found: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether the parameters of a run are of the data that a caller names, and contradict no other."""
    own, named = (folder_of(each["dataset"]) or each["dataset"] for each in (found, given))
    typed = {k: v for k, v in given.items() if k in found and k != "dataset" and v != "auto"}
    return own == named and found.items() >= typed.items()


def _inherit_all(stage: Stage, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters that come from runs that the caller named."""
    inherited: dict[str, Any] = {}
    if given.get("replay"):
        inherited = _inherit(stage, given["replay"], "replay", "execution")
        inherited |= {k: given[k] for k in REPLAY_MAY_CHANGE if k in given}
    for upstream in ("trak", "finetune"):
        run_id = given.get(f"{upstream}_run_id")
        if run_id:
            inherited = _inherit(STAGES[upstream], run_id, f"{upstream}_run_id") | inherited
    return inherited


def _inherit(stage: Stage, run_id: str, parameter: str, *more_groups: str) -> dict[str, Any]:
    """The parameters that a finished run was made with.

    Args:
        parameter: that names the run, for error messages.
        more_groups: parameter groups beside those that the stage's result depends on.

    Raises:
        InputError: no such run, of another stage, or not FINISHED.
    """
    shown = f"{parameter}={run_id}"
    run = find_run(run_id)
    if not run:
        raise InputError(
            f"{shown}: no such run in {mlflow.get_tracking_uri()}, or it is deleted (mlflow runs "
            "restore)"
        )
    found = run.data.tags.get("stage")
    if found != stage.name:
        raise InputError(f"{shown}: is a run of stage {found}, not {stage.name}")
    if run.info.status != "FINISHED":
        raise InputError(f"{shown}: is {run.info.status}, not FINISHED")
    if "fingerprint" not in run.data.tags:
        other = run.data.tags.get("reused_run_id")
        raise InputError(f"{shown}: only points to run {other}; name that one")
    groups = (*stage.all_groups, *more_groups)
    values = {
        name: convert(name, text)
        for name, text in params_of(run).items()
        if name in FIELDS and name != "cache_dir" and FIELDS[name].metadata["group"] in groups
    }
    if values.get("checkpoints") and parameter != "replay":  # how to retrain is still open
        training = [name for name in values if FIELDS[name].metadata["group"] == "training"]
        for name in set(training).difference(given_checkpoints.SETTINGS):
            del values[name]
    return values


def _resolve_hardware(stage: Stage, config: Config) -> Config:
    """Replace `auto` by the device and the precisions that it stands for on this machine."""
    device = resolve_device(config.device)
    resolved: dict[str, Any] = {}
    for name in ("precision", "feature_precision"):
        if config.trak_run_id and (name == "feature_precision" or stage.name == "explain"):
            continue  # the scores are there, and what made them need not run on this machine
        dtype = resolve_precision(getattr(config, name), device, name)
        resolved[name] = str(dtype).removeprefix("torch.")
    # traker's own gradients do not support autocast.
    if config.projector == "normal" and not config.trak_run_id:
        if config.feature_precision == "bfloat16":
            raise InputError("feature_precision=bfloat16: projector=normal is float32 only")
        resolved |= {"feature_precision": "float32", "num_blocks": 1}
    return dataclasses.replace(config, device=str(device), **resolved)


def _choose_by_data(stage: Stage, config: Config, listing: Listing, known: Set[str]) -> Config:
    """Choose the settings that neither the caller nor a run built on has given, and print them."""
    names = [n for n in AUTO if n not in known and FIELDS[n].metadata["group"] in stage.all_groups]
    values = {n: getattr(config, n) for n in ("model", "train_layers") if n not in known}
    if not (names or values) or config.has_no_start:  # nothing will be trained
        return config
    facts = auto_settings.gather(config, listing)
    given = {n: getattr(config, n) for n in AUTO if n not in names}
    chosen = auto_settings.choose(facts, given)
    config = dataclasses.replace(config, **chosen)
    reasons = _reasons(config, facts)
    shown = (f"{name} {value}{reasons.get(name, '')}" for name, value in (values | chosen).items())
    say(f"auto: {', '.join(shown)}")
    return config


def _reasons(config: Config, facts: auto_settings.Facts) -> dict[str, str]:
    """Why some of the settings were chosen, in brackets."""
    size = f"median side {facts.side}"
    if facts.own_size:
        size = f"the model's own is {facts.own_size}"
        if not facts.has_gpu and config.image_size <= 64 < min(facts.own_size, facts.side):
            size += ", without a GPU at most 64"
    steps = config.epochs * math.ceil(facts.n_train / config.batch_size)
    layers = "" if config.train_layers == "all" else " (without a GPU)"
    return {"train_layers": layers, "image_size": f" ({size})", "epochs": f" ({steps:,} steps)"}


def _check_unchanged(config: Config, data: ImageData) -> None:
    """Refuse runs to build on, or to replay, that were made from other data."""
    if config.replay and run_tags(config.replay)["data_fingerprint"] != data.fingerprint:
        raise InputError(f"replay={config.replay}: dataset={config.dataset} has changed since")
    for upstream in ("trak", "finetune"):
        run_id = getattr(config, f"{upstream}_run_id")
        if run_id and run_tags(run_id).get("fingerprint") != fingerprint(upstream, config, data):
            raise InputError(
                f"{upstream}_run_id={run_id}: was made from other data, another model, or another "
                f"version of this project than dataset={config.dataset} gives now; leave it out"
            )


def _say_data(config: Config, data: ImageData) -> None:
    counts = ", ".join(f"{len(data.rows(s))} {s}" for s in ("train", "validation", "test"))
    flips = int(data.table("train")["is_flipped"].sum())
    say(
        f"data: {config.dataset}, {len(data.class_names)} classes, {counts}, {flips} labels flipped"
    )
    notes = {
        "undecodable files skipped": len(data.skipped),
        "copies of test or validation images dropped": data.dropped_duplicates,
        "images left out by keep": len(data.rows(LEFT_OUT)),
    }
    for note, count in notes.items():
        if count:
            say(f"data: {count} {note}")
