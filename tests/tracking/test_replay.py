"""A replay computes a recorded run again, and says what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import Place, refused

from attribution.tracking import replay
from attribution.tracking.artifacts import artifact_path, logged_models
from attribution.tracking.logged_models import WEIGHTS

NewPlace = Callable[..., Place]
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def replayed(finished, new_place: NewPlace) -> tuple[Place, Any, Any]:
    """A place with an ablation, and that run's replay."""
    source, first = finished
    place = new_place("replay", like=source)
    return place, first, place.done("ablation", replay=first.run_id)


def test_a_replay_makes_everything_anew_and_says_that_it_is_the_same(replayed) -> None:
    place, first, again = replayed
    assert again.made() == {"finetune", "trak", "ablation"}
    lines = dict(line.rsplit(None, 1) for line in again.out.splitlines() if line[:1].strip())
    for name in (
        "finetune  checkpoints",
        "trak      scores/scores.npy",
        "ablation  comparison.csv",
    ):
        assert lines[name] == "identical", again.out
    assert f"replay of run {first.run_id}: identical" in again.out
    tags = place.client().get_run(again.run_id).data.tags
    assert tags["replay_of"] == first.run_id and tags["replay_result"] == "identical"
    assert not list((place.cache / "replays").rglob("*.*"))


def test_a_replay_is_never_reused_by_another_command(replayed) -> None:
    place, first, again = replayed
    assert first.run_id in place.done("ablation").err
    assert place.runs("trak")[-1].info.run_id != first.tags["trak_run_id"]
    assert again.tags["trak_run_id"] not in place.done("trak").err


def test_a_replay_that_differs_says_where_and_fails(replayed, capsys) -> None:
    place, first, again = replayed
    file = place.artifacts(first.run_id) / "comparison.csv"
    kept = file.read_text()
    environment = place.artifacts(first.run_id) / "environment.json"
    then = environment.read_text()
    try:
        header, line, *rest = kept.splitlines()
        column = header.split(",").index("accuracy_mean")
        cells = line.split(",")
        cells[column] = str(float(cells[column]) + 0.25)
        file.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
        environment.write_text(then.replace('"torch": "', '"torch": "1'))
        with place.active():
            is_same = replay.report_replay(first.run_id, again.run_id)
    finally:
        file.write_text(kept)
        environment.write_text(then)
    said = capsys.readouterr()
    assert not is_same  # the command's exit code is 1
    assert "differs by at most 0.25 (accuracy_mean)" in said.out
    assert f"replay of run {first.run_id}: differs" in said.out
    assert "torch: 12." in said.err and " then, 2." in said.err
    assert place.client().get_run(again.run_id).data.tags["replay_result"] == "differs"


def test_checkpoints_are_compared_as_far_as_both_runs_kept_them(replayed, monkeypatch) -> None:
    place, first, again = replayed
    runs = [run.tags["finetune_run_id"] for run in (first, again)]
    with place.active():
        known = {run_id: logged_models(run_id) for run_id in runs}
        last = sorted(known[runs[1]])[-1]
        known[runs[1]] = {last: known[runs[1]][last]}  # as keep_checkpoints=best leaves it
        monkeypatch.setattr(replay, "logged_models", known.__getitem__)
        assert dict(replay._compare("finetune", *runs))["checkpoints"] == ""
        weights = artifact_path(runs[1], last) / WEIGHTS
        kept = weights.read_bytes()
        try:
            weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            found = dict(replay._compare("finetune", *runs))["checkpoints"]
        finally:
            weights.write_bytes(kept)
        assert found == "1 of 1 checkpoints differ"
        known[runs[1]] = {}
        assert "checkpoints" not in dict(replay._compare("finetune", *runs))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a": [1.0, 2.0]}, ""),
        ({"a": [1.0, 2.5]}, "differs by at most 0.5 (a)"),
        ({"a": [1.0, np.nan]}, "not identical bit by bit"),
        ({"a": np.float32([1, 2])}, "not identical bit by bit"),
        ({"a": [1.0]}, "a: another shape"),
        ({"a": [1.0, 2.0], "b": [0]}, "b: another shape"),
    ],
)
def test_results_are_the_same_in_every_bit_or_are_said_to_differ(tmp_path, now, said) -> None:
    np.savez(tmp_path / "then.npz", a=[1.0, 2.0])
    np.savez(tmp_path / "now.npz", **now)
    assert replay._difference(tmp_path / "then.npz", tmp_path / "now.npz") == said


def test_what_cannot_be_replayed(replayed, images: Path, tmp_path: Path) -> None:
    place, first, _ = replayed
    refused(place, "ablation", "replay=nothing: no such run", replay="nothing")
    trak_id = first.tags["trak_run_id"]
    refused(place, "ablation", f"replay={trak_id}: is a run of stage trak", replay=trak_id)
    refused(place, "ablation", "frac=0.3: the run built on", replay=first.run_id, frac=0.3)


def test_a_run_records_what_it_was_made_with(replayed) -> None:
    import json

    place, first, _ = replayed
    trak_id = first.tags["trak_run_id"]
    finetune_id = place.client().get_run(trak_id).data.tags["finetune_run_id"]
    for run_id in (first.run_id, trak_id, finetune_id):
        found = json.loads((place.artifacts(run_id) / "environment.json").read_text())
        assert found["torch"] and found["cores"] and "processor" in found
