"""What to type next: whole commands and addresses, each alone on its line and quoted for a shell."""

from __future__ import annotations

import shlex
from typing import Any

import mlflow

from attribution.config import FIELDS, PRESETS, Config, default_of
from attribution.errors import redact
from attribution.runtime.progress import say
from attribution.stages import STAGES

# Flags of finetune that train one model on everything, in place of an ensemble on random parts.
ONE_MODEL = {"num_models": 1, "subset_fraction": 1.0}


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
    trains = config.checkpoints and stage in ("finetune", "ablation", "evaluate")
    if trains:  # a run that was given its checkpoints has no settings of training
        groups = (*groups, "training")
    values = {
        name: value
        for name, value in config.group(*groups).items()
        if value != PRESETS[config.preset].get(name, default_of(FIELDS[name]))
        and not (name == "preset" and value != "food101")  # the others follow from the data set
    }
    if trains and config.has_no_start:
        values["model"] = "MODEL"
    if stage == "finetune":
        values.pop("checkpoints", "")
    if config.cache_dir != default_of(FIELDS["cache_dir"]):
        values["cache_dir"] = config.cache_dir
    flags = [(f"--{name}", f"{value}") for name, value in {**values, **given}.items()]
    return shlex.join(
        ["python", "-m", f"scripts.{stage}", *(word for each in flags for word in each)]
    )


def in_mlflow(link: str) -> list[str]:
    """How to open a page of MLflow: the command that starts the server, if one is needed; the address.

    Args:
        link: from tracking.links.
    """
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return [redact(f"{uri.rstrip('/')}/{link}")]
    # A password stays unprinted.
    store = shlex.quote(uri) if redact(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return [f"mlflow ui --backend-store-uri {store}", f"http://127.0.0.1:5000/{link}"]
