"""A time that the user gives: which numbers of checkpoints and seeds fit, and what that costs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import refused
from toy import toy_config, toy_data

from attribution.cli import time_budget
from attribution.cli.time_budget import LEAST, fit
from attribution.config import resolve
from attribution.errors import InputError
from attribution.stages import STAGES


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10min", 600), ("2h", 7200), ("10", 600), ("1.5 h", 5400), ("3M", 180)],
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert resolve({"time_budget": text}).budget_seconds == seconds
    assert resolve({}).budget_seconds == math.inf


@pytest.mark.parametrize("text", ["soon", "0", "0s", "-5", "ten min", "10 days", "1e3", "min"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"^time_budget={text}: not a time such as 90s"):
        resolve({"time_budget": text})


@given(st.integers(1, 40), st.integers(2, 40))
def test_numbers_go_down_together_from_the_usual_to_the_smallest(models: int, seeds: int) -> None:
    config = toy_config(num_models=models, num_seeds=seeds)
    tried = list(time_budget._choices(config, ["num_models", "num_seeds"]))
    assert tried[0] == {"num_models": models, "num_seeds": seeds}
    assert tried[-1] == {"num_models": min(models, 2), "num_seeds": min(seeds, 3)}
    for larger, smaller in zip(tried, tried[1:]):
        assert all(smaller[name] <= larger[name] for name in LEAST)


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A minute for each checkpoint and for each seed, unless a test changes that."""
    found = {"factor": 60.0}
    monkeypatch.setattr(
        time_budget,
        "_seconds",
        lambda stage, config, data: found["factor"] * (config.num_models + config.num_seeds),
    )
    return found


def chosen(tmp_path: Path, known: set[str] = frozenset(), stage: str = "ablation", **given):
    defaults = {"num_models": 10, "num_seeds": 10, "cache_dir": str(tmp_path / "cache")}
    config = toy_config(**defaults | given)
    found = fit(STAGES[stage], config, toy_data(tmp_path / "data"), known)
    return found.num_models, found.num_seeds


def test_the_largest_numbers_that_fit_are_chosen_and_their_cost_is_said(
    tmp_path: Path, speed, capsys
) -> None:
    assert chosen(tmp_path, time_budget="10") == (5, 5)
    assert capsys.readouterr().err == (
        "time_budget=10: 5 models instead of 10, 5 seeds instead of 10; scores are noisier; "
        "differences must be about 1.7 times as large to be seen\n"
    )
    assert chosen(tmp_path, time_budget="1h") == (10, 10)
    assert capsys.readouterr().err == "time_budget=1h: the plan fits\n"


def test_what_the_user_gave_stays(tmp_path: Path, speed, capsys) -> None:
    assert chosen(tmp_path, {"num_models"}, time_budget="14min") == (10, 4)
    assert "models" not in capsys.readouterr().err
    assert chosen(tmp_path, stage="trak", time_budget="14min") == (4, 10)  # it has no seeds


def test_the_same_command_chooses_the_same_although_the_machine_is_slower_now(
    tmp_path: Path, speed
) -> None:
    first = chosen(tmp_path, time_budget="10min")
    speed["factor"] = 90.0
    assert chosen(tmp_path, time_budget="10min") == first
    assert chosen(tmp_path, time_budget="11min") != first


def test_splits_share_the_time(tmp_path: Path, speed) -> None:
    assert chosen(tmp_path, time_budget="20min", num_splits=2) == (5, 5)


def test_a_time_that_nothing_fits_into_is_refused(tmp_path: Path, speed) -> None:
    message = r"^time_budget=90s: the smallest plan \(2 models, 3 seeds\) takes about 5 min"
    with pytest.raises(InputError, match=message):
        chosen(tmp_path, time_budget="90s")
    with pytest.raises(InputError, match="all numbers are given"):
        chosen(tmp_path, set(LEAST), time_budget="90s")
    with pytest.raises(InputError, match="Ray cluster"):
        chosen(tmp_path, time_budget="1h", backend="ray")


@pytest.mark.slow
def test_a_budget_is_no_part_of_a_result(finished, new_place) -> None:
    place = new_place("budget", like=finished[0])
    assert place.done("ablation", time_budget="10min").tags["reused_run_id"] == finished[1].run_id
    fragments = ("time_budget=1s", "(2 models, 3 seeds)")
    open_numbers = {"num_models": None, "num_seeds": None}
    refused(place, "ablation", *fragments, time_budget="1s", seed=5, **open_numbers)
