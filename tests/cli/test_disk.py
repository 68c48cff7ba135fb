"""Disk: the estimate is what is written, and what will not fit is refused before anything is begun."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Place, refused
from toy import toy_config, toy_data

from attribution.cli import disk
from attribution.cli.disk import Need, check_disk, gibibytes, stage_need
from attribution.config import parse, resolve
from attribution.data.dataset import load_data
from attribution.errors import InputError
from attribution.models import classifier
from attribution.scores.trak import compute_scores

NewPlace = Callable[..., Place]
ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


def size(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def weights(place: Place, run_id: str) -> dict[str, bytes]:
    files = place.artifacts(run_id).rglob("*.safetensors")
    return {file.parent.name: file.read_bytes() for file in files}


def test_the_estimate_of_scoring_is_what_scoring_leaves(tmp_path: Path) -> None:
    data = toy_data(tmp_path, n_train=200)
    config = toy_config(num_models=2, proj_dim=64, num_blocks=4)
    model = classifier.build("resnet-mini", data.class_names, seed=0)
    classifier.save(model, tmp_path / "model", 16, *classifier.normalisation("resnet-mini"))
    compute_scores(config, data, [tmp_path / "model"] * 2, tmp_path / "work")
    written = size(tmp_path / "work")
    assert stage_need("trak", config, data).work == pytest.approx(written, rel=0.1)
    assert stage_need("trak", config, data).work < 1.1 * written


@pytest.fixture(scope="module")
def scored(new_place: NewPlace) -> tuple[Place, Any]:
    """A place where `trak` made everything, and that command's result."""
    place = new_place("scored")
    return place, place.done("trak")


def test_the_estimate_of_artifacts_is_what_a_command_leaves(scored) -> None:
    place, result = scored
    config = resolve(parse("trak", place.argv("trak")) | {"cache_dir": str(place.cache)})
    data = load_data(config)
    needs = {stage: stage_need(stage, config, data).artifacts for stage in ("finetune", "trak")}
    matrices = sum(
        size(place.artifacts(result.run_id), name) for name in ("scores.npy", "train.npy")
    )
    assert needs["trak"] == pytest.approx(matrices, rel=0.2)
    checkpoints = size(place.artifacts(result.tags["finetune_run_id"]), "*.safetensors")
    assert needs["finetune"] == pytest.approx(checkpoints, rel=0.1)


@pytest.mark.parametrize("where", ["work", "artifacts"])
def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch, where: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 << 30))
    config = toy_config(cache_dir=str(tmp_path / "cache"))
    uri = (tmp_path / "mlruns" / "1").as_uri()
    check_disk(Need(**{where: 1 << 30}), config, uri)
    check_disk(Need(artifacts=9 << 30), config, "s3://bucket/1")  # not a disk of this machine
    with pytest.raises(InputError, match=r"cache_dir=.*about 2\.1 GiB .* 2\.0 GiB are free"):
        check_disk(Need(**{where: 2 << 30}), config, uri)


def test_needs_on_one_disk_add_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 << 30))
    config, uri = toy_config(cache_dir=str(tmp_path)), tmp_path.as_uri()
    with pytest.raises(InputError, match="free"):
        check_disk(Need(work=1 << 30, artifacts=1 << 30), config, uri)


def test_a_command_that_does_not_fit_leaves_nothing(new_place, monkeypatch) -> None:
    place: Place = new_place("full")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(0, 0, 1 << 20))
    refused(place, "trak", f"cache_dir={place.cache}", "make room")
    assert place.unfinished() == set()


def test_sizes_are_told_as_people_do() -> None:
    assert gibibytes(3 << 29) == "1.5 GiB" and gibibytes(5 << 20) == "5 MiB"


@pytest.mark.parametrize(("keep", "left"), [("best", 1), ("none", 0)])
def test_checkpoints_go_when_the_command_has_ended_and_come_back_the_same(
    scored, new_place: NewPlace, keep: str, left: int
) -> None:
    source, first = scored
    place = new_place("copy", like=source)
    finetune_id = first.tags["finetune_run_id"]
    before = weights(place, finetune_id)
    result = place.done("trak", lambda_reg=0.3, keep_checkpoints=keep)
    assert f"{2 - left} checkpoints of run {finetune_id} deleted" in result.err
    after = weights(place, finetune_id)
    assert len(after) == left and after.items() <= before.items()
    assert place.done("ablation", lambda_reg=0.3).made() == {"ablation"}  # needs none of them
    again = place.done("trak", lambda_reg=0.7)
    assert again.made() == {"finetune", "trak"}
    assert weights(place, again.tags["finetune_run_id"]) == before


def test_a_folder_that_does_not_fit_on_the_disk_is_not_there(tmp_path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from attribution.runtime.parallel import write_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
        try:
            write_folder(Path(sys.argv[1]), {"small": np.zeros(10, np.uint8)})
        except OSError as error:
            sys.exit(error.errno)"""
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == errno.EFBIG, done.stderr
    assert not list(tmp_path.iterdir())
