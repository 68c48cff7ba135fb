"""Turn pixels into normalised batches, and augment them.

Written in torch alone: importing torchvision's transforms takes seconds in every process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def to_batch(
    pixels: np.ndarray | Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Convert uint8 (B, H, W, 3) to a normalised float32 (B, 3, H, W), channels_last."""
    if not isinstance(pixels, Tensor):
        pixels = torch.from_numpy(np.require(pixels, requirements=("C", "W")))
    batch = pixels.to(device).permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
    mean, std = (torch.as_tensor(v, device=batch.device).view(3, 1, 1) for v in (mean, std))
    return batch.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def draw_augmentation(n: int, augment: str, pad: int, generator: torch.Generator) -> Tensor:
    """Draw one epoch's augmentation for all n training examples at once: int64 (3, n).

    The rows are: 1 if the example is mirrored, and the y and x in [0, 2 * pad] where its crop of
    the padded image starts. The caller picks the columns of the examples that are present, so that
    example i gets the same augmentation whichever other examples were removed.
    """
    flips = torch.rand(n, generator=generator) < 0.5
    starts = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    if "flip" not in augment:
        flips = torch.zeros_like(flips)
    if "crop" not in augment:
        starts = torch.full_like(starts, pad)  # the image itself
    return torch.cat([flips[None].long(), starts])


def augment_batch(batch: Tensor, drawn: Tensor, pad: int) -> Tensor:
    """Mirror and shift each image of (B, 3, H, W) as its column of `drawn` says; stays channels_last."""
    flips, dy, dx = drawn.to(batch.device)
    height, width = batch.shape[2:]
    batch = torch.where(flips.bool()[:, None, None, None], batch.flip(-1), batch)
    mode = "reflect" if pad < min(height, width) else "replicate"
    padded = F.pad(batch, [pad] * 4, mode).permute(0, 2, 3, 1)
    ys = dy[:, None] + torch.arange(height, device=batch.device)
    xs = dx[:, None] + torch.arange(width, device=batch.device)
    sample = torch.arange(len(batch), device=batch.device)[:, None, None]
    batch = padded[sample, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
    return batch.contiguous(memory_format=torch.channels_last)
