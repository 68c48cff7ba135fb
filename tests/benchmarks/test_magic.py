"""Exact replay: the run is training's own, and its derivatives are finite differences of whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.gradients.per_sample import margins
from attribution.models.batches import batches_of
from attribution.models.predict import predict
from attribution.models.train import train
from benchmarks.magic import Replay

N = 32
KEEP = np.arange(N) % 4 != 3
CONFIG = toy_config(preset="digits", epochs=2, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("magic") / "data", n_train=N, n_other=8)


def targets(data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    return next(batches_of(CONFIG, data, "validation", 8, torch.device("cpu")))


def test_a_replay_trains_the_model_that_training_does(data) -> None:
    logits = torch.from_numpy(
        predict(CONFIG, train(CONFIG, data, 0, KEEP).model, data, "validation")
    )
    images, labels = targets(data)
    found = Replay(CONFIG, data, 0, KEEP).margins(images, labels)
    torch.testing.assert_close(found.detach(), margins(logits, labels), rtol=1e-3, atol=1e-3)


def test_derivatives_are_finite_differences_of_whole_runs(data) -> None:
    images, labels = targets(data)
    wanted = torch.stack([torch.eye(8)[0], torch.full((8,), 1 / 8)])
    replay = Replay(CONFIG, data, 0, KEEP, dtype=torch.float64)
    found = replay.derivatives(images, labels, wanted)
    assert not found[~KEEP].any()  # what no batch held changes nothing

    def ends(i: int, h: float) -> np.ndarray:
        weights = np.ones(N) + h * (np.arange(N) == i)
        run = Replay(CONFIG, data, 0, KEEP, weights, torch.float64)
        return (wanted.double() @ run.margins(images, labels)).detach().numpy()

    h = 1e-6
    for i in (0, 5, 22):
        np.testing.assert_allclose(
            found[i], (ends(i, h) - ends(i, -h)) / (2 * h), rtol=1e-5, atol=1e-9
        )
