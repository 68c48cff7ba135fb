"""The plan that a command prints before it computes anything, and the disk space that it needs."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import Place, Result, refused, run_id
from toy import toy_config, toy_data

from attribution.cli import plan
from attribution.cli.flags import parse
from attribution.cli.plan import Estimate, bytes_text, check_disk, describe, seconds_of
from attribution.config import resolve
from attribution.data.dataset import load_data
from attribution.errors import InputError
from attribution.models import checkpoints, classifier, model_facts
from attribution.scores.features import featurize
from attribution.scores.trak import score
from scripts import finetune, trak

pytestmark = pytest.mark.usefixtures("one_thread")
NewPlace = Callable[..., Place]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def unmeasured() -> None:
    """Nothing was measured before."""
    plan._step_seconds.cache_clear()


def size(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def test_sizes_are_told_as_people_do() -> None:
    assert bytes_text(3 << 29) == "1.5 GiB" and bytes_text(5 << 20) == "5 MiB"


def test_lines_add_up_and_leave_out_what_is_not_known() -> None:
    both = {
        "finetune": Estimate("a", 1, tasks=4, work=5 << 29, kept=1 << 29),
        "trak": Estimate("b", 1),
    }
    known = describe(both, {}, {"finetune": 60.0, "trak": 30.0}, toy_config(jobs=2))
    assert known[:2] == ["plan:", "  finetune  a   about 60 s"]
    assert known[-2] == "  Total: about 2 min with 2 workers (cached results are skipped)"
    assert known[-1] == "  Disk: about 3.0 GiB while it runs, 512 MiB of it kept"
    unknown = describe(both, {"evaluate": "r1"}, {}, toy_config())
    assert "about" not in " ".join(unknown[:-1]) and "  evaluate  reuses run r1" in unknown


def test_seconds_are_shared_by_as_many_workers_as_there_are_tasks(monkeypatch) -> None:
    monkeypatch.setattr(plan, "seconds_per_example", lambda *given: 0.01)

    def seconds(jobs: int, tasks: int, **given: Any) -> float:
        estimate = Estimate("", trained=1000, tasks=tasks)
        return seconds_of({"s": estimate}, toy_config(jobs=jobs, **given), ("a", "b"))["s"]

    alone = 0.01 * 1000 * plan.OVERHEAD
    assert seconds(1, 8) == pytest.approx(alone + plan.START_UP)
    assert seconds(2, 8) == pytest.approx(alone / 2 + plan.START_UP)
    assert seconds(16, 4) == pytest.approx(alone / 4 + plan.START_UP)  # 4 checkpoints on 16 cores
    assert seconds_of({"s": Estimate("", 1)}, toy_config(backend="ray"), ("a", "b")) == {}


@pytest.mark.parametrize("layers", ["head", "last"])
def test_frozen_layers_count_once_for_each_image_and_for_gradients_of_others(
    layers: str, monkeypatch
) -> None:
    monkeypatch.setattr(plan, "seconds_per_example", lambda *given: 1.0 if given[3:] else 0.01)
    estimates = {
        "finetune": Estimate("", trained=5 * 4 * 100, tasks=4),  # 4 models, 5 epochs of 100 images
        "trak": Estimate("", gradients=4 * 300, tasks=4),
    }
    seconds = seconds_of(estimates, toy_config(train_layers=layers, epochs=5), ("a", "b"))
    assert seconds["finetune"] == pytest.approx((20 + 100) * plan.OVERHEAD + plan.START_UP)
    gradient = plan.FEATURE_COST["cpu"] * {"head": 0.01, "last": 1.0}[layers]
    expected = (4 * 300 * gradient + 300) * plan.OVERHEAD + plan.START_UP
    assert seconds["trak"] == pytest.approx(expected)


def test_nothing_is_timed_where_nothing_is_trained(monkeypatch) -> None:
    monkeypatch.setattr(plan, "seconds_per_example", None)  # to call it would fail
    assert seconds_of({"explain": Estimate("")}, toy_config(), ("a", "b")) == {}


def test_the_estimate_of_scoring_is_what_scoring_leaves(tmp_path: Path) -> None:
    data = toy_data(tmp_path, n_train=200)
    config = toy_config(num_models=2, proj_dim=64, num_blocks=4, keep_features="no")
    model = classifier.build("resnet-mini", data.class_names, seed=0)
    classifier.save(model, tmp_path / "model", 16, *model_facts.normalisation("resnet-mini"))
    stores = featurize(config, data, [tmp_path / "model"] * 2, tmp_path / "work")
    score(config, stores, tmp_path / "work" / "scores.npy")
    assert trak.estimate(config, data).work == pytest.approx(size(tmp_path / "work"), rel=0.1)


def test_the_estimate_of_finetuning_counts_every_epoch_that_is_kept(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data")
    config = toy_config(num_models=2, checkpoint_epochs="last:2")
    found = checkpoints.finetune(config, data, tmp_path / "work")
    estimate = finetune.estimate(config, data)
    assert estimate.what == "4 checkpoints (2 per training run), 2 epochs of 16 images"
    assert (estimate.tasks, estimate.trained) == (2, 2 * 2 * 16)
    assert estimate.work == pytest.approx(size(tmp_path / "work"), rel=0.2)
    assert estimate.kept == pytest.approx(sum(map(size, found.folders)), rel=0.2)
    twice = dataclasses.replace(config, keep="kept.csv", subset_fraction=1.0)
    more = finetune.estimate(twice, data).work - finetune.estimate(config, data).work
    assert more == pytest.approx(estimate.kept / 2)  # without the cleaning, final weights alone


@pytest.mark.slow
def test_a_command_prints_its_plan_and_leaves_as_much_as_that_says(
    finished: tuple[Place, Result], new_place: NewPlace
) -> None:
    place = new_place("plan", like=finished[0])
    lines = finished[1].err.split("plan:\n")[1].splitlines()
    assert re.match(r" +finetune +2 checkpoints, 2 epochs of \d+ images +about \d+ s", lines[0])
    assert "gradients" in lines[1] and "models" in lines[2] and "Total: about" in lines[3]

    config = resolve(parse("trak", place.argv("trak")) | {"cache_dir": str(place.cache)})
    data = load_data(config)
    scores, features = (
        size(place.artifacts(run_id(place, "trak")), name) for name in ("scores.npy", "train.npy")
    )
    assert trak.estimate(config, data).kept == pytest.approx(scores + features, rel=0.2)
    models = place.checkpoints(run_id(place, "finetune"))
    weights = sum(size(folder, "*.safetensors") for folder in models)
    assert finetune.estimate(config, data).kept == pytest.approx(weights, rel=0.1)

    reused = place.done("ablation", arms="none").err.split("plan:\n")[1].splitlines()
    assert f"reuses run {run_id(place, 'trak')}" in reused[0] and "models" in reused[1]
    assert "plan:" not in place.done("ablation").err  # nothing is left to do


@pytest.mark.parametrize("where", ["work", "kept"])
def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch, where: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 4 << 30))
    config = toy_config(cache_dir=str(tmp_path / "cache"))
    uri = (tmp_path / "mlruns" / "1").as_uri()
    check_disk({"trak": Estimate("", **{where: 1 << 30})}, config, uri)
    with pytest.raises(InputError, match=r"cache_dir=.*about .* GiB, .* 4\.0 GiB are free"):
        check_disk({"trak": Estimate("", **{where: 4 << 30})}, config, uri)


def test_needs_of_stages_and_folders_on_one_disk_add_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 << 30))
    config, uri = toy_config(cache_dir=str(tmp_path)), tmp_path.as_uri()
    one = Estimate("", work=1 << 30)
    check_disk({"finetune": one}, config, uri)
    with pytest.raises(InputError, match="free"):
        check_disk({"finetune": one, "trak": one}, config, uri)
    with pytest.raises(InputError, match="free"):
        check_disk({"finetune": Estimate("", work=1 << 30, kept=1 << 29)}, config, uri)
    # What an interrupted command has finished lies there already.
    check_disk({"finetune": one, "trak": one}, config, uri, finished=1 << 29)
    with pytest.raises(InputError, match="free"):  # what is kept is written anew
        check_disk({"finetune": Estimate("", kept=1 << 30)}, config, uri, finished=1 << 30)
    remote = Estimate("", work=1 << 30, kept=1 << 28)
    check_disk({"finetune": remote}, config, "s3://bucket/1")  # not a disk of this machine


def test_a_command_that_does_not_fit_leaves_nothing(new_place: NewPlace, monkeypatch) -> None:
    place = new_place("full")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: Usage(0, 0, 1 << 20))
    refused(place, "trak", f"cache_dir={place.cache}", "make room")
    assert place.unfinished() == set()
