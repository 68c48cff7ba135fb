"""attribution/data/transforms.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribution.data.transforms import augment_batch, draw_augmentation, to_batch


def test_to_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    pixels.flags.writeable = False
    batch = to_batch(pixels, mean, std)
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert batch.shape == (4, 3, 5, 6) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(batch.numpy(), expected, atol=1e-6)
    assert torch.equal(batch, to_batch(torch.tensor(pixels), mean, std))


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "flip,crop"])
@pytest.mark.parametrize(("size", "pad"), [(8, 1), (16, 2), (1, 1)])
def test_augment_batch_equals_one_image_at_a_time(augment, size, pad) -> None:
    batch = torch.rand(32, 3, size, size + 1).contiguous(memory_format=torch.channels_last)
    drawn = draw_augmentation(32, augment, pad, torch.Generator().manual_seed(1))
    result = augment_batch(batch, drawn, pad)
    assert result.is_contiguous(memory_format=torch.channels_last)
    mode = "reflect" if pad < size else "edge"
    flips, dy, dx = drawn.numpy()
    for i, image in enumerate(batch.numpy()):
        if flips[i]:
            image = image[:, :, ::-1]
        if "crop" in augment:
            padded = np.pad(image, [(0, 0), (pad, pad), (pad, pad)], mode=mode)
            image = padded[:, dy[i] : dy[i] + size, dx[i] : dx[i] + size + 1]
        assert (result[i].numpy() == image).all()
    assert flips.any() == ("flip" in augment) and set(flips) <= {0, 1}
    assert (dy.max() > dy.min()) == ("crop" in augment)
    assert min(dy.min(), dx.min()) >= 0 and max(dy.max(), dx.max()) <= 2 * pad


def test_augmentation_stays_paired_when_examples_are_removed() -> None:
    batch = torch.rand(20, 3, 8, 8)
    drawn = draw_augmentation(20, "flip,crop", 1, torch.Generator().manual_seed(3))
    kept = np.array([1, 4, 5, 17, 3])
    whole = augment_batch(batch, drawn, 1)
    assert torch.equal(augment_batch(batch[kept], drawn[:, kept], 1), whole[kept])
    again = draw_augmentation(20, "flip,crop", 1, torch.Generator().manual_seed(3))
    assert torch.equal(again, drawn)
