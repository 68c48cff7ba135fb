"""One command from its parameters to its result: upstream stages are reused or made, then its own."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow

from attribution.cli import plan
from attribution.cli.outputs import refuse_existing
from attribution.cli.settings import cache_of, prepare
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError, StoreFailure
from attribution.models.checkpoints import checkpoint_name
from attribution.runtime.cache_folder import alone, discard, size_of
from attribution.runtime.pace import Pace
from attribution.runtime.parallel import end_workers
from attribution.runtime.progress import follow, say
from attribution.stages import STAGES, Stage
from attribution.tracking import stage_runs
from attribution.tracking.artifacts import address, delete_models
from attribution.tracking.database import failure, open_store
from attribution.tracking.fingerprint import fingerprint, stage_folder, work_folder
from attribution.tracking.job import Job, Upstream
from attribution.tracking.record import log_record
from attribution.tracking.replay import report_replay
from attribution.tracking.run_lifecycle import (
    current_run,
    end_dead_runs,
    end_run,
    is_alive,
    open_run,
    signature,
)


@dataclass
class Command:
    """One command under way.

    Attributes:
        stage: the stage that was asked for.
        made: the stages that this command has computed, by name.
        has_begun: whether it has begun to compute one.
    """

    stage: Stage
    config: Config
    data: ImageData
    made: dict[str, Upstream] = field(default_factory=dict)
    has_begun: bool = False

    def find_or_make(self, run: Any) -> Upstream:
        """The stage's result: that of a finished run, or computed and logged to this run."""
        name = self.stage.name
        with stage_runs.making(name, self.config, self.data) as found:
            if found:
                stage_runs.mark_reused(name, found)
                return self._load(name, found)
            stage_runs.describe(name, self.config, self.data)
            runs = stage_runs.reusable(self.stage, self.config, self.data)
            self._prepare(runs)
            stage_runs.log_environment(name, self.config)
            upstream: dict[str, Upstream] = {}
            for stage, run_id in runs.items():
                upstream[stage] = (
                    self._reuse(stage, run_id) if run_id else self._obtain(stage, upstream)
                )
            done = self._make(self.stage, upstream)
            # FINISHED before the lock is released, so that a waiting process finds it.
            end_run(run)
        return done

    def _prepare(self, runs: dict[str, str | None]) -> None:
        """Refuse what cannot work, then print the plan."""
        reused = {name: run_id for name, run_id in runs.items() if run_id}
        names = [self.stage.name, *(name for name in reversed(runs) if name not in reused)]
        scripts = {name: STAGES[name].script() for name in names}
        for script in scripts.values():
            script.check(self.config, self.data)
        estimates = {n: script.estimate(self.config, self.data) for n, script in scripts.items()}
        finished = sum(size_of(stage_folder(name, self.config, self.data)) for name in names)
        plan.check_disk(estimates, self.config, current_run().artifact_uri, finished)
        seconds = plan.seconds_of(estimates, self.config, self.data.class_names)
        for line in plan.describe(estimates, reused, seconds, self.config):
            say(line)
        follow(Pace({name: seconds[name] for name in STAGES if name in seconds}))

    def _reuse(self, name: str, run_id: str) -> Upstream:
        say(f"{name}: reusing run {run_id}")
        return self._load(name, run_id)

    def _load(self, name: str, run_id: str) -> Upstream:
        if not _is_in_use(run_id, Path(self.config.cache_dir)):
            # A killed command may have left it behind after the run was FINISHED.
            discard(stage_folder(name, self.config, self.data))
        return Upstream(run_id, STAGES[name].script().load(run_id, self.config, self.data))

    def _obtain(self, name: str, upstream: dict[str, Upstream]) -> Upstream:
        """Compute an upstream stage in a run of its own, unless another process was first."""
        with stage_runs.making(name, self.config, self.data) as found:
            if found:
                return self._reuse(name, found)
            tags = signature(Path(self.config.cache_dir))
            with open_run(run_name=name, nested=True, tags=tags) as run:
                # Other commands will build on it too, so it does not belong to this one's run.
                mlflow.MlflowClient().delete_tag(run.info.run_id, "mlflow.parentRunId")
                stage_runs.describe(name, self.config, self.data)
                stage_runs.log_environment(name, self.config)
                return self._make(STAGES[name], upstream)

    def _make(self, stage: Stage, upstream: dict[str, Upstream]) -> Upstream:
        """Compute a stage and log its result to the active run."""
        run = current_run()
        job = Job(self.config, self.data, upstream, run.run_id, run.experiment_id)
        mlflow.set_tags({f"{name}_run_id": run_id for name, run_id in job.run_ids.items()})
        script, start = stage.script(), time.monotonic()
        self.has_begun = True
        result = script.run(job)
        record = script.record(job, result)
        log_record(record)
        said = f"{stage.name}: finished in {time.monotonic() - start:.0f} s"
        if (accuracy := record.metrics.get("validation_accuracy_mean")) is not None:
            said += f", validation accuracy {accuracy:.4f} (mean over checkpoints)"
        say(f"{said}, run {run.run_id} in {address(run.run_id)}")
        self.made[stage.name] = done = Upstream(run.run_id, result)
        return done

    def tidy(self, done: Upstream) -> None:
        """Delete what is no longer needed: unfinished work, and checkpoints if asked to."""
        if self.config.replay:
            discard(work_folder(self.config))
        for name in self.made:
            discard(stage_folder(name, self.config, self.data))
        if self.config.keep_checkpoints != "all":
            self._drop_checkpoints(done)

    def _drop_checkpoints(self, done: Upstream) -> None:
        """Delete the checkpoints that this command made: all, or all but the best on validation."""
        if "finetune" not in self.made:
            own = stage_runs.lineage(done.run_id).get("finetune", "")
            say(f"finetune: run {own} was made by an earlier command; its checkpoints are kept")
            return
        run_id, members = self.made["finetune"].run_id, self.made["finetune"].result.members
        best = members.best(self.data.labels("validation"))
        keeps_best = self.config.keep_checkpoints == "best"
        dropped = [m for m in range(len(members.masks)) if not (keeps_best and m == best)]
        key = fingerprint("finetune", self.config, self.data)[:16]
        with alone(Path(self.config.cache_dir), key, "finetune: another process uses it; waiting"):
            gone = delete_models(run_id, [checkpoint_name(m) for m in dropped])
        say(f"finetune: {gone} checkpoints of run {run_id} deleted (keep_checkpoints)")


