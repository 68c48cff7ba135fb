"""Builds, saves and loads image classifiers as from_pretrained folders; weights only ever as safetensors."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from attribution.errors import InputError, reason
from attribution.runtime.safe_files import read_json, regular

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
# From so many channels, and up to so many positions, a convolution is slow when channels come last.
WIDE, TINY = 128, 16
MOST_MODULES = 10_000  # of a model, parts of parts included; EfficientNet-B7 has 1,099
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name: str, class_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """A model with one logit a class: mini models from scratch, others pretrained with a new head.

    Args:
        name: a key of MINI_CONFIGS, a from_pretrained folder, or a Hub id.
        class_names: in order of the labels.
        seed: of every weight that is drawn.

    Raises:
        InputError: nothing loadable under that name, or it needs remote code or a pickle.
    """
    torch.manual_seed(seed)
    labels: dict[str, Any] = {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {label: i for i, label in enumerate(class_names)},
    }
    if name in MINI_CONFIGS:
        from transformers import ResNetConfig, ResNetForImageClassification

        return ResNetForImageClassification(ResNetConfig(**MINI_CONFIGS[name], **labels))
    model, info = _from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    _renew_head(model, len(class_names))
    # What is missing, or of another shape, was drawn at random, as heads alone may be.
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == len(class_names):
            drawn -= {f"{path}.weight", f"{path}.bias"}
    unfit = sorted(key for key in drawn if not key.endswith("num_batches_tracked"))
    if unfit:
        raise InputError(f"model={name}: its tensors do not fit its config: {unfit[:3]}")
    return model


def _from_pretrained(name: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, finite throughout, and what transformers says of its tensors."""
    from transformers import AutoModelForImageClassification

    _quiet_transformers()
    try:
        _check_folder(name, weights=True)
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds for the same mistake
        raise _unloadable(name, error) from error
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"model={name}: its tensor {key} is not finite")
    return model, info


def _check_folder(name: str, weights: bool = False) -> None:
    """Refuse a model folder that transformers would hang on, or take any amount of memory for.

    Args:
        weights: also where the config describes more numbers than the safetensors have bytes.
    """
    folder = Path(name)
    if name in MINI_CONFIGS or not folder.is_dir():
        return
    files = {file.name: regular(file) for file in folder.iterdir() if not file.is_dir()}
    size = sum(f.stat().st_size for f in files.values() if f.suffix == ".safetensors")
    config = read_json(files["config.json"]) if "config.json" in files else {}
    described = config.get("num_labels", 0)
    if weights and described <= size:
        described = sum(p.numel() for p in _skeleton.__wrapped__(name).parameters())
    if 0 < size < described:
        raise ValueError(f"config.json describes {described:,} numbers, in {size:,} bytes")


def _unloadable(name: str, error: Exception) -> InputError:
    return InputError(
        f"model={name}: cannot be loaded; it must be {', '.join(MINI_CONFIGS)}, a "
        f"from_pretrained folder with safetensors, or a Hub id that can be reached ({reason(error)})"
    )


def _quiet_transformers() -> None:
    """Its report on the replaced head and its progress bars are no news here."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _renew_head(model: PreTrainedModel, num_labels: int) -> None:
    """Redraw the last layer: its old weights mean other classes even where the shape fits."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not heads or heads[-1].out_features != num_labels:
        raise InputError(
            f"model={model.config.model_type}: has no linear head with a logit a class; "
            "name a transformers image classifier that has one"
        )
    heads[-1].reset_parameters()


@cache
def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel that the model was pretrained with; ImageNet's unless told.

    Raises:
        InputError: the model's preprocessor cannot be read, or divides by nothing.
    """
    processor = None if name in MINI_CONFIGS else _processor(name)
    mean, std = (getattr(processor, f"image_{k}", None) for k in ("mean", "std"))
    if mean is None or std is None:
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        if len(mean) == len(std) == 3 and np.isfinite([*mean, *std]).all() and min(std) > 0:
            return mean, std
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"model={name}: its preprocessor's image_mean {mean} and image_std {std} must be three finite "
        "numbers each, the latter above 0"
    )


def own_image_size(name: str) -> int:
    """The side in pixels that a pretrained model's preprocessor or config asks for; 224 unless told.

    Raises:
        InputError: the model or its preprocessor cannot be read.
    """
    processor = _processor(name)
    sizes = [getattr(processor, "crop_size", None), getattr(processor, "size", None)]
    sides = [(dict(s).get("height") or dict(s).get("shortest_edge")) for s in sizes if s]
    return next(filter(None, [*sides, getattr(_skeleton(name).config, "image_size", None)]), 224)


def _processor(name: str) -> Any:
    """The preprocessor of a model; None where it has none that transformers knows."""
    from transformers import AutoImageProcessor

    try:
        _check_folder(name)
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds, for none and for a broken one
        if (Path(name) / "preprocessor_config.json").exists():
            raise _unloadable(name, error) from error
        return None


def warm_up() -> None:
    """Import what building a model needs, which takes seconds."""
    from transformers import AutoModelForImageClassification, ResNetForImageClassification  # noqa: F401


@cache
def forward_flops(name: str, image_size: int) -> int | None:
    """Floating-point operations of one image's forward pass; None where the model refuses the size.

    On PyTorch's meta device: only shapes are computed, on every machine the same.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = _skeleton(name)
    try:
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            check_image_size(model, image_size)
    except InputError:
        return None
    return counter.get_total_flops()


