"""The tracking store's failures: told in one line, and without the credentials in its address."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import path_to_local_sqlite_uri
from requests import ConnectionError
from sqlalchemy.exc import OperationalError

from attribution.errors import InputError
from attribution.tracking import database
from attribution.tracking.database import failure, open_store

SECRET = "s3cret%2Fword"
SERVER = f"https://me:{SECRET}@tracking.test:5000"
POSTGRES = f"postgresql://me:{SECRET}@db.test/mlflow"


@pytest.mark.parametrize("uri", [SERVER, POSTGRES])
def test_no_message_about_the_store_holds_credentials(uri: str, monkeypatch) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    long = f"{'x' * 270} {uri}"  # where a message is cut off, half a password may be left
    for error in (
        MlflowException(f"API request to {uri}/api failed"),
        ConnectionError(f"HTTPSConnectionPool: {long}"),
        OperationalError("SELECT 1", {}, Exception(f"could not connect to {uri}")),
    ):
        told = failure(error)
        assert told.startswith("MLFLOW_TRACKING_URI=") and "***@" in told
        assert "s3cret" not in told and "word" not in told
    assert "s3cret" not in failure(OSError(errno.ENOSPC, f"No space left for {uri}"))


def test_a_store_of_a_retired_or_malformed_kind_is_refused_without_its_credentials(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"file://me:{SECRET}@host/mlruns")
    with pytest.raises(InputError, match="retired its file store") as refused:
        open_store(tmp_path)
    assert "s3cret" not in str(refused.value)

    def broken(*args: object, **options: object) -> None:
        raise MlflowException(f"InvalidURL: {SERVER}")

    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: SERVER)
    monkeypatch.setattr(mlflow.MlflowClient, "search_experiments", broken)
    with pytest.raises(InputError, match="not an address") as refused:
        open_store(tmp_path)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("localhost:5000", "type MLFLOW_TRACKING_URI=http://localhost:5000"),
        ("http:host:5000/path", "type MLFLOW_TRACKING_URI=http://host:5000/path"),
        ("foo://host/store", "MLflow knows no such kind; type http://HOST:PORT"),
        ("sqlite://mlflow.db", "not an address; type http://HOST:PORT, sqlite:///mlflow.db"),
    ],
)
def test_an_address_of_no_store_is_refused_with_what_to_type(
    uri: str, says: str, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError) as refused:
        open_store(tmp_path)
    assert str(refused.value).startswith(f"MLFLOW_TRACKING_URI={uri}: ")
    assert says in str(refused.value)


def test_a_missing_driver_is_named_by_the_package_to_install(monkeypatch, tmp_path) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'MySQLdb'", name="MySQLdb")

    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"mysql://me:{SECRET}@host/runs")
    monkeypatch.setattr(mlflow.MlflowClient, "search_experiments", missing)
    with pytest.raises(InputError, match="type pip install 'mysqlclient'") as refused:
        open_store(tmp_path)
    assert "s3cret" not in str(refused.value)


def test_a_mistake_of_the_code_is_no_failure_of_the_store() -> None:
    error = MlflowException.invalid_parameter_value("no such thing")
    assert failure(error) == "" and failure(ValueError("x")) == ""
    assert database.failure(OSError(errno.ENOENT, "gone")) == ""


@pytest.fixture
def new_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a store that is not there yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    return tmp_path / "new.db"


def test_a_store_lies_in_the_folder_that_its_address_names(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "a #b%20 c?d é" / "new.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", path_to_local_sqlite_uri(file))
    open_store(tmp_path / "cache")
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'new.db'}")
    with pytest.raises(InputError, match="^MLFLOW_TRACKING_URI=sqlite:.*: cannot be written"):
        database.open_store(tmp_path / "cache")


def test_a_store_appears_whole_or_not_at_all(
    new_store: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".new.db.abc"  # as a kill in the middle leaves it
    left.mkdir()
    for name in ("new.db", "new.db-journal"):
        (left / name).write_bytes(b"half a file")
    whole = mlflow.MlflowClient

    def stopped(uri: str) -> None:
        assert not left.exists()
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlflow, "MlflowClient", stopped)
        database.open_store(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    def copied(uri: str = "") -> Any:  # in place of making tables, which takes seconds
        if uri:
            assert not new_store.exists()
            shutil.copy(empty_store, uri.removeprefix("sqlite:///"))
        return whole(uri or None)

    monkeypatch.setattr(mlflow, "MlflowClient", copied)
    database.open_store(tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "new.db"}
    assert whole().search_runs(["0"]) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MlflowException("API request failed with 401 Client Error"), "MLFLOW_TRACKING_PASSWORD"),
        (MlflowException("Max retries exceeded"), "Max retries exceeded"),
        (OSError(28, "No space left on device", "/disk/file"), "/disk/file"),
        (ValueError("a mistake of the code"), ""),
        (FileNotFoundError(2, "no such file", "x"), ""),
        (MlflowException.invalid_parameter_value("of the code too"), ""),
    ],
)
def test_what_is_told_in_a_line_and_what_is_not(error: Exception, words: str) -> None:
    told = database.failure(error)
    assert (words in told) if words else not told


def test_a_port_or_run_id_that_looks_like_a_refusal_is_none() -> None:
    error = MlflowException("host='127.0.0.1', port=46403: Max retries: /get?run_id=9401f and a403")
    assert "Max retries" in database.failure(error) and "PASSWORD" not in database.failure(error)
