"""What `benchmark soak` and `benchmark load` count: processes, their memory and files, and growth."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from benchmarks import load, soak
from scripts.ablation import NOTED, describe

OPTIONS = argparse.Namespace(every=20, warm_up=10)


def rows(**values: np.ndarray) -> dict[str, dict]:
    samples = [dict(zip(values, sample)) for sample in zip(*values.values(), strict=True)]
    return {row["what"]: row for row in soak.summary(samples, OPTIONS)}


def test_growth_is_told_from_noise_and_from_the_start() -> None:
    count = 360  # two hours
    noise = np.random.default_rng(0).normal(0, 5, count)
    steady = 1000 + noise + 800 * (np.arange(count) < 30)  # much in the first ten minutes
    found = rows(
        stacks=np.arange(count), steady=steady, leak=1000 + noise + np.arange(count), same=np.ones(count)
    )  # fmt: skip
    assert [found[name]["growth"] for name in ("steady", "leak", "same")] == ["no", "yes", "no"]
    assert found["leak"]["an_hour"] == pytest.approx(180, abs=found["leak"]["an_hour_ci"])
    assert found["leak"]["last_third"] - found["leak"]["first_third"] == pytest.approx(220, abs=5)
    assert found["same"]["an_hour_ci"] == 0
    assert found["leak"]["samples"] == count - 30 and found["leak"]["models_trained"] == 3590


def test_processes_are_counted_with_their_open_files_and_memory() -> None:
    code = """if True:
        import subprocess, sys, time
        files = [open("/dev/null") for _ in range(50)]
        held = bytearray(200 << 20)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        child = int(process.stdout.readline())
        found = soak.measure(process.pid)
        assert soak.descendants(process.pid) == [child]
        assert 50 < found["open files"] < 70
        assert 200 < found["MiB anonymous"] < 400 and found["threads"] == 1
    finally:
        process.kill()
        process.wait()
        subprocess.run(["kill", str(child)], check=True)
    assert soak.measure(process.pid) == {} and soak.descendants(process.pid) == []


def stages(size: int):
    held = np.ones(size << 17)  # MiB
    time.sleep(0.5)  # longer than between two looks
    yield "much"
    del held
    time.sleep(0.5)
    yield "little"


def fails():
    yield "first"
    raise ValueError


def test_each_stage_has_its_own_peak() -> None:
    much, little = load.watched(stages, 500)
    assert (much[0], little[0]) == ("much", "little")
    assert much[2]["driver MiB anonymous"] - little[2]["driver MiB anonymous"] > 400
    with pytest.raises(RuntimeError, match="exit code 1"):
        list(load.watched(fails))


def test_images_are_as_many_as_asked_for_and_no_two_alike(tmp_path: Path) -> None:
    load.make_images(tmp_path, {"train": 25, "test": 12})
    files = [*tmp_path.glob("*/class ?/*.png")]
    assert len({file.read_bytes() for file in files}) == len(files) == 37


@pytest.mark.parametrize("count", [3, 300])
def test_the_note_of_very_many_arms_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    none = {"arm": "none", "action": "remove", "frac": 0.0, "n_removed": 0}
    arms = [{**none, "frac": i / 1000, "accuracy_mean": i / count} for i in range(count)]
    with mlflow.start_run():
        runs = []
        for arm in arms:
            with mlflow.start_run(nested=True) as run:
                mlflow.log_metric("accuracy_mean", arm["accuracy_mean"])
                runs.append(run.info.run_id)
        note = describe(pd.DataFrame(arms), "a" * 32)
    shown = min(count, NOTED)
    assert len(note) < 8000
    assert all((run in note) == (i >= count - shown) for i, run in enumerate(runs))
    assert note.count("\n- **none") == shown
    assert ("and 260 more" in note) == (count == 300)
