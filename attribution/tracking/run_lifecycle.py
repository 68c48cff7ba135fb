"""The life of an MLflow run: opened, and ended as its block ended, whatever happens in between."""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run, RunInfo
from mlflow.exceptions import MlflowException

from attribution.errors import InputError, reason
from attribution.runtime.signals import is_stopping, stop_after
from attribution.tracking.database import OWN_MISTAKES, failure

SETTINGS = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")


def current_run() -> RunInfo:
    """The active run of this process; every command has one."""
    run = mlflow.active_run()
    if run is None:
        raise RuntimeError("no MLflow run is active")
    return run.info


def find_run(run_id: str) -> Run | None:
    """A run of the tracking store; None if it is unknown there or deleted, or no run has such an id."""
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def experiment_of(run_id: str) -> str:
    """The id of a run's experiment."""
    return mlflow.get_run(run_id).info.experiment_id


@contextmanager
def open_run(**options: Any) -> Iterator[Any]:
    """Open a run that ends as its block does: FINISHED, KILLED by a signal, or FAILED by an error.

    An error of the block is raised even if the tracking store cannot be told about it.

    Raises:
        InputError: the environment names a run or an experiment that is unknown or deleted.
    """
    run = None
    try:
        with stop_after(), _naming_settings():
            run = mlflow.start_run(**options)
        yield run
        end_run(run)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or is_stopping()
        if stopped:
            _release_database(error)
        if stopped or failure(error):  # the store may be what failed: do not retry for minutes
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
        if run:
            _mark(run, "KILLED" if stopped else "FAILED")
        raise


@contextmanager
def _naming_settings() -> Iterator[None]:
    """Name the settings of the environment that MLflow refuses."""
    # Before the block: MLflow takes the run's id out of the environment.
    given = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    try:
        yield
    except MlflowException as error:
        if error.error_code not in (*OWN_MISTAKES, "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"):
            raise
        raise InputError(
            f"{', '.join(given) or 'experiment'}: {reason(error)}; set MLFLOW_EXPERIMENT_NAME to "
            "another name, or type mlflow experiments restore --experiment-id ID"
        ) from None


def end_run(run: Any) -> None:
    """Mark a run FINISHED, unless it has ended; a signal waits for that."""
    with stop_after():
        if _is_active(run):
            mlflow.end_run()


def _mark(run: Any, status: str) -> None:
    """End a run with another status than FINISHED, as far as the tracking store answers."""
    client, run_id, active = mlflow.MlflowClient(), run.info.run_id, _is_active(run)
    with suppress(Exception):
        if not active and client.get_run(run_id).info.status != "RUNNING":
            return  # a signal waited until the run had ended
    with suppress(Exception):
        if status == "KILLED":
            client.set_tag(run_id, "stopped_by", "signal")
    with suppress(Exception):
        if active:
            mlflow.end_run(status)
        else:
            client.set_terminated(run_id, status)


def _is_active(run: Any) -> bool:
    active = mlflow.active_run()
    return active is not None and active.info.run_id == run.info.run_id


def _release_database(error: BaseException) -> None:
    """Free what the frames that an error came through still hold.

    A signal may interrupt MLflow within a transaction. While that frame lives, its connection keeps
    the database locked, for this process too.
    """
    cause: BaseException | None = error
    while cause:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    gc.collect()  # SQLAlchemy's objects refer to one another


def end_dead_runs(cache: Path) -> None:
    """Mark as KILLED the runs that dead processes of this machine and cache folder left RUNNING.

    Also runs that a signal ended: `mlflow run` overwrites their status with FAILED when its command
    has ended.
    """
    client, active = mlflow.MlflowClient(), current_run()
    where, own = [active.experiment_id], f"tags.made_in = '{_made_in(cache)}' and attributes.status"
    for run in client.search_runs(where, f"{own} = 'FAILED' and tags.stopped_by = 'signal'"):
        client.set_terminated(run.info.run_id, "KILLED", run.info.end_time)
    for run in client.search_runs(where, f"{own} = 'RUNNING'"):
        if run.info.run_id == active.run_id or is_alive(int(run.data.tags.get("process", 0))):
            continue
        nested = (
            f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and attributes.status = 'RUNNING'"
        )
        for each in (run, *client.search_runs(where, nested)):
            if each.info.run_id != active.run_id:
                client.set_terminated(each.info.run_id, "KILLED")


def is_alive(process: int) -> bool:
    """Whether a process with this number, other than this one, is running on this machine."""
    if process in (0, os.getpid()):  # an earlier process with our number has ended
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def signature(cache: Path) -> dict[str, str]:
    """Tags that say which process makes a run."""
    return {"made_in": _made_in(cache), "process": str(os.getpid())}


def _made_in(cache: Path) -> str:
    """Host and cache folder."""
    return f"{socket.gethostname()}:{cache.expanduser().absolute()}".replace("'", "_")
