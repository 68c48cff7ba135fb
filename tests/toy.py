"""A tiny image data set whose classes are seen from brightness, and settings that train on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config, resolve
from attribution.data.dataset import ImageData


def toy_data(folder: Path, n_train: int = 32, n_other: int = 16, size: int = 16) -> ImageData:
    """Class 0 is dark, class 1 is bright; splits lie one after the other."""
    n = n_train + 2 * n_other
    rng = np.random.default_rng(0)
    label = np.arange(n) % 2
    noise = rng.integers(0, 60, (n, size, size, 3))
    pixels = np.where(label[:, None, None, None] == 1, 160 + noise, 30 + noise).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", pixels)
    examples = pd.DataFrame(
        {
            "example_id": [f"id{i}" for i in range(n)],
            "file_name": "",
            "split": ["train"] * n_train + ["validation"] * n_other + ["test"] * n_other,
            "label": label,
            "label_name": np.where(label == 1, "bright", "dark"),
            "true_label": label,
            "is_flipped": False,
        }
    )
    return ImageData(folder / "pixels.npy", ("dark", "bright"), examples, f"toy-{n}-{size}", (), 0)


def toy_config(**given) -> Config:
    """Settings for toy_data: one process, one or two epochs, float32."""
    defaults = {
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.01,
        "precision": "float32",
        "augment": "none",
        "device": "cpu",
        "jobs": 1,
    }
    return resolve(defaults | given)
