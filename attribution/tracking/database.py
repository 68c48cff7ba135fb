"""The MLflow tracking store: opened by one process at a time, created whole, its failures explained."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from attribution.errors import InputError, redact
from attribution.runtime.cache_folder import alone, discard_unfinished
from attribution.runtime.safe_files import atomic

# OSErrors that are the machine's fault, not the code's.
MACHINE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
# MLflow's codes for mistakes of the caller's code.
OWN_MISTAKES = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# The packages of database drivers that are called otherwise.
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
KINDS = "type http://HOST:PORT, sqlite:///mlflow.db, postgresql://HOST/NAME or mysql://HOST/NAME"

# Whole words: a port or a run's id may contain these digits too.
REFUSED = re.compile(r"\b(401|403|UNAUTHENTICATED|PERMISSION_DENIED)\b")


def open_store(cache: Path) -> None:
    """Reach the tracking store, and create its database if there is none.

    Two processes that create one database at the same time collide, and a process that is killed
    half-way leaves a database that MLflow cannot open. So one process at a time creates it, in a
    hidden folder until it is complete.

    Raises:
        InputError: the store is of a kind that MLflow has retired or does not know, its address is
            malformed, its driver is missing, or cache_dir cannot be written.
    """
    mlflow.config.enable_async_logging(False)  # what is logged is read back at once
    uri = mlflow.get_tracking_uri()
    shown = f"MLFLOW_TRACKING_URI={uri}"
    if server := re.fullmatch(r"(?!https?://\w)(https?:)?/*([\w.-]+:\d+(/.*)?)", uri):
        raise InputError(
            f"{shown}: the address of a server starts with http://; type "
            f"MLFLOW_TRACKING_URI=http://{server[2]}"
        )
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise InputError(
            f"{shown}: MLflow has retired its file store; move the old mlruns folder away or set "
            "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
        )
    waiting = "another process is opening the tracking store; waiting"
    with _writing(f"cache_dir={cache}"), alone(cache, "store", waiting):
        file = _database(uri)
        if file and not file.exists():
            with _writing(shown):
                _create(file)
    try:
        mlflow.MlflowClient().search_experiments(max_results=1)
    except ImportError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise InputError(f"{shown}: a package is missing; type pip install '{package}'") from None
    except (MlflowException, ArgumentError) as error:
        if "unsupported URI" in str(error):
            raise InputError(f"{shown}: MLflow knows no such kind; {KINDS}") from None
        if isinstance(error, ArgumentError) or re.search("UnicodeError|InvalidURL", str(error)):
            raise InputError(f"{shown}: not an address; {KINDS}") from None
        raise


@contextmanager
def _writing(place: str) -> Iterator[None]:
    """Name the place that cannot be written; errors of the machine pass through."""
    try:
        yield
    except OSError as error:
        if is_machine_error(error):
            raise
        raise InputError(f"{place}: cannot be written ({error.strerror or error})") from None


def _database(uri: str) -> Path | None:
    """The file of an sqlite store; None for other stores."""
    if not uri.startswith("sqlite:"):
        return None
    name = make_url(uri).database
    return Path(name) if name and name != ":memory:" else None


def _create(file: Path) -> None:
    discard_unfinished(file)
    with atomic(file) as unfinished:
        address = URL.create("sqlite", database=str(unfinished)).render_as_string()
        mlflow.MlflowClient(address).search_experiments(max_results=1)


def is_machine_error(error: BaseException) -> bool:
    """Whether an error is the machine's fault: a full disk, for instance."""
    return isinstance(error, OSError) and error.errno in MACHINE_ERRORS


def failure(error: BaseException) -> str:
    """One line about what the tracking store or the machine failed at; empty for other errors."""
    text = redact(" ".join(str(error).split()))
    text = re.sub(r"^\(raised as a result of .*?\) | \[SQL: .*", "", text)[:300]  # SQLAlchemy's
    if isinstance(error, (MlflowException, RequestException, SQLAlchemyError)):
        if getattr(error, "error_code", "") in OWN_MISTAKES:
            return ""
        if REFUSED.search(text):
            text = (
                "the server refuses the credentials; set MLFLOW_TRACKING_USERNAME and "
                f"MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN ({text[:120]})"
            )
        return redact(f"MLFLOW_TRACKING_URI={mlflow.get_tracking_uri()}: {text}")
    if is_machine_error(error):
        return text
    return ""
