"""The life of one command: its flags, its run, what it reuses or makes, and how it ends."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from attribution.cli.outputs import refuse_existing
from attribution.config import (
    AUTO,
    FIELDS,
    STAGE_GROUPS,
    Config,
    convert,
    default_of,
    parse,
    resolve,
)
from attribution.errors import InputError
from attribution.runtime.cache_folder import discard
from attribution.runtime.progress import say
from attribution.runtime.signals import end, ended_by_signals
from attribution.tracking import stage_runs
from attribution.tracking.database import failure, open_store
from attribution.tracking.fingerprint import fingerprint, stage_folder, work_folder
from attribution.tracking.run_lifecycle import (
    current_run,
    end_dead_runs,
    end_run,
    open_run,
    signature,
)

if TYPE_CHECKING:
    from attribution.cli.plan import Chain
    from attribution.data.dataset import ImageData, Listing


def main(
    stage: str,
    make: stage_runs.Make,
    show: Callable[[str, Config], None],
    files: Callable[[Config], Iterable[Path]] = lambda config: (),
) -> NoReturn:
    """run_entry_point for this process's own arguments, and its quick end."""
    run_entry_point(stage, make, show, sys.argv[1:], files, early=True)
    _end_workers()
    end(0)


def run_entry_point(
    stage: str,
    make: stage_runs.Make,
    show: Callable[[str, Config], None],
    argv: Any = None,
    files: Callable[[Config], Iterable[Path]] = lambda config: (),
    early: bool = False,
) -> None:
    """The life of one command: parse, open the run, reuse or make, show, and exit.

    Exit codes: 2 bad input, 1 a store or disk that failed (or a replay that differs), 128 + the
    signal's number when stopped by one.

    Args:
        make: computes the stage and logs it to the active run.
        show: prints the result of the run with this id, and saves what was asked for.
        files: what `show` will save, and is refused where it is there.
        early: start workers before it is known what there is for them to do.
    """
    argv = sys.argv[1:] if argv is None else argv
    with ended_by_signals() as asked:
        try:
            given = parse(stage, argv)  # what is wrong with a flag is said before the slow imports
            if not any(given.get(name) for name in ("trak_run_id", "finetune_run_id", "replay")):
                resolve(given)
            if early:
                _start_workers(stage, given)
            _quiet()
            run_id, config = _find_or_make(stage, make, files, given)
            show(run_id, config)
            if config.replay and not _is_identical(config.replay, run_id):
                sys.exit(1)
        except (KeyboardInterrupt, Exception) as error:
            if asked or isinstance(error, KeyboardInterrupt):
                _stop(asked)
            _end_workers()
            if isinstance(error, InputError):
                say(f"error: {error}")
                sys.exit(2)
            reason = failure(error)
            if not reason:
                raise
            say(f"error: {reason}")
            command = shlex.join(["python", "-m", f"scripts.{stage}", *argv])
            kept = _cache(given) / ("replays" if given.get("replay") else "work")
            say(f"what is finished is kept in {kept}; this goes on and sends it: {command}")
            sys.exit(1)


def _stop(asked: list[int]) -> NoReturn:
    say("stopped; the same command goes on from what is finished")
    _end_workers()
    if asked:
        end(128 + asked[0])
    sys.exit(128 + signal.SIGINT)


def _start_workers(stage: str, given: dict[str, Any]) -> None:
    """Have workers import while this process does, where there is a core for them and probably work."""
    known = ("backend", "jobs", "device", "num_models")
    config = resolve({name: given[name] for name in known if name in given})
    if config.backend != "local" or stage == "explain" or config.jobs == 1 or _may_use_gpu(config):
        return
    from attribution.runtime import parallel

    jobs = parallel.resolve_jobs(config.jobs, "cpu", config.num_models)
    if jobs > 1 and parallel.resolve_jobs(0, "cpu", 2) > 1:
        parallel.start_workers(jobs, _warm_up)


def _may_use_gpu(config: Config) -> bool:
    """Without a look by torch, which takes seconds to import."""
    return config.device != "cpu" and (config.device != "auto" or Path("/dev/nvidiactl").exists())


