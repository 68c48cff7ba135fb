"""An ensemble that several test files score."""

from __future__ import annotations

import numpy as np
import pytest
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.models.checkpoints import Finetuned, train_checkpoints


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory, one_thread) -> tuple[ImageData, Finetuned]:
    """Two checkpoints on halves of the toy data."""
    folder = tmp_path_factory.mktemp("trained")
    data = toy_data(folder / "data")
    masks = np.array([np.arange(32) % 4 < 2, np.arange(32) % 4 >= 2])
    found = train_checkpoints(toy_config(num_models=2), data, masks, folder / "work")
    return data, Finetuned.of(masks, found)
