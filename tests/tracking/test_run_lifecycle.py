"""Runs end as their block ended: FINISHED, KILLED or FAILED."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from places import Place

from attribution.errors import InputError
from attribution.runtime.signals import ended_by_signals
from attribution.tracking.run_lifecycle import end_dead_runs, open_run, signature

NewPlace = Callable[..., Place]


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a store without runs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))


def test_a_signal_that_a_library_turns_into_another_error_still_marks_the_run_killed(
    store: Path,
) -> None:
    with pytest.raises(RuntimeError), ended_by_signals(), open_run() as run:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            raise RuntimeError("of a library") from None
    found = mlflow.MlflowClient().get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["stopped_by"]) == ("KILLED", "signal")
    with pytest.raises(RuntimeError), open_run() as run:  # which nobody stopped
        raise RuntimeError
    assert mlflow.MlflowClient().get_run(run.info.run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_ID=987654321: "),
        ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_NAME=binned: "),
        ("MLFLOW_RUN_ID", "MLFLOW_RUN_ID=987654321: "),
    ],
)
def test_an_experiment_or_run_that_is_unknown_or_deleted_is_named(
    store: Path, monkeypatch, name: str, says: str
) -> None:
    client = mlflow.MlflowClient()
    client.delete_experiment(client.create_experiment("binned"))
    monkeypatch.setenv(name, "binned" if name.endswith("NAME") else "987654321")
    with pytest.raises(InputError, match=f"^{says}") as refused, open_run():
        pass
    assert "mlflow experiments restore" in str(refused.value)


def test_a_stopped_transaction_does_not_keep_the_run_from_being_marked(store: Path) -> None:
    """As where a signal comes between MLflow's opening of a transaction and its own clearing up."""

    def interrupted() -> None:
        connection = sqlite3.connect(store)
        connection.execute("BEGIN IMMEDIATE")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run() as run:
        interrupted()
    found = mlflow.MlflowClient().get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["stopped_by"]) == ("KILLED", "signal")


@pytest.mark.parametrize(
    ("function", "expected"), [("start_run", "KILLED"), ("end_run", "FINISHED")]
)
def test_a_run_is_begun_and_ended_whole(
    store: Path, monkeypatch: pytest.MonkeyPatch, function: str, expected: str
) -> None:
    whole = getattr(mlflow, function)

    def stopped(*given: Any, **named: Any) -> Any:
        if function == "end_run":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        found = whole(*given, **named)
        if function == "start_run":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return found

    monkeypatch.setattr(mlflow, function, stopped)
    reached = False
    with pytest.raises(KeyboardInterrupt), ended_by_signals(), open_run():
        reached = True
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == expected and reached == (function == "end_run")
    assert mlflow.active_run() is None


def test_a_run_that_the_store_could_not_end_is_marked_when_it_answers_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, whole = mlflow.MlflowClient, mlflow.MlflowClient.set_terminated
    failures = [MlflowException("the store does not answer")]

    def once(*given: Any) -> None:
        if failures:
            raise failures.pop()
        whole(*given)

    monkeypatch.setattr(client, "set_terminated", once)
    with pytest.raises(MlflowException), open_run() as run:
        pass
    assert client().get_run(run.info.run_id).info.status == "FAILED"


def test_what_a_dead_process_left_running_is_marked_by_the_next_command(
    store: Path, tmp_path: Path
) -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    client = mlflow.MlflowClient()

    def left(process: int, cache: Path = tmp_path) -> str:
        tags = {**signature(cache), "process": str(process)}
        return client.create_run("0", tags=tags).info.run_id

    def failed(**tags: str) -> str:
        run = client.create_run("0", tags={**signature(tmp_path), **tags}).info
        client.set_terminated(run.run_id, "FAILED", end_time=12345)
        return run.run_id

    def below(run_id: str, **end: str) -> str:
        nested = client.create_run("0", tags={"mlflow.parentRunId": run_id}).info.run_id
        if end:
            client.set_terminated(nested, **end)
        return nested

    parent = left(dead.pid)
    expected = {
        parent: "KILLED",
        below(parent): "KILLED",
        below(parent, status="FINISHED"): "FINISHED",
        left(os.getpid()): "KILLED",  # another process had this number
        left(sleeping.pid): "RUNNING",
        left(dead.pid, tmp_path / "another"): "RUNNING",  # perhaps of another container
        failed(stopped_by="signal"): "KILLED",  # as `mlflow run` leaves it after Ctrl-C
        failed(): "FAILED",
    }
    with open_run(tags=signature(tmp_path)) as run:
        end_dead_runs(tmp_path)
        expected[run.info.run_id] = "RUNNING"
        runs = {name: client.get_run(name).info for name in expected}
        found = {name: info.status for name, info in runs.items()}
        assert {info.end_time for info in runs.values() if info.end_time} >= {12345}
    sleeping.kill()
    sleeping.wait()
    assert found == expected
