"""Where to compute and how precisely: what `device` and a precision stand for here."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

import torch

from attribution.config import Config
from attribution.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for; auto is the GPU where there is one.

    Raises:
        InputError: an unknown name, or a CUDA device where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device={name}: must be auto, cpu, or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise InputError(f"device={name}: this machine has no such CUDA device; use device=cpu")
    return device


def resolve_precision(name: str, device: torch.device, parameter: str = "precision") -> torch.dtype:
    """What a precision stands for on a device; auto is bfloat16 where the hardware computes in it.

    Raises:
        InputError: bfloat16 by name where it would be emulated, slower than float32 and no better.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    if name == "bfloat16" and not fast:
        raise InputError(
            f"{parameter}=bfloat16: this {device.type} has no bfloat16 arithmetic; use auto or float32"
        )
    return torch.bfloat16 if fast and name != "float32" else torch.float32


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """bfloat16 where `precision` says so; a context that changes nothing otherwise."""
    dtype = resolve_precision(config.precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
