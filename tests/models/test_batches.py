"""Batches: which images come, in which order, and that those of two seeds are paired."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.models.batches import Batches, batches_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ALL = np.ones(32, dtype=bool)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("toy"))


def epoch_of(
    data: ImageData, keep: np.ndarray, augment: str = "flip,crop", epochs: int = 2
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each kept example looks like in each epoch, and in which order they come."""
    config = toy_config(augment=augment)
    batches = Batches(config, data, 9, CPU)
    rows = []
    for _ in range(epochs):
        images, labels = zip(*map(batches.load, batches.draws(np.flatnonzero(keep), 4)))
        rows.append((torch.cat(images), torch.cat(labels)))
    return rows


def keys(images: torch.Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


@settings(max_examples=20, deadline=None)
@given(removed=st.sets(st.integers(0, 31), min_size=1, max_size=20))
def test_removing_examples_leaves_order_and_augmentation_of_the_others(data, removed) -> None:
    keep = np.array([i not in removed for i in range(32)])
    for (every, labels), (some, some_labels) in zip(epoch_of(data, ALL), epoch_of(data, keep)):
        expected = [(k, int(y)) for k, y in zip(keys(every), labels)]
        found = [(k, int(y)) for k, y in zip(keys(some), some_labels)]
        rest = iter(expected)
        assert all(item in rest for item in found)  # a subsequence, pixels and labels alike
        assert len(found) == keep.sum()


def test_an_epoch_holds_every_kept_example_once(data) -> None:
    keep = np.arange(32) % 3 > 0
    ((images, labels),) = epoch_of(data, keep, augment="none", epochs=1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = data.pixels()[data.rows("train")][keep] / 255
    expected = (pixels - mean) / std
    found = images.permute(0, 2, 3, 1).double().numpy()
    order = np.lexsort(found.reshape(len(found), -1).T)
    reference = np.lexsort(expected.reshape(len(expected), -1).T)
    np.testing.assert_allclose(found[order], expected[reference], atol=1e-5)
    np.testing.assert_array_equal(labels.numpy()[order], data.labels("train")[keep][reference])


def test_every_epoch_has_another_order(data) -> None:
    (first, _), (second, _) = epoch_of(data, ALL, augment="none")
    assert keys(first) != keys(second) and sorted(keys(first)) == sorted(keys(second))


def test_every_epoch_has_another_augmentation(data) -> None:
    (first, _), (second, _) = epoch_of(data, ALL, augment="crop")
    assert sorted(keys(first)) != sorted(keys(second))


def test_plain_batches_hold_the_split_in_order(data) -> None:
    images, labels = zip(*batches_of(toy_config(), data, "validation", 5, CPU))
    np.testing.assert_array_equal(torch.cat(labels).numpy(), data.labels("validation"))
    pixels = data.pixels()[data.rows("validation")] / 255
    expected = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(torch.cat(images).permute(0, 2, 3, 1), expected, atol=1e-5)
