"""Reads models that somebody else may have written: from_pretrained folders and Hub models, as data only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
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

PRETRAINED = "microsoft/resnet-18"  # taken for images where it can be had within seconds
HUB_SECONDS = 5.0


def is_cached(name: str, *files: str) -> bool:
    """Whether the Hub's cache on this machine has whole files of a model: config and weights by default."""
    from huggingface_hub import try_to_load_from_cache

    wanted = files or ("config.json", "model.safetensors")
    return all(isinstance(try_to_load_from_cache(name, file), str) for file in wanted)


def why_unreachable(name: str) -> str:
    """Return why the Hub does not offer a model's weights within HUB_SECONDS; empty where it does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    answers = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "model.safetensors"), timeout=HUB_SECONDS)
            answers.append("")
        except Exception as error:  # of many kinds: offline mode, no network, a broken proxy
            answers.append(reason(error))

    asking = Thread(target=ask, daemon=True)  # looking up an address has no timeout of its own
    asking.start()
    asking.join(HUB_SECONDS)
    return [*answers, f"no answer within {HUB_SECONDS:g} s"][0]


def _careful(name: str, *files: str) -> dict[str, bool]:
    """Options of from_pretrained: run none of the model's code, ask the Hub only about what is not here."""
    is_here = Path(name).exists() or is_cached(name, *files)
    return {"trust_remote_code": False, "local_files_only": is_here}


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn every error in the block into an InputError: transformers raises many kinds for one mistake."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if "TimmWrapper" in str(error) and not find_spec("timm"):
            raise InputError(f"model={name}: is of timm; type pip install timm") from None
        raise InputError(
            f"model={name}: cannot be loaded; it must be {', '.join(MINI_CONFIGS)}, a "
            f"from_pretrained folder with safetensors, or a Hub id that can be reached ({reason(error)})"
        ) from error


def load_pretrained(name: str, **labels: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from safetensors; also return what transformers reports about its tensors.

    Args:
        labels: settings of the config to replace, where the model gets other classes.

    Raises:
        InputError: it cannot be loaded, needs a pickle or code of its own, or has a number that is
            not finite.
    """
    from transformers import AutoModelForImageClassification

    quiet_transformers()
    with refusing(name):
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            config=_config(name, **labels),
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),  # the head is of other classes
            **_careful(name),
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


def _config(name: str, **labels: Any) -> Any:
    """Return the config of a model, after a look at what else its folder holds."""
    from transformers import AutoConfig

    _check_folder(name)
    _refuse_adapter(name)
    config = AutoConfig.from_pretrained(name, **_careful(name), **labels)
    if config.model_type == "timm_wrapper":  # transformers gives timm the number of classes itself
        (config.model_args or {}).pop("num_classes", None)
    return config


def _refuse_adapter(name: str) -> None:
    """Refuse the weights of an adapter such as LoRA, which transformers ignores where peft is missing.

    Raises:
        InputError: the folder or Hub repository holds an adapter.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name, local_files_only=_careful(name)["local_files_only"]):
        raise InputError(
            f"model={name}: holds an adapter (adapter_config.json), not a whole model; merge it with "
            "its base model: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
            ".save_pretrained(FOLDER), then type --model FOLDER"
        )


@cache
def skeleton(name: str, classes: int = 0) -> nn.Module:
    """Return the model without weights, on PyTorch's meta device.

    Args:
        classes: for which it is built; 0 for as many as it has.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoModelForImageClassification, ResNetConfig

    with refusing(name):
        config = ResNetConfig(**MINI_CONFIGS[name]) if name in MINI_CONFIGS else _config(name)
        config.num_labels = classes or config.num_labels or 2  # timm's may have no head
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(config)


@cache
def heads(name: str) -> tuple[str, ...]:
    """Return the paths of a model's linear heads: the layers with one output for each class.

    They are the layers that grow with the number of classes; some models have two.

    Raises:
        InputError: the model cannot be loaded.
    """
    outputs = [
        {path: m.out_features for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        for model in (skeleton(name, 2), skeleton(name, 3))
    ]
    return tuple(path for path, count in outputs[0].items() if (count, outputs[1][path]) == (2, 3))


@cache
def trained_paths(name: str, layers: str) -> tuple[str, ...]:
    """Return the paths of the modules that `train_layers` names, in the order in which they run.

    Raises:
        InputError: the model starts from random weights or its last stage cannot be told, and
            `layers` is not all.
    """
    if layers == "all":
        return ("",)
    if name in MINI_CONFIGS:
        raise InputError(
            f"train_layers={layers}: model={name} has no trained layers to keep; use train_layers=all"
        )
    if layers == "head":
        return heads(name)
    model = skeleton(name)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    sizes = {path: sum(p.numel() for p in m.parameters()) for path, m in lists.items()}
    stages = max(sizes, key=sizes.__getitem__, default="")
    if not stages or 2 * sizes[stages] < sum(p.numel() for p in model.parameters()):
        raise InputError(
            f"train_layers=last: model={name} has no list of stages that tells which one is the last; "
            "use train_layers=head or all"
        )
    return f"{stages}.{len(lists[stages]) - 1}", *heads(name)


def preprocessing(name: str) -> dict[str, Any]:
    """Return what a model's image processor says, under transformers' names; empty without one.

    Raises:
        InputError: a folder has one that cannot be loaded.
    """
    own = _processor(name)
    if timm := getattr(own, "data_config", None):
        side = {"height": timm["input_size"][1]}
        return {"image_mean": timm["mean"], "image_std": timm["std"], "size": side}
    return {
        key: getattr(own, key, None) for key in ("image_mean", "image_std", "crop_size", "size")
    }


def _processor(name: str) -> Any:
    """Return the image processor of a model, or None where it has none that transformers knows."""
    from transformers import AutoImageProcessor
    from transformers.utils.generic import is_timm_local_checkpoint

    quiet_transformers()
    try:
        with refusing(name):
            _check_folder(name)
            options = _careful(name, "preprocessor_config.json")
            return AutoImageProcessor.from_pretrained(name, **options)
    except InputError:
        if (Path(name) / "preprocessor_config.json").exists() or is_timm_local_checkpoint(name):
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
