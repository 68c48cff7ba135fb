"""What a command will compute, about how long that takes, and whether the disks have room for it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from attribution.config import Config
from attribution.errors import InputError
from attribution.models.model_facts import forward_flops
from attribution.models.train import seconds_per_example, stacking_pays
from attribution.runtime.device import resolve_device
from attribution.runtime.pace import duration
from attribution.runtime.parallel import resolve_jobs
from attribution.stages import STAGES
from attribution.tracking.artifacts import local_root

# Relative to a training step of one model whose kernels are called one by one. Measured on two
# AVX-512 cores and on an H200, which then waits for the calls (docs/performance.md).
FEATURE_COST = {"cpu": 1.6, "cuda": 0.25}  # of an example, sketched and scored
TRAINING_GAIN = {"cpu": 1.0, "cuda": 1.5}
STACK_GAIN = {"cpu": 1.34, "cuda": 11.0}  # of small models that are trained as one
START_UP = 12.0  # seconds of a stage: worker processes import torch, artifacts are written
OVERHEAD = 1.3  # of a step: its data, the optimizer, and workers that share caches and memory
TABLES = 1.05  # tables, figures and file headers, relative to the matrices
SPARE = 100 << 20  # bytes left free for others


@dataclass(frozen=True)
class Estimate:
    """What one stage will do.

    Attributes:
        what: in words.
        trained: training steps, counted in images.
        gradients: images whose gradients are computed.
        tasks: how many can run at the same time.
        retrains: whether small models are trained in stacks.
        work: bytes in cache_dir while the stage runs.
        kept: bytes of the run's artifacts.
    """

    what: str
    trained: float = 0.0
    gradients: int = 0
    tasks: int = 1
    retrains: bool = False
    work: int = 0
    kept: int = 0


def retraining_estimate(
    config: Config, models: int, size: int, gradients: int = 0, work: int = 0, kept: int = 0
) -> Estimate:
    """The estimate of a stage that retrains at most so many models on about `size` images each."""
    most = "at most " if config.patience else ""
    return Estimate(
        f"up to {models} models, {most}{config.epochs} epochs of {size:,} images",
        models * config.epochs * size,
        gradients,
        tasks=max(1, models),
        retrains=True,
        work=work,
        kept=kept,
    )


def seconds_of(
    estimates: Mapping[str, Estimate], config: Config, class_names: tuple[str, ...]
) -> dict[str, float]:
    """How many seconds each stage will take; empty where the machines are not known (Ray)."""
    images = sum(e.trained + e.gradients for e in estimates.values())
    if config.backend == "ray" or not images:
        return {}
    device = resolve_device(config.device).type
    # How many models there are does not matter, so that one measurement serves every number of them.
    same = dataclasses.replace(config, num_models=1, num_seeds=2)
    step, whole = _step_seconds(same, class_names)
    if not step:  # the model refuses the image size, which is reported in a moment
        return {}
    found = {}
    for stage, estimate in estimates.items():
        gain = TRAINING_GAIN[device]
        if estimate.retrains and stacking_pays(config):
            gain = STACK_GAIN[device]
        gradient = FEATURE_COST[device] * (step if config.train_layers == "head" else whole)
        work = estimate.trained / gain * step + estimate.gradients * gradient
        if config.train_layers != "all":  # frozen layers run once for each image
            work += whole * (estimate.trained / config.epochs + estimate.gradients) / estimate.tasks
        jobs = resolve_jobs(config.jobs, device, estimate.tasks)
        found[stage] = work / jobs + (START_UP if work else 0.0)
    return found


@cache
def _step_seconds(config: Config, class_names: tuple[str, ...]) -> tuple[float, float]:
    """Seconds for an image of a training step, and of one in which frozen layers run too.

    Both are 0 where the model refuses the image size.
    """
    flops = forward_flops(config.model, config.image_size)
    if not flops:
        return 0.0, 0.0
    step = whole = seconds_per_example(config, class_names, flops)
    if config.train_layers != "all":
        whole = seconds_per_example(config, class_names, flops, True)
    return OVERHEAD * step, OVERHEAD * whole


def describe(
    estimates: Mapping[str, Estimate],
    reused: Mapping[str, str],
    seconds: Mapping[str, float],
    config: Config,
) -> list[str]:
    """The plan as lines for a terminal.

    Args:
        estimates: of the stages that will be computed.
        reused: run ids of the stages that will be reused.
        seconds: as seconds_of gives them.
    """
    width = max(map(len, [*estimates, *reused]))
    lines = ["plan:"]
    for stage in STAGES:
        if stage in reused:
            lines.append(f"  {stage:<{width}}  reuses run {reused[stage]}")
        elif stage in estimates:
            about = f"   about {duration(seconds[stage])}" if seconds.get(stage) else ""
            lines.append(f"  {stage:<{width}}  {estimates[stage].what}{about}")
    if len([value for value in seconds.values() if value]) > 1:
        device = resolve_device(config.device).type
        jobs = resolve_jobs(config.jobs, device, max(e.tasks for e in estimates.values()))
        workers = f"{jobs} workers" if jobs > 1 else "1 worker"
        total = duration(sum(seconds.values()))
        lines.append(f"  Total: about {total} with {workers} (cached results are skipped)")
    most, kept = disk_need(estimates)
    lines.append(f"  Disk: about {bytes_text(most)} while it runs, {bytes_text(kept)} of it kept")
    return lines


def disk_need(estimates: Mapping[str, Estimate]) -> tuple[int, int]:
    """Bytes while the stages run one after the other, and bytes that are kept."""
    kept = sum(estimate.kept for estimate in estimates.values())
    return sum(estimate.work for estimate in estimates.values()) + kept, kept


def check_disk(
    estimates: Mapping[str, Estimate], config: Config, artifact_uri: str, finished: int = 0
) -> None:
    """Refuse a command whose files will not fit on the disks of this machine.

    Args:
        finished: bytes of work that an interrupted command has left in cache_dir for this one.

    Raises:
        InputError: a disk has less room than the files that will lie on it at the same time.
    """
    most, kept = disk_need(estimates)
    copied = max((estimate.kept for estimate in estimates.values()), default=0)
    work = max(0, most - kept - finished)
    wanted = [(Path(config.cache_dir), work), (Path(tempfile.gettempdir()), copied)]
    artifacts = local_root(artifact_uri)
    if artifacts:
        wanted.append((artifacts, kept))
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in wanted:
        there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
        disks.setdefault(os.stat(there).st_dev, []).append((there, size))
    for parts in disks.values():
        total = TABLES * sum(size for _, size in parts)
        free = shutil.disk_usage(parts[0][0]).free
        if total + SPARE > free:
            where = " and ".join(dict.fromkeys(str(folder) for folder, _ in parts))
            raise InputError(
                f"cache_dir={config.cache_dir}: about {bytes_text(total)}, and {bytes_text(SPARE)} to "
                f"spare, are needed in {where}, but only {bytes_text(free)} are free; make room, name "
                "a cache_dir on another disk, lower proj_dim, num_blocks or num_models, or use "
                "keep_features=no"
            )


def bytes_text(size: float) -> str:
    """'1.2 GiB' or '35 MiB'."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
