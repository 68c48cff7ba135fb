"""Commands that are stopped at random moments continue from what was finished."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from places import Place

from benchmarks import faults

NewPlace = Callable[..., Place]
pytestmark = pytest.mark.slow


def test_commands_stopped_at_random_moments_lose_nothing(
    new_place: NewPlace, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short version of `python -m benchmarks faults`."""
    place = new_place("faults")
    small = dict(flag[2:].split("=") for flag in place.argv("finetune"))
    monkeypatch.setattr(
        faults, "SETTINGS", small
    )  # how workers end: tests/runtime/test_parallel.py
    monkeypatch.setattr(faults, "COMMANDS", {"finetune": {}})
    options = argparse.Namespace(
        backends=["local"], commands=["finetune"], kinds=["Ctrl-C"], trials=1, seed=3
    )
    rows = faults.run(options)
    assert sum(row["trials"] for row in rows) == 1
    for name in ("failed", "lost", "different", "orphans", "badly_marked"):
        assert sum(row[name] for row in rows) == 0, rows