def _warm_up() -> None:
    from attribution.models import classifier

    classifier.warm_up()


def _end_workers() -> None:
    parallel = sys.modules.get("attribution.runtime.parallel")  # numpy takes its time
    if parallel:
        parallel.end_workers()


def _find_or_make(
    stage: str,
    make: stage_runs.Make,
    files: Callable[[Config], Iterable[Path]],
    given: dict[str, Any],
) -> tuple[str, Config]:
    """The id of the run that holds the result, and the resolved parameters."""
    with _entry_run(stage, given) as run:
        config, data = _prepare(stage, given)
        refuse_existing(files(config), config)
        with stage_runs.making(stage, config, data) as run_id:
            if run_id:
                stage_runs.mark_reused(stage, run_id)
            else:
                run_id = run.info.run_id
                stage_runs.describe(stage, config, data)
                _make(stage, config, data, make)
                # FINISHED while this process alone may make it: a waiting one then finds it.
                end_run(run)
            # Not before the run is FINISHED: a kill in between would lose both.
            discard(work_folder(config) if config.replay else stage_folder(stage, config, data))
    if config.keep_checkpoints != "all":
        _drop_checkpoints(config, data, stage_runs.finetune_run(run_id))
    return run_id, config


def _make(stage: str, config: Config, data: ImageData, make: stage_runs.Make) -> None:
    """Say what will be done, and do it, in the active run."""
    from attribution.cli import plan
    from attribution.runtime.device import resolve_device
    from attribution.runtime.parallel import resolve_jobs

    chain = plan.find_chain(stage, config, data)
    _say_plan(
        chain, config, data, resolve_jobs(config.jobs, resolve_device(config.device).type, 1 << 30)
    )
    make(config, data)
    stage_runs.log_environment()


def _drop_checkpoints(config: Config, data: ImageData, run_id: str) -> None:
    """Delete the artifacts of all checkpoints, or of all but the one with the lowest validation loss."""
    from attribution.models.ensemble import Ensemble

    members = Ensemble.load(stage_runs.artifact_path(run_id, "training/logits.npz"))
    best = members.best(data.labels("validation"))
    dropped = [
        m for m in range(len(members.masks)) if config.keep_checkpoints == "none" or m != best
    ]
    gone = stage_runs.delete_artifacts(run_id, [f"checkpoints/{m:03d}" for m in dropped])
    if gone:
        say(f"finetune: {gone} checkpoints of run {run_id} deleted (keep_checkpoints)")


def _cache(given: dict[str, Any]) -> Path:
    return Path(given.get("cache_dir") or default_of(FIELDS["cache_dir"])).expanduser()


def _is_identical(original: str, run_id: str) -> bool:
    from attribution.tracking import replay

    return replay.show(original, run_id)


def _say_plan(chain: Chain, config: Config, data: ImageData, jobs: int) -> None:
    from attribution.cli import disk, plan

    found = plan.make_plan(chain, config, data)
    disk.check_disk(found.need, config, current_run().artifact_uri)
    for line in plan.describe(found, jobs):
        say(line)


