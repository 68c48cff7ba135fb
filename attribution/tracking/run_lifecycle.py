"""The life of an MLflow run: opened, and ended as its block ended, whatever comes in between."""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.runtime.signals import is_stopping, stop_after
from attribution.tracking.database import failure

if TYPE_CHECKING:
    from mlflow.entities import RunInfo


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
