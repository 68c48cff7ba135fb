"""One command: what it computes, hands on, reuses, and deletes at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from places import Place, refused, unreadable_artifacts

from attribution.cli import main

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def weights(place: Place, run_id: str) -> dict[str, bytes]:
    names = [model.name for model in place.models(run_id)]
    files = [folder / "model.safetensors" for folder in place.checkpoints(run_id)]
    return {name: file.read_bytes() for name, file in zip(names, files, strict=True)}


def test_only_checkpoints_that_the_command_made_go_at_its_end_and_they_come_back_the_same(
    new_place: Callable[..., Place],
) -> None:
    place = new_place("kept")
    first = place.done("trak", keep_checkpoints="best")
    first_id = first.tags["finetune_run_id"]
    best = weights(place, first_id)
    assert f"1 checkpoints of run {first_id} deleted" in first.err and len(best) == 1
    assert place.done("ablation").made() == {"ablation"}  # needs no checkpoint

    again = place.done("trak", lambda_reg=0.7)
    both = weights(place, again.tags["finetune_run_id"])
    assert again.made() == {"finetune", "trak"}
    assert len(both) == 2 and best.items() <= both.items()

    reused = place.done("trak", lambda_reg=0.3, keep_checkpoints="none")
    own = again.tags["finetune_run_id"]
    assert reused.made() == {"trak"} and reused.tags["finetune_run_id"] == own
    assert f"run {own} was made by an earlier command; its checkpoints are kept" in reused.err
    assert weights(place, own) == both


def test_a_command_fetches_nothing_back_that_it_has_just_computed(
    new_place: Callable[..., Place], images: Path
) -> None:
    """For ablation and evaluate see tests/scripts/test_pipeline.py and test_evaluation.py."""
    place, image = new_place("unreadable"), next(images.glob("*/*.png"))
    with unreadable_artifacts():
        result = place.done("explain", epochs=1, num_models=1, image=image)
    assert result.made() == {"finetune", "trak", "explain"}
    assert not place.unfinished()


def test_an_error_of_the_code_is_shown_whole_but_without_credentials(
    new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("could not open https://me:s3cret@host/x")

    monkeypatch.setattr(main.importlib, "import_module", broken)
    result = new_place("broken").run("finetune")
    assert result.code == 1 and "Traceback" in result.err and "***@host" in result.err
    assert "s3cret" not in result.err


def test_a_command_that_computed_nothing_leaves_no_failed_run_among_the_results(
    new_place: Callable[..., Place],
) -> None:
    place = new_place("nothing")
    early = refused(place, "finetune", "classes=purple: no such class", classes="purple,red")
    late = refused(place, "finetune", "learning_rate=", learning_rate=1e30)
    assert [run.info.lifecycle_stage for run in (*early.runs, *late.runs)] == ["deleted", "active"]
