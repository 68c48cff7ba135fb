"""Replay: is a recorded run, computed again with nothing reused, identical?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from attribution.errors import InputError
from attribution.runtime.progress import say
from attribution.runtime.safe_files import read_json, sha256
from attribution.stages import STAGES
from attribution.tracking.artifacts import artifact_path, logged_models
from attribution.tracking.logged_models import WEIGHTS
from attribution.tracking.stage_runs import ENVIRONMENT, lineage

COMPARED = (".csv", ".npy", ".npz")  # artifacts of a stage
NOT_COMPARED = ("date", "command")  # of the environment


def report_replay(original: str, replay: str) -> bool:
    """Print which results of a replay differ from the original run, upstream runs included.

    Returns:
        Whether all results are identical bit by bit. The replay's run gets it as a tag.
    """
    then, now = lineage(original), lineage(replay)
    differing = 0
    for stage in STAGES:
        if stage in then and stage in now:
            for name, difference in _compare(stage, then[stage], now[stage]):
                print(f"{stage:<9} {name:<22} {difference or 'identical'}")
                differing += bool(difference)
    verdict = "differs" if differing else "identical"
    print(f"replay of run {original}: {verdict}")
    mlflow.MlflowClient().set_tag(replay, "replay_result", verdict)
    if differing:
        _say_changes(original, replay)
    return not differing


def _compare(stage: str, *run_ids: str) -> Iterator[tuple[str, str]]:
    """Each result's name and difference, which is empty where there is none."""
    # A run may have kept the best of its checkpoints alone, or none.
    kept = sorted(set.intersection(*(set(logged_models(run_id)) for run_id in run_ids)))
    if kept:
        yield "checkpoints", _weights_difference(kept, *run_ids)
    for name in [name for name in STAGES[stage].artifacts if name.endswith(COMPARED)]:
        try:
            then, now = (artifact_path(run_id, name) for run_id in run_ids)
        except InputError:  # one of the runs did not keep it
            continue
        yield name, _difference(then, now)


def _weights_difference(models: list[str], *run_ids: str) -> str:
    hashes = [[sha256(artifact_path(r, name) / WEIGHTS) for name in models] for r in run_ids]
    changed = sum(then != now for then, now in zip(*hashes, strict=True))
    return f"{changed} of {len(models)} checkpoints differ" if changed else ""


def _difference(then: Path, now: Path) -> str:
    if sha256(then) == sha256(now):
        return ""
    old, new = _numbers(then), _numbers(now)
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name].shape != new[name].shape:
            return f"{name}: another shape"
    apart = {k: np.abs(np.subtract(old[k], new[k], dtype=np.float64)).max(initial=0) for k in old}
    name = max(apart, key=lambda k: np.nan_to_num(apart[k]), default="")
    if not apart or not apart[name] > 0:
        return "not identical bit by bit"
    return f"differs by at most {apart[name]:.3g} ({name})"


def _numbers(file: Path) -> dict[str, np.ndarray]:
    """The numeric arrays or columns of a result file, by name."""
    if file.suffix == ".csv":
        table = pd.read_csv(file).select_dtypes("number")
        return {name: table[name].to_numpy() for name in table}
    loaded = np.load(file, allow_pickle=False)
    return {file.stem: loaded} if file.suffix == ".npy" else dict(loaded)


def _say_changes(original: str, replay: str) -> None:
    """Print what has changed in versions and hardware since the original run."""
    then, now = (read_json(artifact_path(run_id, ENVIRONMENT)) for run_id in (original, replay))
    for key in sorted((then.keys() | now.keys()) - set(NOT_COMPARED)):
        if then.get(key) != now.get(key):
            say(f"{key}: {then.get(key)} then, {now.get(key)} now")
