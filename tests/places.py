"""An MLflow store and a cache for a test, commands that run there, and tiny images for them."""

from __future__ import annotations

import contextlib
import io
import os
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"blue": (70, 70, 170), "green": (70, 170, 70), "red": (170, 70, 70)}
IMAGES_PER_CLASS = 14
# What makes every stage small; the preset (images) fills in the rest.
SMALL = {
    "model": "resnet-mini",
    "image_size": 16,
    "num_models": 2,
    "epochs": 2,
    "proj_dim": 32,
    "batch_size": 8,
    "jobs": 1,
    "device": "cpu",
    "num_seeds": 2,
    "frac": 0.1,
    "arms": "none,random,harmful",
}


def write_images(folder: Path, per_class: int = IMAGES_PER_CLASS, seed: int = 0) -> Path:
    """Three classes told apart by colour, under noise that makes every image another one."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.integers(-70, 70, (16, 16, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder


@dataclass(frozen=True)
class Result:
    """What one command said and left: its exit code, output, and the runs that it opened."""

    code: int
    out: str
    err: str
    runs: list[Any]  # mlflow.entities.Run, oldest first: the command's own run, then the others

    @property
    def run_id(self) -> str:
        return self.runs[0].info.run_id

    @property
    def tags(self) -> dict[str, str]:
        return self.runs[0].data.tags

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def made(self) -> set[str]:
        """The stages that were computed, and not taken from another run."""
        return {
            run.data.tags["stage"]
            for run in self.runs
            if "fingerprint" in run.data.tags and run.info.status == "FINISHED"
        }


@dataclass(frozen=True)
class Place:
    """An MLflow store (sqlite and artifacts) and a cache, shared with no other place."""

    root: Path
    dataset: Path
    experiment: str = "tests"
    small: dict[str, Any] = field(default_factory=lambda: dict(SMALL))

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.root}/mlflow.db",
            "MLFLOW_EXPERIMENT_NAME": self.experiment,
            "TRAK_ABLATION_CACHE": str(self.cache),
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[pytest.MonkeyPatch]:
        """MLflow and the cache are here inside the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield patch

    def argv(self, stage: str, **given: Any) -> list[str]:
        """Flags of a small run on the tiny images; None leaves a parameter out."""
        from attribution.config import FIELDS
        from attribution.stages import STAGES

        groups = (*STAGES[stage].all_groups, "execution")
        small = {k: v for k, v in self.small.items() if FIELDS[k].metadata["group"] in groups}
        values = {"dataset": self.dataset, **small, **given}
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    def run(self, stage: str, **given: Any) -> Result:
        """The stage's command in this process, as `python -m scripts.STAGE` would run it."""
        from attribution.cli.main import run_command

        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            self.active() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            if stage == "evaluate":  # its intervals have tests of their own
                patch.setattr("attribution.experiments.evaluation.DRAWS", 50)
            before = set(self._run_ids())
            try:
                code = run_command(stage, self.argv(stage, **given))
            except SystemExit as stop:  # argparse
                code = stop.code
            new = [self.client().get_run(i) for i in self._run_ids() if i not in before]
        return Result(code, out.getvalue(), err.getvalue(), new)

    def _run_ids(self) -> list[str]:
        """Ids of all runs, also of deleted ones, in order of their start; MLflow takes longer."""
        with contextlib.closing(sqlite3.connect(self.root / "mlflow.db")) as store:
            rows = store.execute("SELECT run_uuid FROM runs ORDER BY start_time, run_uuid")
            return [run_id for (run_id,) in rows]

    def done(self, stage: str, **given: Any) -> Result:
        """The same for a command that has to succeed."""
        result = self.run(stage, **given)
        assert result.code == 0, result.err
        return result

    def runs(self, stage: str = "") -> list[Any]:
        """All runs in order of their start, or those of a stage that computed something."""
        client = self.client()
        experiment = client.get_experiment_by_name(self.experiment)
        found = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
        if not stage:
            return found
        tags = [(run, run.data.tags) for run in found]
        return [run for run, tag in tags if tag.get("stage") == stage and "fingerprint" in tag]

    def children(self, run_id: str) -> list[Any]:
        return [r for r in self.runs() if r.data.tags.get("mlflow.parentRunId") == run_id]

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def artifacts(self, run_id: str) -> Path:
        """The folder of a run's artifacts (it need not exist)."""
        return self.root / "artifacts" / run_id / "artifacts"

    def models(self, run_id: str) -> list[Any]:
        """The models of a finetune run, in order."""
        where = [self.client().get_run(run_id).info.experiment_id]
        found = self.client().search_logged_models(where, f"source_run_id = '{run_id}'")
        return sorted(found, key=lambda model: model.name)

    def checkpoints(self, run_id: str) -> list[Path]:
        """The folders of these models."""
        return [Path(m.artifact_location.removeprefix("file://")) for m in self.models(run_id)]

    def unfinished(self) -> set[str]:
        """Every file that an interrupted or failed command left for the next one."""
        work = self.cache / "work"
        return {str(file.relative_to(work)) for file in work.rglob("*") if file.is_file()}


@contextlib.contextmanager
def unreadable_artifacts() -> Iterator[None]:
    """Inside the block no artifact of a run can be read, from disk or by a download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.artifacts.download_artifacts", None)
        patch.setattr("attribution.tracking.artifacts.local_root", lambda uri: None)
        yield


def child_environment(place: Place) -> dict[str, str]:
    """The environment of a subprocess: this interpreter, this place, one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **place.environment, "PATH": path, "OMP_NUM_THREADS": "1"}


def run_id(place: Place, stage: str) -> str:
    return place.runs(stage)[0].info.run_id


def refused(place: Place, stage: str, *fragments: str, **given: Any) -> Result:
    """The command fails with one line that holds the fragments, and leaves nothing to build on."""
    before = place.unfinished()
    result = place.run(stage, **given)
    check_refusal(result, *fragments)
    assert not result.made()
    for run in result.runs:
        assert run.info.status == "FAILED"
        left = {file.name for file in place.artifacts(run.info.run_id).glob("*")}
        assert left <= {"environment.json"}  # written before anything is computed
    if result.runs:
        assert result.tags["error"] == result.errors[0].removeprefix("error: ")
        assert result.tags["stage"] == stage
    assert finished(place.unfinished()) == finished(before)
    return result


def check_refusal(result: Result, *fragments: str) -> None:
    assert result.code not in (0, None), result.out
    assert len(result.errors) == 1, result.err
    assert result.err.splitlines()[-1] == result.errors[0]
    assert "Traceback" not in result.err and not result.out
    assert len(result.errors[0]) < 500
    for fragment in fragments:
        assert fragment in result.errors[0], result.errors[0]


def finished(files: set[str]) -> set[str]:
    """Files that a later command would take for a result."""
    names = ("done", "logits.npz", "history.json")
    return {f for f in files if f.endswith(names) or f.startswith("retrainings/")}
