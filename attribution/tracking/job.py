"""What a stage is computed from, and what becomes of it: a job, and a finished upstream stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.tracking.fingerprint import stage_folder, work_folder
from attribution.tracking.stage_runs import run_tags


@dataclass(frozen=True)
class Upstream:
    """A finished stage that another one builds on: its run, and its result in hand."""

    run_id: str
    result: Any


@dataclass(frozen=True)
class Job:
    """What a stage's `run` gets.

    Attributes:
        config: the resolved parameters.
        data: the images with labels and splits.
        upstream: the finished upstream stages by name.
        run_id, experiment_id: of the run that the stage is computed in.
    """

    config: Config
    data: ImageData
    upstream: dict[str, Upstream]
    run_id: str
    experiment_id: str

    def result(self, stage: str) -> Any:
        """The result of an upstream stage."""
        return self.upstream[stage].result

    @property
    def run_ids(self) -> dict[str, str]:
        """The ids of the runs that this one builds on, by stage."""
        ids = {name: each.run_id for name, each in self.upstream.items()}
        if "trak" in ids and "finetune" not in ids:
            ids["finetune"] = run_tags(ids["trak"])["finetune_run_id"]
        return ids

    def stage_folder(self, stage: str, *parts: str) -> Path:
        """The folder for the stage's unfinished work, apart for each set of checkpoints."""
        folder = stage_folder(stage, self.config, self.data).joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def retrainings(self) -> Path:
        """The folder of finished retrainings, which later commands may use too."""
        return work_folder(self.config, "retrainings")