def parameter_count(name: str, classes: int) -> int:
    """Numbers that a checkpoint holds, buffers included; its own head is replaced by one for `classes`."""
    model = _skeleton(name)
    total = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not heads:
        return total
    return total + (classes - heads[-1].out_features) * (heads[-1].in_features + 1)


@cache
def _skeleton(name: str) -> nn.Module:
    """The model without weights, on the meta device.

    Raises:
        InputError: nothing loadable under that name.
    """
    from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig

    try:
        _check_folder(name)
        if name in MINI_CONFIGS:
            config = ResNetConfig(**MINI_CONFIGS[name])
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"), _bounded_depth():
            return AutoModelForImageClassification.from_config(config)
    except Exception as error:  # as in _from_pretrained
        raise _unloadable(name, error) from error


@contextmanager
def _bounded_depth() -> Iterator[None]:
    """Refuse, while it is built, a model of so many layers that building it would take hours."""
    count = itertools.count(1)

    def registered(*_: object) -> None:
        if next(count) > MOST_MODULES:
            raise ValueError(f"config.json describes more than {MOST_MODULES:,} layers")

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def check(name: str, class_names: tuple[str, ...], image_size: int) -> None:
    """Refuse a model that cannot be built, or does not take images of this size.

    Raises:
        InputError: as build and check_image_size do.
    """
    check_image_size(build(name, class_names, seed=0), image_size)


def check_image_size(model: nn.Module, image_size: int) -> None:
    """Refuse images that the network's strides shrink to nothing.

    Raises:
        InputError: a strided layer receives a map smaller than its stride, or the model has a
            fixed input size that differs.
    """

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        stride = max(module.stride if isinstance(module.stride, tuple) else (module.stride,))
        if min(inputs[0].shape[-2:]) < stride:
            raise InputError(
                f"image_size={image_size}: too small for the model's strides; "
                "a deep layer would shrink a single pixel, so use larger images"
            )

    strided = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    try:
        _see_inputs(model, strided, check, image_size)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        own = getattr(model.config, "image_size", "not told")
        raise InputError(
            f"image_size={image_size}: the model refuses it ({reason(error)}); its config's is {own}"
        ) from error


def _see_inputs(
    model: nn.Module, modules: Iterable[nn.Module], see: Callable[..., None], image_size: int
) -> None:
    """Run the model on one black image, with see(module, inputs) before each of these modules."""
    hooks = [module.register_forward_pre_hook(see) for module in modules]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def save(
    model: PreTrainedModel,
    folder: Path,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Write a folder that from_pretrained loads without this project, preprocessing included."""
    from transformers import ConvNextImageProcessor

    _quiet_transformers()
    model.save_pretrained(folder)
    processor = ConvNextImageProcessor(
        size={"shortest_edge": image_size},
        crop_pct=1.0,
        image_mean=list(mean),
        image_std=list(std),
    )
    processor.save_pretrained(folder)


def place(model: nn.Module, device: torch.device | str, image_size: int) -> None:
    """Move a model to a device, channels last, as convolutions are fastest on a CPU.

    But for wide convolutions of tiny maps: channels first, oneDNN takes a third of the time for them
    in float32, and no more in bfloat16.
    """
    # torch takes both at once and says so in its documentation, not in its overloads.
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if torch.device(device).type != "cpu":
        return
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    wide = [
        conv
        for conv in convolutions
        if conv.in_channels >= WIDE and conv.groups == 1 and max(conv.kernel_size) > 1
    ]
    tiny = set()

    def see(conv: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[-2:].numel() <= TINY:
            tiny.add(conv)

    if wide:
        _see_inputs(model, wide, see, image_size)
    for conv in tiny:
        conv.weight.data = conv.weight.data.contiguous()
        conv.register_forward_pre_hook(_channels_first)


def _channels_first(conv: nn.Conv2d, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return inputs[0].contiguous()


def load(folder: Path) -> nn.Module:
    """The model of a folder written by save, in eval mode.

    Raises:
        InputError: missing, not safetensors, or with tensors that do not fit its config or are not
            finite.
    """
    model, info = _from_pretrained(str(folder), local_files_only=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise InputError(f"checkpoint={folder}: tensors do not fit its config: {wrong[:3]}")
    return model.eval()


def fingerprint(name: str) -> str:
    """What a model name stands for: the content of a folder, else the name itself.

    Raises:
        InputError: a folder that is no model's.
    """
    if name in MINI_CONFIGS:
        return json.dumps(MINI_CONFIGS[name], sort_keys=True)
    if not Path(name).is_dir():
        return name
    try:
        _check_folder(name)
    except Exception as error:  # json and the system raise many kinds
        raise _unloadable(name, error) from error
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(name).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
