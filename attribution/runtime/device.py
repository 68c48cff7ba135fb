"""Device, precision and memory policy of the computation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

from attribution.config import Config, check_device
from attribution.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def resolve_device(name: str) -> torch.device:
    """The device with this name; auto is the GPU if there is one.

    Raises:
        InputError: the name is unknown, or there is no such CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise InputError(f"device={name}: this machine has no such CUDA device; use device=cpu")
    return device


def resolve_precision(name: str, device: torch.device, parameter: str = "precision") -> torch.dtype:
    """The dtype of a precision; auto is bfloat16 if the hardware computes in it, else float32.

    Raises:
        InputError: bfloat16 was asked for but would be emulated, which is slow.
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
    """A context that computes in bfloat16 if `precision` resolves to it."""
    dtype = resolve_precision(config.precision, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for reuse; returns whether it could be set.

    A training step on a CPU frees and allocates hundreds of MiB. Memory from the system is zeroed
    page by page, which takes a tenth of the step's time. Nothing changes with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
