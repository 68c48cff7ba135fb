"""The plan that a command prints before it computes anything."""

from __future__ import annotations

import re

import pytest
from experiments.test_arms import full_evidence
from toy import toy_config, toy_data

from attribution.cli import plan
from attribution.cli.disk import Need
from attribution.cli.plan import Plan, Step, describe, duration
from attribution.experiments.arms import plan_trials


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
def test_durations_are_rounded_as_befits_an_estimate(seconds, words) -> None:
    assert duration(seconds) == words


def test_lines_add_up_and_leave_out_what_is_not_known() -> None:
    def lines(*steps: Step) -> list[str]:
        return describe(Plan(list(steps), Need(work=3 << 30, artifacts=1 << 29)), 2)

    known = lines(Step("finetune", "a", 60.0), Step("trak", "b", 30.0))
    assert known[0] == "plan:" and known[-2].startswith("  in all about 2 min")
    assert known[-1] == "  disk: about 3.5 GiB while it runs, 512 MiB of them for good"
    assert "about" not in " ".join(lines(Step("finetune", "a", None))[:-1])


@pytest.mark.parametrize("arms", ["none,random,harmful", "harmful,negative,loss", "random", "none"])
@pytest.mark.parametrize("action", ["remove", "both"])
def test_the_number_of_retrainings_is_that_of_the_trials(arms: str, action: str) -> None:
    config = toy_config(arms=arms, frac="0.1,0.2", num_seeds=3, action=action)
    evidence = full_evidence(60)
    actions = ("remove", "relabel") if action == "both" else ("remove",)
    trials = plan_trials(config.arm_names, config.fracs, evidence, [0, 1, 2], actions)
    count, size = plan._retrainings("ablation", config, 60)
    assert count == 3 * len(trials) and size == 60


def test_a_command_prints_what_it_makes_and_what_it_reuses(new_place) -> None:
    place = new_place("plan")
    made = place.done("trak")
    lines = made.err.split("plan:\n")[1].splitlines()
    assert re.match(r" +finetune +2 checkpoints, 2 epochs of \d+ images +about \d+ s", lines[0])
    assert "gradients" in lines[1] and "in all about" in lines[2]
    reused = place.done("ablation").err.split("plan:\n")[1].splitlines()
    assert f"reuses run {made.run_id}" in reused[0] and "models" in reused[1]
    assert "plan:" not in place.done("ablation").err  # nothing is left to do


def test_the_rate_is_that_of_all_workers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "seconds_per_example", lambda *given: 0.01)
    data = toy_data(tmp_path, n_train=64)
    one, two = (plan._rate(toy_config(jobs=jobs), data) for jobs in (1, 2))
    assert one == pytest.approx(2 * two) and one == pytest.approx(0.01 * plan.OVERHEAD)
    assert plan._rate(toy_config(backend="ray"), data) is None


def test_nothing_is_timed_where_nothing_is_trained(new_place, monkeypatch) -> None:
    place = new_place("plan-explain")
    place.done("trak")
    monkeypatch.setattr(plan, "seconds_per_example", None)  # to call it would fail
    assert "explain" in place.done("explain", target="0").err.split("plan:")[1]
