"""The tracking store: opened by one command at a time, made whole or not at all, and its failures told."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attribution.errors import InputError
from attribution.runtime.cache_folder import alone

# Of an OSError: what the machine lacks, and not the code.
LACKING = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
# MLflow's codes for what the code did wrong.
OWN_MISTAKES = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# As words: a port or a run's id may hold the digits too.
REFUSED = re.compile(r"\b(401|403|UNAUTHENTICATED|PERMISSION_DENIED)\b")


def open_store(cache: Path) -> None:
    """Reach the store, and make its database if that is new.

    Two processes that make one database collide, and one that is killed in the middle leaves what
    MLflow can no longer open: so one at a time, under another name until it is whole.

    Raises:
        InputError: it is of a kind that MLflow has retired, or cache_dir cannot be written.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = mlflow.get_tracking_uri()
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise InputError(
            f"MLFLOW_TRACKING_URI={uri}: MLflow has retired its file store; move the old mlruns "
            "folder away or set MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
        )
    waiting = "another process is opening the tracking store; waiting"
    with _writing(f"cache_dir={cache}"), alone(cache, "store", waiting):
        file = _database(uri)
        if file and not file.exists():
            with _writing(f"MLFLOW_TRACKING_URI={uri}"):
                _make(file)
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        if "UnicodeError" in str(error) or "InvalidURL" in str(error):
            raise InputError(f"MLFLOW_TRACKING_URI={uri}: not an address") from None
        raise


@contextmanager
def _writing(place: str) -> Iterator[None]:
    """Name the place that cannot be written; what the machine lacks is told elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno in LACKING:
            raise
        raise InputError(f"{place}: cannot be written ({error.strerror or error})") from None


def _database(uri: str) -> Path | None:
    """The file of an sqlite store."""
    from sqlalchemy.engine import make_url

    if not uri.startswith("sqlite:"):
        return None
    name = make_url(uri).database
    return Path(name) if name and name != ":memory:" else None


def _make(file: Path) -> None:
    import mlflow

    unfinished = file.with_name(f"{file.name}.unfinished")
    for left in file.parent.glob(f"{glob.escape(unfinished.name)}*"):  # its journal too
        left.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    mlflow.MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
    os.replace(unfinished, file)


def failure(error: BaseException) -> str:
    """What the tracking store or the machine failed at, in a line; empty where it is neither."""
    import mlflow
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    text = " ".join(str(error).split())
    text = re.sub(r"^\(raised as a result of .*?\) | \[SQL: .*", "", text)[:300]  # SQLAlchemy's
    if isinstance(error, (mlflow.exceptions.MlflowException, RequestException, SQLAlchemyError)):
        if getattr(error, "error_code", "") in OWN_MISTAKES:
            return ""
        if REFUSED.search(text):
            text = (
                "the server refuses the credentials; set MLFLOW_TRACKING_USERNAME and "
                f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN ({text[:120]})"
            )
        return f"MLFLOW_TRACKING_URI={mlflow.get_tracking_uri()}: {text}"
    if isinstance(error, OSError) and error.errno in LACKING:
        return text
    return ""
