"""What to type next: whole commands and addresses, each alone on its line and quoted for a shell."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import mlflow

from attribution.config import AUTO, FIELDS, PRESETS, SCRATCH_MODELS, Config
from attribution.errors import redact
from attribution.runtime.progress import say
from attribution.stages import STAGES
from attribution.tracking.artifacts import server_page

FEWEST = 3  # models with and without a correction, for an interval of its effect
# What every command with preset images has settled, by the data or by a flag.
CHOSEN = [n for n in AUTO if FIELDS[n].metadata["group"] in STAGES["finetune"].all_groups]


def say_next(what: str, *lines: str) -> None:
    """Say what can be done next, and below it the lines to type or to open."""
    say(f"\n{what}")
    for line in lines:
        say(f"  {line}")


def command(stage: str, config: Config, **given: Any) -> str:
    """A command with the settings of this one, as far as they are not those of a run it builds on.

    Args:
        given: flags of the command, such as the id of the run that it builds on.
    """
    builds_on_a_run = any(name.endswith("_run_id") for name in given)
    groups = STAGES[stage].groups if builds_on_a_run else STAGES[stage].all_groups
    start = {}
    if config.checkpoints and stage != "trak":  # it trains, and the run has no settings of training
        groups = (*groups, "training")
        start = {"model": "MODEL"} if config.has_no_start else {}
    values = {**config.group(*groups), "cache_dir": config.cache_dir, **start, **given}
    if stage == "finetune":
        values.pop("checkpoints")
    usual = _usual(config)
    flags = [(f"--{k}", f"{v}") for k, v in values.items() if k not in usual or v != usual[k]]
    return shlex.join(
        ["python", "-m", f"scripts.{stage}", *(word for each in flags for word in each)]
    )


def with_correction(config: Config, **files: Any) -> str:
    """The command that trains on a corrected data set, and on the data as they are, to compare.

    It trains on everything, in place of an ensemble on random parts, and as many models as the scores
    are averaged over: that number fits what one training costs.

    Args:
        files: keep, labels, export.
    """
    count = max(FEWEST, config.num_models)
    return command("finetune", config, num_models=count, subset_fraction=1.0, **files)


def _usual(config: Config) -> dict[str, Any]:
    """The parameters that a command on this data has without flags, as far as that is known."""
    usual = dataclasses.asdict(Config()) | PRESETS[config.preset]
    usual["preset"] = "digits" if config.dataset == "digits" else "images"
    # What this command chose by the data, another one may choose otherwise.
    by_data = CHOSEN if config.preset == "images" and not config.checkpoints else []
    return {name: value for name, value in usual.items() if name not in by_data}


def advice(config: Config, more: str) -> str:
    """What may help where models are weak, or no effect is found."""
    pretrained = "a pretrained model (--model microsoft/resnet-18), "
    return f"{pretrained if config.model in SCRATCH_MODELS else ''}more images, or {more}"


def in_mlflow(link: str) -> list[str]:
    """How to open a page of MLflow: the command that starts the server, if one is needed; the address.

    Args:
        link: from tracking.links.
    """
    if page := server_page(link):
        return [page]
    uri = mlflow.get_tracking_uri()
    # A password stays unprinted.
    store = shlex.quote(uri) if redact(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return [f"mlflow ui --backend-store-uri {store}", f"http://127.0.0.1:5000/{link}"]
