"""A plan that is corrected by what happens: when a line says so, and what it says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.runtime.pace import TOLERANCE, Pace, duration

BAR = "ablation: retrainings"


def planned(workers: int = 1, tasks: int = 100, seconds: float = 1000.0) -> Pace:
    stages = {"finetune": 500.0, "ablation": seconds, "evaluate": 300.0}
    return Pace(stages, dict.fromkeys(stages, tasks), dict.fromkeys(stages, workers))


def test_a_slow_machine_delays_this_stage_and_the_later_ones() -> None:
    pace = planned()
    line = pace.correct(BAR, made=10, unit=1, left=90, elapsed=300)  # 30 s each, 10 were planned
    assert line == f"ablation: takes 3.0 times as long as planned: about {duration(3600)} more"
    assert pace.seconds == {"finetune": 500, "ablation": 3000, "evaluate": 900}
    assert not pace.correct(BAR, made=20, unit=1, left=80, elapsed=600)  # is as corrected
    line = pace.correct(BAR, made=80, unit=1, left=20, elapsed=1200)  # 15 s each: half of that
    assert line == f"ablation: takes 1.5 times as long as planned: about {duration(750)} more"


def test_a_fast_machine_is_said_too() -> None:
    line = planned().correct(BAR, made=10, unit=1, left=90, elapsed=40)
    assert line == f"ablation: takes only 40% of what was planned: about {duration(480)} more"


@pytest.mark.parametrize(
    "bar", ["trak: checkpoints factorised", "finetune: x", "bank: retrainings"]
)
def test_bars_that_the_plan_does_not_count_are_not_compared(bar: str) -> None:
    pace = planned()
    del pace.seconds["evaluate"]
    assert not pace.correct(bar, made=1, unit=1, left=1, elapsed=10_000)


def test_what_was_just_begun_is_not_judged() -> None:
    assert not planned().correct(BAR, made=0.5, unit=1, left=99.5, elapsed=20)
    assert not planned().correct(BAR, made=9, unit=1, left=91, elapsed=5000)
    assert planned().correct(BAR, made=10, unit=1, left=90, elapsed=5000)


@pytest.mark.parametrize("start", [12, 33, 70])
def test_workers_that_start_slowly_are_not_slow_workers(start: int) -> None:
    """The first epoch of 15 ends late, and then all goes as planned."""
    pace = planned(workers=2, tasks=3, seconds=12 + 3 * 50.0)
    pace.start_up = 12.0
    for epoch in range(1, 31):  # two checkpoints at a time, 100 s each
        made, elapsed = epoch / 15, start + 100 / 15 * (epoch - 1) / 2
        assert not pace.correct("ablation: retrainings", made, 1 / 15, 3 - made, elapsed)


@given(st.integers(1, 16), st.integers(1, 20), st.floats(0.9, 1.1), st.integers(1, 10))
def test_a_run_as_planned_is_never_corrected_whatever_workers_are_under_way(
    workers: int, waves: int, speed: float, unit: int
) -> None:
    """Workers end together, so that one result stands for as many as there are workers."""
    tasks = workers * waves * unit
    pace = planned(workers, tasks, 100.0 * waves)
    for wave in range(waves):
        for arrived in range(1, workers + 1):
            made = (wave * workers + arrived) * unit
            elapsed = 100.0 * (wave + 1) * speed
            assert not pace.correct(BAR, made, unit, tasks - made, elapsed)


@given(st.floats(1.1 * TOLERANCE, 20), st.integers(1, 8), st.integers(2, 30))
def test_slowness_is_noticed_when_a_wave_of_tasks_has_ended(
    factor: float, workers: int, waves: int
) -> None:
    tasks = workers * waves
    pace = planned(workers, tasks, 100.0 * waves)
    lines = [
        pace.correct(BAR, workers * (w + 1), 1, tasks - workers * (w + 1), 100 * factor * (w + 1))
        for w in range(waves)
    ]
    assert re.match("ablation: takes .* planned", "".join(lines))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "10 s"),
        (44, "40 s"),
        (89, "90 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (8000, "2 h 10 min"),
    ],
)
def test_durations_are_rounded_as_an_estimate_should_be(seconds: float, words: str) -> None:
    assert duration(seconds) == words
