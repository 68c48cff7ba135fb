"""Batches of images on a device: for training in a seeded order and augmented, for prediction as they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.transforms import augment_batch, draw_augmentation, to_batch
from attribution.models import model_facts
from attribution.runtime.hashing import derive_seed


class Batches:
    """Batches of the training examples that are kept.

    Order and augmentation are drawn for the whole training set and then restricted to the kept
    examples, so that leaving an example out changes nothing for the others.

    Attributes:
        labels: (n_train,) int64, on the device.
        is_resident: whether all images lie on a GPU (see cuda_graphs.ResidentBatches).
    """

    is_resident = False

    def __init__(
        self,
        config: Config,
        data: ImageData,
        seed: int,
        device: torch.device,
        labels: np.ndarray | None = None,
    ) -> None:
        mean, std = model_facts.normalisation(config.model)
        self._mean, self._std = torch.tensor(mean).to(device), torch.tensor(std).to(device)
        self._augment, self._pad = config.augment, max(1, config.image_size // 8)
        self._data, self._device, self._rows = data, device, data.rows("train")
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
        labels = data.labels("train") if labels is None else labels
        self.labels = torch.from_numpy(labels).to(device)

    def draws(self, kept: np.ndarray, steps: int) -> Iterator[Tensor]:
        """Draw the batches of one epoch.

        Each is (4, B) int64: positions in the training set, whether each image is mirrored, and the
        y and x of its crop. Sizes differ by one at most, since a last batch of one example would
        break BatchNorm.
        """
        return iter(self._epoch(kept).tensor_split(steps, dim=1))

    def _epoch(self, kept: np.ndarray) -> Tensor:
        """Draw an epoch, (4, n_kept)."""
        n = len(self._rows)
        order = torch.randperm(n, generator=self._generator).numpy()
        drawn = draw_augmentation(n, self._augment, self._pad, self._generator)
        columns = torch.cat([torch.arange(n)[None], drawn])
        return columns[:, torch.from_numpy(order[np.isin(order, kept, assume_unique=True)])]

    def load(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (B, 3, H, W) and labels (B,) of a draw."""
        return self.images(draw), self.labels[draw[0].to(self._device)]

    def images(self, draw: Tensor) -> Tensor:
        """Return the augmented images (B, 3, H, W) of a draw."""
        images = to_batch(self._pixels(draw[0]), self._mean, self._std, self._device)
        if self._augment == "none":
            return images
        return augment_batch(images, draw[1:], self._pad)

    def _pixels(self, index: Tensor) -> np.ndarray | Tensor:
        """Return the pixels of training examples, uint8 (B, H, W, 3)."""
        return self._data.pixels()[self._rows[index.numpy()]]


def batches_of(
    config: Config,
    data: ImageData,
    split: str,
    batch_size: int,
    device: torch.device,
    rows: range | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images (B, 3, H, W) and labels (B,) of a split in order, never augmented.

    Args:
        rows: some rows of the split; None takes all.
    """
    mean, std = model_facts.normalisation(config.model)
    pixels, positions = data.pixels(), data.rows(split)
    labels = torch.from_numpy(data.labels(split)).to(device)
    rows = range(len(positions)) if rows is None else rows
    for start in rows[::batch_size]:
        part = slice(start, min(start + batch_size, rows.stop))
        yield to_batch(pixels[positions[part]], mean, std, device), labels[part]
