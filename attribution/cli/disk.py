"""Disk: how much a command will need, where, and whether it is there before anything is begun."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.experiments.methods import FEATURISING
from attribution.models.classifier import parameter_count
from attribution.runtime.parallel import ask
from attribution.scores.stored_features import AUTO_BYTES

ABOUT = 1.05  # tables, pictures, headers
SPARE = 100 << 20  # bytes that are left to others


@dataclass(frozen=True)
class Need:
    """Bytes of one stage: in cache_dir and the folder for temporary files while it runs, and for good."""

    work: int = 0
    temporary: int = 0
    artifacts: int = 0


def stage_need(stage: str, config: Config, data: ImageData) -> Need:
    """What a stage writes, computed from the shapes of what it writes."""
    length = config.proj_dim * config.num_blocks
    n, targets, test = (len(data.rows(s)) for s in ("train", "validation", "test"))
    classes, m = len(data.class_names), config.num_models
    # Features of both splits, and every checkpoint's factors and whitened targets.
    features = m * length * (n + 2 * targets + config.proj_dim) * 4
    if stage == "finetune":
        model = 4 * ask(parameter_count, config.model, classes)
        logits = 8 * m * (n + targets) * classes
        return Need(m * model + logits, model + logits, m * model + logits)
    if stage == "trak":
        scores, stored = n * targets * 4, m * n * length * 2
        wanted = {"yes": True, "no": False, "auto": stored <= AUTO_BYTES}[config.keep_features]
        kept = scores + stored * wanted
        return Need(features + scores, kept, kept)
    if stage == "evaluate":
        matrices = sum(name not in ("loss", "confident", "random") for name in config.method_names)
        models = config.num_subsets * config.num_repeats * (not config.bank)
        bank = models * targets * (classes * 4 + 8)
        own = features * bool(FEATURISING.intersection(config.method_names))
        return Need(bank + matrices * n * targets * 4 + own, bank, bank)
    if stage == "ablation":
        models = config.num_seeds * len(config.fracs) * 2 * len(config.arm_names)
        return Need(models * test * classes * 4, 0, 0)
    return Need()


def total_need(stages: list[str], config: Config, data: ImageData) -> Need:
    """Of stages that follow one another: work and temporary files go when a stage is finished."""
    needs = [stage_need(stage, config, data) for stage in stages]
    return Need(
        max((need.work for need in needs), default=0),
        max((need.temporary for need in needs), default=0),
        sum(need.artifacts for need in needs),
    )


def check_disk(need: Need, config: Config, artifact_uri: str) -> None:
    """Refuse a command whose files will not fit, each disk taken as a whole.

    Raises:
        InputError: a disk has less room than what will lie on it at one time.
    """
    wanted = [(Path(config.cache_dir), need.work), (Path(tempfile.gettempdir()), need.temporary)]
    if urlparse(artifact_uri).scheme in ("", "file"):
        wanted.append((Path(unquote(urlparse(artifact_uri).path)), need.artifacts))
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in wanted:
        there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
        disks.setdefault(os.stat(there).st_dev, []).append((there, size))
    for parts in disks.values():
        total, free = ABOUT * sum(size for _, size in parts), shutil.disk_usage(parts[0][0]).free
        if total + SPARE > free:
            where = " and ".join(dict.fromkeys(str(folder) for folder, _ in parts))
            raise InputError(
                f"cache_dir={config.cache_dir}: about {gibibytes(total)} will be needed in {where}, "
                f"where {gibibytes(free)} are free; make room, name a cache_dir on another disk, or "
                "lower proj_dim, num_blocks or num_models, or keep_features=no"
            )


def gibibytes(size: float) -> str:
    """'1.2 GiB' or '35 MiB'."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
