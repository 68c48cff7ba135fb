"""Builds, saves and loads image classifiers; weights are only ever read and written as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attribution.errors import InputError, reason
from attribution.models.memory_layout import see_inputs
from attribution.models.pretrained import MINI_CONFIGS, load_pretrained, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(name: str, class_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """Build a model with one logit per class: mini models from scratch, others pretrained with a new head.

    Args:
        name: a key of MINI_CONFIGS, a from_pretrained folder, or a Hub id.
        class_names: in order of the labels.
        seed: of all weights that are drawn.

    Raises:
        InputError: the model cannot be loaded, or its tensors do not fit its config.
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
    model, info = load_pretrained(name, ignore_mismatched_sizes=True, **labels)
    _renew_head(model, len(class_names))
    # transformers draws tensors that are missing or have another shape; only heads may be drawn.
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == len(class_names):
            drawn -= {f"{path}.weight", f"{path}.bias"}
    unfit = sorted(key for key in drawn if not key.endswith("num_batches_tracked"))
    if unfit:
        raise InputError(f"model={name}: its tensors do not fit its config: {unfit[:3]}")
    return model


def _renew_head(model: PreTrainedModel, num_labels: int) -> None:
    """Redraw the last layer: its weights are for other classes even where the shape fits."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not heads or heads[-1].out_features != num_labels:
        raise InputError(
            f"model={model.config.model_type}: has no linear head with one logit per class; "
            "name a transformers image classifier that has one"
        )
    heads[-1].reset_parameters()


def check(name: str, class_names: tuple[str, ...], image_size: int) -> None:
    """Refuse a model that cannot be built, or does not take images of this size.

    Raises:
        InputError: as build and check_image_size do.
    """
    check_image_size(build(name, class_names, seed=0), image_size)


def check_image_size(model: nn.Module, image_size: int) -> None:
    """Refuse an image size that the model cannot take.

    Raises:
        InputError: a strided layer receives a map smaller than its stride, or the model has a
            fixed input size that differs.
    """

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stride = max(module.stride if isinstance(module.stride, tuple) else (module.stride,))
        if min(inputs[0].shape[-2:]) < stride:
            raise InputError(
                f"image_size={image_size}: too small for the model's strides; "
                "a deep layer would shrink a single pixel, so use larger images"
            )

    strided = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    try:
        see_inputs(model, strided, check, image_size)
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        own = getattr(model.config, "image_size", "unknown")
        raise InputError(
            f"image_size={image_size}: the model refuses it ({reason(error)}); its config's is {own}"
        ) from error


def save(
    model: PreTrainedModel,
    folder: Path,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Write a folder that transformers' from_pretrained loads, preprocessing included."""
    from transformers import ConvNextImageProcessor

    quiet_transformers()
    model.save_pretrained(folder)
    processor = ConvNextImageProcessor(
        size={"shortest_edge": image_size},
        crop_pct=1.0,
        image_mean=list(mean),
        image_std=list(std),
    )
    processor.save_pretrained(folder)


def load(folder: Path) -> nn.Module:
    """Load a model that `save` wrote, in eval mode.

    Raises:
        InputError: as load_pretrained does, or the tensors do not fit the config.
    """
    model, info = load_pretrained(str(folder), local_files_only=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise InputError(f"checkpoint={folder}: tensors do not fit its config: {wrong[:3]}")
    return model.eval()
