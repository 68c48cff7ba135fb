"""Commands that are stopped at random moments continue from what was finished."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from places import Place

from benchmarks import faults

NewPlace = Callable[..., Place]
pytestmark = pytest.mark.slow


def test_commands_stopped_at_random_moments_lose_nothing(
    new_place: NewPlace, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short version of `python -m benchmarks faults`."""
    small = dict(flag[2:].split("=") for flag in new_place("faults").argv("finetune"))
    # How workers end: tests/runtime/test_parallel.py
    monkeypatch.setattr(faults, "SETTINGS", small)
    monkeypatch.setattr(faults, "COMMANDS", {"finetune": {}})
    start = faults.Place.start

    def add_tables(place: faults.Place) -> None:  # making them takes seconds
        if not (database := place.folder / "mlflow.db").exists():
            shutil.copy(empty_store, database)
            with contextlib.closing(sqlite3.connect(database)) as store:
                location = (place.folder / "mlruns" / "0").as_uri()
                store.execute("UPDATE experiments SET artifact_location = ?", (location,))
                store.commit()

    monkeypatch.setattr(faults.Place, "start", lambda place: (add_tables(place), start(place))[1])
    options = argparse.Namespace(
        backends=["local"], commands=["finetune"], kinds=["Ctrl-C"], trials=1, seed=3
    )
    rows = faults.run(options)
    assert sum(row["trials"] for row in rows) == 1
    for name in ("failed", "lost", "different", "orphans", "badly_marked"):
        assert sum(row[name] for row in rows) == 0, rows