def run(stage: Stage, given: dict[str, Any]) -> int:
    """Carry out a command whose flags were parsed, and return its exit code.

    Raises:
        InputError: the parameters or the data cannot work.
        StoreFailure: the tracking store or a disk failed.
    """
    commands: list[Command] = []
    with ended_well(given):
        with own_run(stage, given, commands) as run:
            config, data = prepare(stage, given)
            script = stage.script()
            refuse_existing(script.outputs(config), config)
            commands.append(Command(_answering(stage, config, data), config, data))
            done = commands[0].find_or_make(run)
        commands[0].tidy(done)
        script.show(done, config, data)
        if config.replay and not report_replay(config.replay, done.run_id):
            return 1
    return 0


@contextmanager
def ended_well(given: dict[str, Any]) -> Iterator[None]:
    """Raise an error of the store or of a disk as one; end worker processes in any case.

    Raises:
        StoreFailure: the tracking store or a disk failed.
    """
    _quiet()
    try:
        yield
    except Exception as error:
        reason = failure(error)
        if not reason:
            raise
        kept = cache_of(given) / ("replays" if given.get("replay") else "work")
        raise StoreFailure(reason, kept) from error
    finally:
        end_workers()


@contextmanager
def own_run(stage: Stage, given: dict[str, Any], commands: list[Command]) -> Iterator[Any]:
    """The run of the command itself, in an open tracking store.

    A typing error is not a result: where bad input ended the block before one of the commands began to
    compute, the FAILED run goes to MLflow's bin.
    """
    cache = cache_of(given)
    run, is_mlflows = None, "MLFLOW_RUN_ID" in os.environ  # set by `mlflow run`
    open_store(cache)
    try:
        with open_run(tags={"stage": stage.name, **signature(cache)}) as run:
            stage_runs.name_run(stage.name)
            end_dead_runs(cache)
            yield run
    except InputError as error:
        if run:
            client = mlflow.MlflowClient()
            client.set_tag(run.info.run_id, "error", str(error))
            if not is_mlflows and not any(each.has_begun for each in commands):
                client.delete_run(run.info.run_id)
        raise


def _answering(stage: Stage, config: Config, data: ImageData) -> Stage:
    """The stage whose result the command needs: an upstream one where that is enough."""
    enough = [name for parameter, name in stage.enough_for.items() if getattr(config, parameter)]
    if not enough or config.replay or stage_runs.find_finished(stage.name, config, data):
        return stage
    stage.script().check(config, data)
    stage_runs.name_run(enough[0])
    return STAGES[enough[0]]


def _is_in_use(run_id: str, cache: Path) -> bool:
    """Whether the process that made a run may still use its work folder."""
    tags = stage_runs.run_tags(run_id)
    is_ours = tags.get("made_in") == signature(cache)["made_in"]
    return not is_ours or is_alive(int(tags.get("process", 0)))


def _quiet() -> None:
    """Silence warnings that a user of this project can do nothing about."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    warnings.filterwarnings("ignore")
    for name in ("mlflow", "alembic", "datasets", "TRAK", "STORE", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Their errors are raised too, and then reported in a line of our own.
    for name in ("PIL", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
