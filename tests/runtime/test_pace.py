"""What is left of a command, by its plan and by the rate so far."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.runtime.pace import Pace, duration

PLAN = Pace({"finetune": 500.0, "trak": 20.0, "ablation": 1000.0, "evaluate": 300.0})


def test_a_slow_machine_delays_this_stage_and_the_later_ones() -> None:
    own, whole = PLAN.left("ablation: retrainings", made=10, left=90, elapsed=300)
    assert own == pytest.approx(2700)  # 3,000 s in all, where 1,000 were planned
    assert whole == pytest.approx(2700 + 3 * 300)


@given(st.floats(0.1, 0.9))
def test_as_planned_the_rest_is_the_plan_s(share: float) -> None:
    own, whole = PLAN.left("finetune: checkpoints", 100 * share, 100 * (1 - share), 500 * share)
    assert own == pytest.approx(500 * (1 - share))
    assert whole == pytest.approx(own + 1320)


def test_a_short_stage_says_nothing_of_later_ones() -> None:
    own, whole = PLAN.left("trak: examples featurised", made=1, left=1, elapsed=60)
    assert (own, whole) == pytest.approx((60, 60 + 1300))


@pytest.mark.parametrize("bar", ["trak: checkpoints factorised", "data: finding files"])
def test_a_bar_that_the_plan_does_not_know_tells_of_itself(bar: str) -> None:
    assert PLAN.left(bar, made=1, left=3, elapsed=5) == (15, 15)
    assert Pace().left("ablation: retrainings", made=1, left=3, elapsed=5) == (15, 15)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "10 s"),
        (44, "40 s"),
        (89, "90 s"),
        (100, "2 min"),
        (3600, "60 min"),
        (7140, "2 h 0 min"),
        (8000, "2 h 10 min"),
    ],
)
def test_durations_are_rounded_as_an_estimate_should_be(seconds: float, words: str) -> None:
    assert duration(seconds) == words
