"""Replay: does a recorded run, repeated with nothing reused, come out the same?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attribution.errors import InputError
from attribution.runtime.progress import say
from attribution.runtime.safe_files import read_json, sha256
from attribution.tracking import stage_runs

# What is compared, stage by stage; of a folder every file of weights.
RESULTS = {
    "finetune": ("checkpoints", "training/logits.npz"),
    "trak": ("scores/scores.npy", "suspects.csv"),
    "ablation": ("comparison.csv", "per_class.csv"),
    "evaluate": ("evaluation.csv", "bank/margins.npy"),
    "explain": ("explanation.csv",),
}
NOT_COMPARED = ("date", "command")


def show(original: str, run_id: str) -> bool:
    """Print what of a replay differs from the original run, upstream runs included, and tag it.

    Returns:
        Whether all results are identical, bit by bit.
    """
    import mlflow

    then, now = (stage_runs.lineage(each) for each in (original, run_id))
    pairs = [(stage, then[f"{stage} run"], now[f"{stage} run"]) for stage in RESULTS
             if f"{stage} run" in then and f"{stage} run" in now]  # fmt: skip
    lines = [(stage, *line) for stage, *runs in pairs for line in _compare(stage, *runs)]
    for stage, name, found in lines:
        print(f"{stage:<9} {name:<22} {found or 'identical'}")
    differing = [line for line in lines if line[2]]
    verdict = "differs" if differing else "identical"
    print(f"replay of run {original}: {verdict}")
    if differing:
        for line in _changes(original, run_id):
            say(line)
    mlflow.MlflowClient().set_tag(run_id, "replay_result", verdict)
    return not differing


def _compare(stage: str, original: str, replay: str) -> Iterator[tuple[str, str]]:
    """Each result by name, with how it differs; an empty text where it does not."""
    for name in RESULTS[stage]:
        try:
            files = [stage_runs.artifact_path(run_id, name) for run_id in (original, replay)]
        except InputError:  # not kept by one of them
            continue
        yield name, _difference(*files)


def _difference(original: Path, replay: Path) -> str:
    if original.is_dir():
        weights = [sorted(folder.rglob("*.safetensors")) for folder in (original, replay)]
        if len(weights[0]) != len(weights[1]):
            return f"{len(weights[0])} checkpoints then, {len(weights[1])} now"
        changed = sum(sha256(a) != sha256(b) for a, b in zip(*weights, strict=True))
        return f"{changed} of {len(weights[0])} checkpoints differ" if changed else ""
    if original.suffix == ".csv":
        return _table_difference(original, replay)
    pairs = [_arrays(file) for file in (original, replay)]
    names, apart = sorted({name for pair in pairs for name in pair}), []
    for name in names:
        then, now = (pair.get(name) for pair in pairs)
        if then is None or now is None or now.shape != then.shape:
            return f"{name}: another shape"
        if then.dtype != now.dtype or then.tobytes() != now.tobytes():
            apart.append(float(np.abs(np.subtract(then, now, dtype=np.float64)).max()))
    if not apart:
        return ""
    largest = max(apart)  # zero where only a sign of zero or a type differs; NaN is neither
    return f"differs by at most {largest:.3g}" if largest > 0 else "other bits"


def _table_difference(original: Path, replay: Path) -> str:
    import pandas as pd

    if original.read_bytes() == replay.read_bytes():
        return ""
    then, now = pd.read_csv(original), pd.read_csv(replay)
    if then.shape != now.shape or list(then) != list(now):
        return f"another shape: {then.shape} then, {now.shape} now"
    numbers = then.select_dtypes("number")
    apart = (numbers - now[list(numbers)]).abs().max()
    if not apart.max() > 0:
        return "other texts"
    return f"differs by at most {apart.max():.3g} ({apart.idxmax()})"


def _arrays(file: Path) -> dict[str, np.ndarray]:
    loaded = np.load(file, allow_pickle=False)
    return {"": loaded} if file.suffix == ".npy" else dict(loaded)


def _changes(original: str, replay: str) -> list[str]:
    """What was another thing when the original was made: versions, hardware, commit."""
    try:
        then, now = (
            read_json(stage_runs.artifact_path(run_id, stage_runs.ENVIRONMENT))
            for run_id in (original, replay)
        )
    except (InputError, ValueError):
        return ["nothing is recorded of what the original was made with"]
    keys = sorted((then.keys() | now.keys()) - set(NOT_COMPARED))
    return [f"{k}: {then.get(k)} then, {now.get(k)} now" for k in keys if then.get(k) != now.get(k)]
