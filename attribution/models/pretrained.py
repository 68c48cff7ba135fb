"""Reads models that somebody else may have written: from_pretrained folders and Hub models, as data only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attribution.errors import InputError, reason
from attribution.runtime.hashing import digest
from attribution.runtime.safe_files import read_json, regular, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Small enough to train from scratch in seconds on a CPU.
MINI_CONFIGS: dict[str, dict[str, Any]] = {
    "resnet-mini": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    },
}


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn every error in the block into an InputError: transformers raises many kinds for one mistake."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model={name}: cannot be loaded; it must be {', '.join(MINI_CONFIGS)}, a "
            f"from_pretrained folder with safetensors, or a Hub id that can be reached ({reason(error)})"
        ) from error


def load_pretrained(name: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from safetensors; also return what transformers reports about its tensors.

    Args:
        options: of transformers' from_pretrained.

    Raises:
        InputError: it cannot be loaded, needs a pickle or code of its own, or has a number that is
            not finite.
    """
    from transformers import AutoModelForImageClassification

    quiet_transformers()
    with refusing(name):
        _check_folder(name)
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"model={name}: its tensor {key} is not finite")
    return model, info


def quiet_transformers() -> None:
    """Silence transformers' progress bars, and its report on the replaced head, which is expected."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_folder(name: str) -> None:
    """Refuse a folder that transformers would hang on.

    Raises:
        Exception: of any kind.
    """
    folder = Path(name)
    if folder.is_dir():
        for file in folder.iterdir():
            if not file.is_dir():
                regular(file)
        if (folder / "config.json").exists():
            read_json(folder / "config.json")


@cache
def skeleton(name: str) -> nn.Module:
    """Return the model without weights, on PyTorch's meta device.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig

    with refusing(name):
        if name in MINI_CONFIGS:
            config = ResNetConfig(**MINI_CONFIGS[name])
        else:
            _check_folder(name)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(config)


def processor(name: str) -> Any:
    """Return the image processor of a model, or None where it has none that transformers knows.

    Raises:
        InputError: a folder has one that cannot be loaded.
    """
    from transformers import AutoImageProcessor

    try:
        with refusing(name):
            _check_folder(name)
            return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except InputError:
        if (Path(name) / "preprocessor_config.json").exists():
            raise
        return None


def fingerprint(name: str) -> str:
    """Return what a model name stands for: a hash of a folder's content, else the name itself.

    Raises:
        InputError: the folder does not hold a model.
    """
    if name in MINI_CONFIGS:
        return json.dumps(MINI_CONFIGS[name], sort_keys=True)
    if not Path(name).is_dir():
        return name
    with refusing(name):
        _check_folder(name)
    files = [p for p in sorted(Path(name).iterdir()) if p.suffix in (".json", ".safetensors")]
    return digest([[path.name, sha256(path)] for path in files])
