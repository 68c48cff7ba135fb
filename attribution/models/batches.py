"""Batches of images on their device: of training, in a seeded order and augmented; of a split, as it is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.transforms import augment_batch, draw_augmentation, to_batch
from attribution.models import classifier
from attribution.runtime.hashing import derive_seed
from attribution.runtime.npy_blocks import row_slices


class Batches:
    """Batches of the kept training examples; one call is one epoch.

    Order and augmentation are drawn for the whole training set and then restricted, so that
    leaving an example out changes nothing for the others.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        seed: int,
        device: torch.device,
        labels: np.ndarray | None = None,
    ) -> None:
        self.augment, self.device = config.augment, device
        self.pad = max(1, config.image_size // 8)
        # On the device, where a CUDA graph may use them.
        self.mean, self.std = (
            torch.tensor(v).to(device) for v in classifier.normalisation(config.model)
        )
        self.rows = data.rows("train")
        uploaded = _on_gpu(data, device) if device.type == "cuda" else None
        self.resident = uploaded is not None  # all images lie on the GPU
        self.pixels = data.pixels() if uploaded is None else uploaded
        labels = data.labels("train") if labels is None else labels
        self.labels = torch.from_numpy(labels).to(device)
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "order"))

    def __call__(self, kept: np.ndarray, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images (B, 3, H, W) and labels (B,) of each batch."""
        return map(self.load, self.draws(kept, steps))

    def draws(self, kept: np.ndarray, steps: int) -> Iterator[torch.Tensor]:
        """What makes each batch, (4, B) int64: examples, whether each is mirrored, its crop's y and x."""
        n = len(self.rows)
        order = torch.randperm(n, generator=self.generator).numpy()
        drawn = draw_augmentation(n, self.augment, self.pad, self.generator)
        columns = torch.cat([torch.arange(n)[None], drawn])
        columns = columns[:, torch.from_numpy(order[np.isin(order, kept, assume_unique=True)])]
        if self.resident:
            columns = columns.to(self.device)  # once: a copy for every step would wait for the last
        # Batches of nearly equal size: a last batch of one would break BatchNorm.
        return iter(columns.tensor_split(steps, dim=1))

    def load(self, draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) and labels (B,) of a draw."""
        return self.images(draw), self.labels[draw[0].to(self.device)]

    def images(self, draw: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), augmented, of a draw."""
        index, drawn = draw[0], draw[1:]
        chosen = self.pixels[index] if self.resident else self.pixels[self.rows[index.numpy()]]
        images = to_batch(chosen, self.mean, self.std, self.device)
        if self.augment == "none":
            return images
        return augment_batch(images, drawn, self.pad)


_uploaded: dict[tuple, torch.Tensor] = {}


def _on_gpu(data: ImageData, device: torch.device) -> torch.Tensor | None:
    """The training images on a GPU, uint8, one copy a process; None where they are too many for it."""
    pixels, rows = data.pixels(), data.rows("train")
    key = data.fingerprint, pixels.shape, device
    if key not in _uploaded:
        if pixels[:1].nbytes * len(rows) > torch.cuda.mem_get_info(device)[0] // 4:
            return None
        _uploaded.clear()
        images = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.uint8, device=device)
        for part in row_slices(len(rows), pixels[:1].nbytes // 4):
            images[part] = torch.from_numpy(pixels[rows[part]]).to(device)
        _uploaded[key] = images
    return _uploaded[key]


def batches_of(
    config: Config,
    data: ImageData,
    split: str,
    batch_size: int,
    device: torch.device,
    rows: range | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A split (or some rows of it) in order, never augmented: images (B, 3, H, W), labels (B,)."""
    mean, std = classifier.normalisation(config.model)
    pixels, positions = data.pixels(), data.rows(split)
    labels = torch.from_numpy(data.labels(split)).to(device)
    rows = range(len(positions)) if rows is None else rows
    for start in rows[::batch_size]:
        part = slice(start, min(start + batch_size, rows.stop))
        yield to_batch(pixels[positions[part]], mean, std, device), labels[part]
