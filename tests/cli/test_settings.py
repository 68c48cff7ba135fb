"""Parameters that a command without data takes from the newest run, and an explanation from the newest scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.cli import settings
from attribution.config import resolve
from attribution.errors import InputError
from attribution.stages import STAGES


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What a stage takes from runs, each given by its stage and its parameters, the newest first."""

    def run(stage: str, given: dict[str, Any], *runs: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        config = {str(i): resolve(own) for i, (_, own) in enumerate(runs)}
        lineages = [
            {"finetune": f"{i}"} if name == "finetune" else {"trak": f"{i}", "finetune": f"{i}"}
            for i, (name, _) in enumerate(runs)
        ]

        def inherit(stage: Any, run_id: str, parameter: str) -> dict[str, Any]:
            return config[run_id].group(*stage.all_groups)

        monkeypatch.setattr(settings, "newest_lineages", lambda: iter(lineages))
        monkeypatch.setattr(settings, "_inherit", inherit)
        return settings._of_earlier_run(STAGES[stage], given)

    return run


OWN = {"dataset": "own/images", "num_models": 4, "epochs": 7}


@pytest.mark.parametrize("stage", ["explain", "evaluate", "ablation"])
def test_a_command_without_data_takes_the_newest_scores(take, stage) -> None:
    corrected = OWN | {"keep": "k.csv", "num_models": 1}
    found = take(stage, {}, ("finetune", corrected), ("trak", OWN), ("trak", {}))
    assert resolve(found) == resolve(OWN)


def test_the_digits_stay_the_default_where_they_came_last(take) -> None:
    for stage in STAGES:
        assert take(stage, {}, ("trak", {"dataset": "digits"}), ("trak", OWN)) == {}
        assert take(stage, {}) == {}


@pytest.mark.parametrize(
    "given",
    [{"dataset": "digits"}, {"preset": "food101"}, {"trak_run_id": "x"}, {"replay": "x"}],
    ids=str,
)
def test_whoever_names_data_or_a_run_gets_nothing_else(take, given) -> None:
    assert take("explain", given, ("trak", OWN)) == {}
    assert take("ablation", {"dataset": "own/images"}, ("trak", OWN)) == {}


def test_an_explanation_takes_the_newest_scores_of_its_data_that_no_flag_contradicts(
    take, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    runs = [
        ("trak", {"dataset": "other"}),
        ("trak", {"dataset": "images", "num_models": 5}),
        ("trak", {"dataset": "images", "num_models": 4}),
    ]

    def models(**given: Any) -> int | None:
        return take("explain", given, *runs).get("num_models")

    for name in ("images", "images/", str(tmp_path / "images")):
        assert models(dataset=name) == 5
    assert models(dataset="images", num_models=4, precision="auto") == 4
    assert models(dataset="images", errors=3) == 5
    assert models(dataset="images", num_models=3) is None
    assert models(dataset="elsewhere") is None
    assert "takes dataset=images and the parameters of trak run 1\n" in capsys.readouterr().err


def test_finetune_takes_no_corrections_from_another_run(take, capsys) -> None:
    runs = ("finetune", OWN | {"keep": "old.csv", "labels": "old.csv"})
    found = take("finetune", {"keep": "new.csv"}, runs)
    assert resolve(found | {"keep": "new.csv"}) == resolve(OWN | {"keep": "new.csv"})
    assert "; --dataset digits takes the digits" in capsys.readouterr().err
    assert take("trak", {}, runs)["keep"] == "old.csv"  # its checkpoints are of these images


def test_better_scores_take_more_models_and_a_longer_projection(take, capsys) -> None:
    config = resolve({"quality": "best"})
    better = settings._better(config, known={"quality"})
    assert (better.num_models, better.proj_dim) == (3 * config.num_models, 2 * config.proj_dim)
    assert capsys.readouterr().err == "quality=best: num_models 30, proj_dim 512\n"
    assert settings._better(config, known={"num_models"}).num_models == config.num_models
    of_head = settings._better(dataclasses.replace(config, train_layers="head"), known=set())
    assert (of_head.num_models, of_head.proj_dim) == (3 * config.num_models, config.proj_dim)
    with pytest.raises(
        InputError, match="^quality=best: num_models=10 and proj_dim=256 are decided"
    ):
        settings._better(config, known={"num_models", "proj_dim"})
    found = take("explain", {"quality": "best"}, ("trak", OWN))
    assert found["epochs"] == OWN["epochs"] and not {"num_models", "proj_dim"} & found.keys()


@given(st.lists(st.integers(1, 9_999), min_size=1, max_size=4), st.integers(1, 100_000))
def test_counts_become_shares_of_just_so_many_examples(counts: list[int], more: int) -> None:
    n = max(counts) + more
    found = settings._by_count(resolve({"count": ",".join(map(str, counts))}), n)
    assert [round(frac * n) for frac in found.fracs] == counts and not found.count
    resolve({"frac": found.frac})  # the next command is told in shares


@pytest.mark.parametrize(
    ("count", "words"), [("0", "from 1 to 99"), ("5,100", "count=100"), ("x", "whole")]
)
def test_a_count_that_cannot_be_removed_is_refused(count: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        settings._by_count(resolve({"count": count}), 100)
