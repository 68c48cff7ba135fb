"""Fixtures for all tests, and an environment in which no test writes beside the code or at home."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy
import torch
from filelock import FileLock
from hypothesis import settings
from places import Place, Result, write_images

from attribution.runtime import signals
from attribution.stages import STAGES

# Set before any library reads them; the folder goes with the process.
_scratch = tempfile.TemporaryDirectory(prefix="trak-ablation-tests-", ignore_cleanup_errors=True)
os.environ.update(
    {
        "HF_HOME": f"{_scratch.name}/huggingface",
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": f"{_scratch.name}/matplotlib",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{_scratch.name}/mlflow.db",
        "TRAK_ABLATION_CACHE": f"{_scratch.name}/cache",
    }
)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # the kernels of attribution/gradients/triton_kernels.py need no GPU then
    )
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, torch.get_num_threads() // _workers))
for _name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(_name, None)


settings.register_profile("any machine", deadline=None)  # where others work too, time says nothing
settings.load_profile("any machine")
# A test that sends itself a signal must not end the process that runs the tests, however slow it is.
signals.GRACE_SECONDS = 600.0


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def _do_not_wait_for_the_disk(connection: Any, _: Any) -> None:
    """No database of a test has to survive a power cut."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function that returns what another one makes, in the first of xdist's workers to need it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[], Any]) -> Any:
        file = shared / f"{name}.pickle"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                made = make()
                file.write_bytes(pickle.dumps(made))
            return pickle.loads(file.read_bytes())

    return get


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, once: Callable[..., Any]) -> Path:
    """A folder of 3 classes with 14 images of 16 by 16 pixels each; not to be changed."""
    return once("images", lambda: write_images(tmp_path_factory.mktemp("data") / "images"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory, once: Callable[..., Any]) -> Path:
    """The database of a store without runs, to be copied: making its tables takes seconds."""
    import logging

    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)

    def make() -> Path:
        file = tmp_path_factory.mktemp("store") / "mlflow.db"
        MlflowClient(f"sqlite:///{file}").search_experiments()
        return file

    return once("store", make)


@pytest.fixture(scope="session")
def new_place(
    tmp_path_factory: pytest.TempPathFactory, images: Path, empty_store: Path
) -> Iterator[Callable[..., Place]]:
    """A function that makes an empty store and cache; with `like`, copies of another place's."""
    for stage in STAGES.values():
        stage.script()
    gc.freeze()  # what libraries made at their import need not be searched for garbage

    def make(name: str, like: Place | None = None) -> Place:
        place = Place(tmp_path_factory.mktemp(name), images)
        if like:
            _copy_store(like.root, place.root)
            shutil.copytree(like.cache, place.cache, ignore=shutil.ignore_patterns("locks"))
        else:
            shutil.copy(empty_store, place.root / "mlflow.db")
            place.client().create_experiment(place.experiment, (place.root / "artifacts").as_uri())
        return place

    yield make
    gc.unfreeze()


@pytest.fixture(scope="session")
def finished(
    new_place: Callable[..., Place], once: Callable[..., Any], one_thread: None
) -> tuple[Place, Result]:
    """A place where `ablation` alone made every stage, and its result; tests change copies of it."""

    def make() -> tuple[Place, Result]:
        place = new_place("finished")
        return place, place.done("ablation")

    return once("finished", make)


def _copy_store(old: Path, new: Path) -> None:
    """Every run of a store under its own id, with copies of its artifacts."""
    shutil.copytree(old / "artifacts", new / "artifacts")
    with (
        contextlib.closing(sqlite3.connect(old / "mlflow.db")) as source,
        contextlib.closing(sqlite3.connect(new / "mlflow.db")) as copy,
    ):
        source.backup(copy)
        for table, column in (
            ("runs", "artifact_uri"),
            ("experiments", "artifact_location"),
            ("logged_models", "artifact_location"),
        ):
            change = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
            copy.execute(change, (str(old), str(new)))
        copy.commit()


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """What is this small runs faster on one core, and the same on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Any, Any]:
    """The toy data, and two checkpoints on halves of it (Finetuned)."""
    from toy import toy_config, toy_data

    from attribution.models.checkpoints import Finetuned, train_checkpoints

    folder = tmp_path_factory.mktemp("trained")
    data = toy_data(folder / "data")
    masks = np.array([np.arange(32) % 4 < 2, np.arange(32) % 4 >= 2])
    found = train_checkpoints(toy_config(num_models=2), data, masks, folder / "work")
    return data, Finetuned.of(masks, found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, which tests are skipped without."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not found:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with playwright.sync_playwright() as driver:
        # Chromium refuses to run as root in its sandbox; it opens our own pages only.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
