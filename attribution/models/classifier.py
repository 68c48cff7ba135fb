"""Builds, saves and loads image classifiers; weights are only ever read and written as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attribution.errors import InputError, reason
from attribution.models.memory_layout import see_inputs
from attribution.models.pretrained import (
    MINI_CONFIGS,
    heads,
    load_pretrained,
    quiet_transformers,
    trained_paths,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(name: str, class_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """Build a model with one logit per class: mini models from scratch, others pretrained with new heads.

    Args:
        name: a key of MINI_CONFIGS, a from_pretrained folder, or a Hub id.
        class_names: in order of the labels.
        seed: of all weights that are drawn.

    Raises:
        InputError: the model cannot be loaded, has no linear head, or its tensors do not fit its
            config.
    """
    own_heads = () if name in MINI_CONFIGS else heads(name)
    torch.manual_seed(seed)
    labels: dict[str, Any] = {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {label: i for i, label in enumerate(class_names)},
    }
    if name in MINI_CONFIGS:
        from transformers import ResNetConfig, ResNetForImageClassification

        return ResNetForImageClassification(ResNetConfig(**MINI_CONFIGS[name], **labels))
    if not own_heads:
        raise InputError(
            f"model={name}: has no linear head with one logit per class; "
            "name a transformers image classifier that has one"
        )
    model, info = load_pretrained(name, **labels)
    # transformers draws tensors that are missing or have another shape; only heads may be drawn.
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    for path in own_heads:  # even where the shape fits, their weights are for other classes
        cast(nn.Linear, model.get_submodule(path)).reset_parameters()
        drawn -= {f"{path}.weight", f"{path}.bias"}
    unfit = sorted(key for key in drawn if not key.endswith("num_batches_tracked"))
    if unfit:
        raise InputError(f"model={name}: its tensors do not fit its config: {unfit[:3]}")
    return model


def freeze(model: nn.Module, name: str, layers: str) -> list[nn.Module]:
    """Let only the parameters that `train_layers` names require gradients.

    Args:
        name: of the model that this one was built from.

    Returns:
        The modules that are trained. All others must run in eval mode, so that batch norms keep
        their statistics.

    Raises:
        InputError: as trained_paths does.
    """
    trained = [model.get_submodule(path) for path in trained_paths(name, layers)]
    if layers != "all":  # some models have parameters that are never trained
        model.requires_grad_(False)
        for module in trained:
            module.requires_grad_()
    return trained


def check(name: str, class_names: tuple[str, ...], image_size: int) -> None:
    """Refuse a model that cannot be built, or does not take images of this size.

    Raises:
        InputError: as build and check_image_size do.
    """
    check_image_size(build(name, class_names, seed=0), image_size)


def check_image_size(model: nn.Module, image_size: int) -> None:
    """Try the model on an image of this size, and refuse a model or size that cannot be trained.

    Raises:
        InputError: a strided layer receives a map smaller than its stride, the model has a fixed
            input size that differs, or its output has no logits.
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
        output = see_inputs(model, strided, check, image_size)
    except InputError:
        raise
    except Exception as error:  # of any kind: timm's are AssertionErrors
        own = getattr(model.config, "image_size", "unknown")
        raise InputError(
            f"image_size={image_size}: the model refuses it ({reason(error)}); its config's is {own}"
        ) from error
    if getattr(output, "logits", None) is None:
        raise InputError(
            f"model={getattr(model.config, 'name_or_path', '')}: a {type(model).__name__} returns no "
            "logits; name a transformers image classifier that does"
        )


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
    if model.config.model_type == "timm_wrapper":  # keeps names and preprocessing in its config
        _describe_timm(model.config, image_size, mean, std)
    model.save_pretrained(folder)
    processor = ConvNextImageProcessor(
        size={"shortest_edge": image_size},
        crop_pct=1.0,
        image_mean=list(mean),
        image_std=list(std),
    )
    processor.save_pretrained(folder)


def _describe_timm(
    config: Any, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Write class names and preprocessing where timm and its image processor look for them."""
    config.label_names = [config.id2label[i] for i in range(config.num_labels)]
    config.pretrained_cfg = getattr(config, "pretrained_cfg", {}) | {
        "input_size": [3, image_size, image_size],
        "mean": list(mean),
        "std": list(std),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }


def load(folder: Path) -> nn.Module:
    """Load a model that `save` wrote, in eval mode.

    Raises:
        InputError: as load_pretrained does, or the tensors do not fit the config.
    """
    model, info = load_pretrained(str(folder))
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise InputError(f"checkpoint={folder}: tensors do not fit its config: {wrong[:3]}")
    return model.eval()
