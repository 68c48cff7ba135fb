"""What a stage's result depends on, as a hash, and the folder of its unfinished work."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.config import Config
from attribution.errors import InputError
from attribution.runtime.cache_folder import cache_folder
from attribution.runtime.hashing import digest
from attribution.runtime.safe_files import sha256

if TYPE_CHECKING:
    from attribution.data.dataset import ImageData


# Raised whenever scoring would compute something else from the same parameters and data.
ESTIMATOR_VERSION = 5


UPSTREAM = {"trak": "finetune", "ablation": "trak", "evaluate": "trak", "explain": "trak"}


def fingerprint(stage: str, config: Config, data: ImageData) -> str:
    """Hash of all that a stage's result depends on, its upstream stages included.

    A replay's results have fingerprints of their own: it goes on from itself, and from nothing else.
    """
    if stage == "finetune":
        from attribution.models.train import training_key

        replay = [config.replay] if config.replay else []
        return digest(stage, training_key(config, data), config.group("finetune"), *replay)
    upstream = fingerprint(UPSTREAM[stage], config, data)
    settings = config.group(stage)
    if stage == "ablation" and config.groups in data.examples:
        settings["groups"] = [config.groups, digest(*data.examples[config.groups])]
    if stage == "explain" and config.image:
        settings["image"] = [Path(config.image).name, _content("image", config.image)]  # both shown
    if stage == "evaluate" and config.bank and not config.bank.startswith("runs:"):
        with suppress(InputError):  # load_bank says what is wrong with it
            settings["bank"] = [
                _content("bank", config.bank, file) for file in ("masks.npy", "margins.npy")
            ]
    return digest(stage, ESTIMATOR_VERSION, upstream, settings)


def _content(parameter: str, value: str, *parts: str) -> str:
    try:
        return sha256(Path(value, *parts).expanduser())
    except OSError as error:
        raise InputError(f"{parameter}={value}: cannot be read ({error.strerror})") from None


def work_folder(config: Config, *parts: str) -> Path:
    """A folder for unfinished work under cache_dir, a replay's its own.

    Raises:
        InputError: it cannot be written.
    """
    top = ("replays", config.replay) if config.replay else ("work",)
    return cache_folder(config, *top, *parts)


def stage_folder(stage: str, config: Config, data: ImageData, *parts: str) -> Path:
    """The work folder of one stage of a command, which goes when the stage's run is FINISHED.

    Args:
        parts: of a folder in it.
    """
    return work_folder(config, fingerprint(stage, config, data)[:16], *parts)
