"""Fingerprints: hashes of all that a stage's result depends on; and folders for unfinished work."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import given
from attribution.models.train import training_key
from attribution.runtime.cache_folder import cache_folder
from attribution.runtime.hashing import digest
from attribution.runtime.safe_files import sha256
from attribution.stages import STAGES

# Raise it when the same parameters and data would give other scores, or another result made from
# scores. TRAINING_VERSION in attribution/models does the same for trained models.
ESTIMATOR_VERSION = 8

# A command asks often, and the key of a model folder reads every file.
_training_key = lru_cache(maxsize=8)(training_key)


def fingerprint(stage: str, config: Config, data: ImageData) -> str:
    """Hash of all that a stage's result depends on, its upstream stages included.

    A replay has fingerprints of its own, so that it continues its own unfinished work and reuses
    nothing else.

    Raises:
        InputError: a file that a parameter names cannot be read.
    """
    settings = config.group(stage)
    if not STAGES[stage].upstream:
        key = given.key if settings.pop("checkpoints") else _training_key
        return digest(stage, key(config, data), settings, config.replay)
    upstream = fingerprint(STAGES[stage].upstream[0], config, data)
    settings |= _contents(settings, data)
    if config.checkpoints and stage in ("ablation", "evaluate"):  # they train other models
        settings["training"] = _training_key(config, data)
    return digest(stage, ESTIMATOR_VERSION, upstream, settings)


def _contents(settings: dict[str, Any], data: ImageData) -> dict[str, Any]:
    """What stands for those of these parameters that name something whose content counts."""
    found: dict[str, Any] = {}
    column, image, bank = (settings.get(name, "") for name in ("groups", "image", "bank"))
    if column in data.examples:
        found["groups"] = [column, digest(*data.examples[column])]
    if image:
        found["image"] = [Path(image).name, _content("image", image)]  # the result shows both
    if bank and not bank.startswith("runs:"):
        with suppress(InputError):  # load_bank explains what is wrong with it
            files = ("masks.npy", "margins.npy")
            found["bank"] = [_content("bank", bank, file) for file in files]
    return found


def _content(parameter: str, value: str, *parts: str) -> str:
    try:
        return sha256(Path(value, *parts).expanduser())
    except OSError as error:
        raise InputError(f"{parameter}={value}: cannot be read ({error.strerror})") from None


def work_folder(config: Config, *parts: str) -> Path:
    """A folder for unfinished work under cache_dir; a replay has its own.

    Raises:
        InputError: it cannot be written.
    """
    top = ("replays", config.replay) if config.replay else ("work",)
    return cache_folder(config, *top, *parts)


def stage_folder(stage: str, config: Config, data: ImageData) -> Path:
    """The folder for one stage's unfinished work, deleted once the stage's run is FINISHED."""
    return work_folder(config, fingerprint(stage, config, data)[:16])
