"""The five stages of the project, one entry each: what each depends on, builds on, and leaves behind."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One step from images to an answer: an entry point, and an MLflow run with its result.

    Attributes:
        name: the entry point, the script that computes the stage, and its runs' tag `stage`.
        groups: parameter groups that the result depends on, beside those of upstream stages.
        artifacts: what a finished run must still have for later commands to build on it; one name
            a checkpoint where it contains {m}. A replay compares tables and arrays among them.
        note: markdown at the top of the run's page in MLflow.
        about: what the command does, for --help.
        examples: flags of example commands.
        upstream: stages whose results this one needs, the nearest first.
        upstream_for: a further upstream stage that is needed only where a parameter is given.
        enough_for: the upstream stage whose result is enough where a parameter is given and no run
            of this stage is finished.
        more_groups: further parameter groups of the command, which do not change the result itself.
    """

    name: str
    groups: tuple[str, ...]
    artifacts: tuple[str, ...]
    note: str
    about: str
    examples: tuple[str, ...]
    upstream: tuple[str, ...] = ()
    upstream_for: Mapping[str, str] = field(default_factory=dict)
    enough_for: Mapping[str, str] = field(default_factory=dict)
    more_groups: tuple[str, ...] = ()

    @property
    def all_groups(self) -> tuple[str, ...]:
        """Every parameter group that the result depends on, upstream stages included."""
        above = STAGES[self.upstream[0]].all_groups if self.upstream else ()
        return above + self.groups

    def needed(self, config: Any) -> tuple[str, ...]:
        """The upstream stages whose results this one needs under these parameters."""
        more = [stage for name, stage in self.upstream_for.items() if getattr(config, name)]
        return (*self.upstream, *more)

    def script(self) -> ModuleType:
        """Import the module that computes the stage.

        It defines `check`, `estimate`, `run`, `load`, `record`, `outputs` and `show`;
        scripts/ablation.py is the one to read first. The import takes seconds (torch, MLflow),
        so it happens after the flags have been checked.
        """
        return importlib.import_module(f"scripts.{self.name}")


_STAGES = (
    Stage(
        name="finetune",
        about="Fine-tune an ensemble of classifiers, each on a random part of the training set.",
        examples=("--dataset path/to/images", "--dataset path/to/images --keep keep.csv --labels labels.csv --export corrected"),
        groups=("data", "training", "finetune"),
        more_groups=("corrected data", "files"),
        artifacts=("training/logits.npz", "checkpoint_{m:03d}/model.safetensors"),
        note="""\
An ensemble of checkpoints. Each one was trained on its own random part of the training set.

- Every checkpoint is a model: `mlflow.transformers.load_model` and `mlflow.pyfunc.load_model` take its
  address, such as `runs:/RUN_ID/checkpoint_000`, and `from_pretrained` its folder
- **Artifacts**: `training/curves.png` shows all curves
- Under `checkpoint_epochs`, epochs of one training run (tag `training_run`) saw the same part
- Next: the *trak* run scores the training examples with these checkpoints
""",
    ),
    Stage(
        name="trak",
        about="Score how much each training example helps or hurts each validation example (TRAK).",
        examples=("--dataset path/to/images", "--finetune_run_id RUN_ID"),
        groups=("trak",),
        upstream=("finetune",),
        artifacts=(
            "suspects.csv", "scores/scores.npy", "scores/train.parquet", "scores/targets.parquet",
            "scores/metadata.json",
        ),
        note="""\
How much each training example helps (positive) or hurts (negative) each validation example.

- **Artifacts**: `scores/gallery.png` shows the most helpful and most harmful examples of some
  targets; `suspects.json` lists the training examples that a person should check
- **Metrics**: where labels were flipped on purpose, `flips_auroc_…` says how well the flips are found
- Next: the *ablation* run removes examples by these scores and trains again
""",
    ),
    Stage(
        name="ablation",
        about="Remove training examples, train again without them, and compare: does it really change accuracy?",
        examples=("--dataset path/to/images --frac 0.05", "--dataset path/to/images --arms harmful,loss --frac 0.02,0.05 --num_seeds 20"),
        groups=("ablation",),
        upstream=("trak",),
        enough_for={"export_arm": "trak"},  # an arm chooses by scores: nothing is retrained
        more_groups=("design", "export", "output", "files"),
        artifacts=("comparison.csv", "contrasts.csv", "per_class.csv", "report.html"),
        note="The arms are being retrained. The comparison appears here when the run is finished.",
    ),
    Stage(
        name="evaluate",
        about="Measure how well the scores predict models that were really retrained on random subsets.",
        examples=("--trak_run_id RUN_ID", "--trak_run_id RUN_ID --methods trak,loss --num_subsets 50"),
        groups=("evaluate",),
        upstream=("trak", "finetune"),
        artifacts=("evaluation.csv", "bank/margins.npy"),
        note="""\
Is the attribution right? Each method's predictions against models retrained on random subsets.

- **Artifacts**: `evaluation.png` and `evaluation.json` compare the methods; every method is also a
  child run
- `lds` is the rank correlation of predicted and measured margins (1 is perfect; `random` gets 0)
""",
    ),
    Stage(
        name="explain",
        about="Show the training examples behind predictions: of mistakes, validation examples, or a new image.",
        examples=("--dataset path/to/images --errors 6", "--dataset path/to/images --image new.png"),
        groups=("explain",),
        upstream=("trak",),
        upstream_for={"image": "finetune"},  # a new picture needs the checkpoints themselves
        more_groups=("output", "files"),
        artifacts=("explanation.html", "explanation.csv"),
        note="Why the model predicts what it does: open `explanation.html` under **Artifacts**.",
    ),
)  # fmt: skip
STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}