def _quiet() -> None:
    """Silence what a user of this project can do nothing about."""
    import warnings

    import mlflow  # noqa: F401  (it sets its own levels on import)

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "datasets", "TRAK", "STORE", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What these log as an error is raised too, and told in a line of our own.
    for name in ("PIL", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _entry_run(stage: str, given: dict[str, Any]) -> Iterator[Any]:
    import mlflow

    cache = _cache(given)
    open_store(cache)
    with open_run(tags={"stage": stage, **signature(cache)}) as run:
        stage_runs.name_run(stage)
        end_dead_runs(cache)
        try:
            yield run
        except InputError as error:
            mlflow.set_tag("error", str(error))
            raise


def _prepare(stage: str, given: dict[str, Any]) -> tuple[Config, ImageData]:
    """Resolve the parameters against the runs built on, and load the data."""
    run_ids = {name: given.get(f"{name}_run_id") for name in ("trak", "finetune")}
    inherited: dict[str, Any] = {}
    if given.get("replay"):
        inherited = _inherit(stage, given["replay"], "replay")
        # Threads decide last bits; who names other ones asks for another comparison.
        executed = ("jobs", "device", "backend", "gpus_per_task", "ray_address", "keep_checkpoints")
        inherited |= {k: given[k] for k in executed if k in given}
    for upstream, run_id in run_ids.items():
        if run_id:
            inherited = {**_inherit(upstream, run_id), **inherited}
    # "auto" says nothing that could contradict the run built on.
    asked = {k: v for k, v in given.items() if not (k in inherited and v == "auto")}
    config = _resolve_hardware(stage, resolve(asked, inherited))
    from attribution.data.dataset import LEFT_OUT, list_data, load_data

    listing = list_data(config)
    if config.preset == "images":
        config = _settle(stage, config, listing, asked.keys() | inherited.keys())
    data = load_data(config, listing)
    if config.replay and stage_runs.run_tags(config.replay)["data_fingerprint"] != data.fingerprint:
        raise InputError(f"replay={config.replay}: dataset={config.dataset} has changed since")
    for upstream, run_id in run_ids.items():
        if run_id and stage_runs.run_tags(run_id).get("fingerprint") != fingerprint(
            upstream, config, data
        ):
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
                        ("copies of test or validation images dropped", data.dropped_duplicates),
                        ("training examples left out by keep", len(data.rows(LEFT_OUT)))):  # fmt: skip
        if count:
            say(f"data: {count} {note}")
    return config, data


def _settle(stage: str, config: Config, listing: Listing, known: Set[str]) -> Config:
    """Choose by the data what neither the caller nor the run built on has said, and tell."""
    from attribution.cli import auto_settings

    groups = STAGE_GROUPS[stage]
    names = [n for n in AUTO if n not in known and FIELDS[n].metadata["group"] in groups]
    if not names:
        return config
    facts = auto_settings.gather(config, listing)
    chosen = auto_settings.choose(facts, {n: getattr(config, n) for n in AUTO if n not in names})
    config = dataclasses.replace(config, **chosen)
    steps = config.epochs * math.ceil(facts.n_train / config.batch_size)
    source = f"median side {facts.side}"
    if facts.own_size:
        capped = ", without a GPU at most 64" * (config.image_size < facts.own_size)
        source = f"the model's own is {facts.own_size}{capped * (not facts.has_gpu)}"
    remarks = {"image_size": f" ({source})", "epochs": f" ({steps:,} steps)"}
    said = "" if "model" in known else f"model {config.model}, "
    said += ", ".join(f"{name} {value}{remarks.get(name, '')}" for name, value in chosen.items())
    say(f"auto: {said}")
    return config


def _resolve_hardware(stage: str, config: Config) -> Config:
    from attribution.runtime.device import resolve_device, resolve_precision

    device = resolve_device(config.device)
    resolved: dict[str, Any] = {}
    for name in ("precision", "feature_precision"):
        if config.trak_run_id and (name == "feature_precision" or stage == "explain"):
            continue  # the scores are there, and what they were made with needs no such hardware
        dtype = resolve_precision(getattr(config, name), device, name)
        resolved[name] = str(dtype).removeprefix("torch.")
    # traker's own gradients know no autocast.
    if config.projector == "normal" and not config.trak_run_id:
        if config.feature_precision == "bfloat16":
            raise InputError("feature_precision=bfloat16: projector=normal is float32 only")
        resolved |= {"feature_precision": "float32", "num_blocks": 1}
    return dataclasses.replace(config, device=str(device), **resolved)


def _inherit(stage: str, run_id: str, parameter: str = "") -> dict[str, Any]:
    """The parameters that an upstream run, or one to be replayed, was made with.

    Raises:
        InputError: no such run, of another stage, or not FINISHED.
    """
    import mlflow

    name = parameter or f"{stage}_run_id"
    groups = (*STAGE_GROUPS[stage], *(["execution"] if parameter == "replay" else []))
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
    wanted = {n for n in names - {"cache_dir"} if FIELDS[n].metadata["group"] in groups}
    resolved = {n: run.data.tags.get(f"resolved.{n}", run.data.params[n]) for n in wanted}
    return {n: convert(n, text) for n, text in resolved.items()}
