"""Files that a person asked for beside the run: whole or not at all, and nothing is replaced unasked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from attribution.config import Config
from attribution.errors import InputError
from attribution.tracking.stage_runs import artifact_path


def refuse_existing(files: Iterable[Path], config: Config) -> None:
    """Raise InputError where one of these files is there and may not be replaced, or cannot be made."""
    for file in files:
        if file.exists() and config.overwrite == "no":
            raise InputError(f"output={file}: exists; name another folder, or add --overwrite")
        nearest = next(folder for folder in file.absolute().parents if folder.exists())
        if not nearest.is_dir():
            raise InputError(f"output={config.output}: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK):
            raise InputError(f"output={config.output}: {nearest} cannot be written to")


def save_artifacts(run_id: str, config: Config, suffixes: tuple[str, ...]) -> Path:
    """Copy a run's uppermost artifacts of these kinds into the folder `output`; returns it.

    Raises:
        InputError: one of them is there and may not be replaced; then none is copied.
    """
    import mlflow

    folder = Path(config.output).expanduser()
    listed = mlflow.MlflowClient().list_artifacts(run_id)
    names = [item.path for item in listed if item.path.endswith(suffixes)]
    refuse_existing([folder / name for name in names], config)
    for name in names:
        save(artifact_path(run_id, name), folder / name)
    return folder


def save(source: Path, file: Path) -> None:
    """Copy a file to where a person wants it, whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, file)
    except OSError as error:
        raise InputError(f"output={file}: cannot be written ({error.strerror})") from None
    finally:
        unfinished.unlink(missing_ok=True)
