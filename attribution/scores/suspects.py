"""The list of training examples that a person should check, in order, each with its reasons."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from attribution.data.dataset import ImageData
from attribution.runtime.npy_blocks import row_slices

THUMBNAIL = 8  # pixels per side of the thumbnails that are compared
# Least correlation of near-duplicates. In Food-101's ten classes and in the digits no two images of
# different classes reach it, while 181 pairs of one class do.
NEAR = 0.97
COLUMNS = [
    "example_id", "file_name", "label", "suggested_label", "reasons", "alignment", "loss",
    "label_quality", "near_duplicate_of", "position", "is_flipped",
]  # fmt: skip


def suspects(data: ImageData, train: pd.DataFrame, issues: np.ndarray) -> pd.DataFrame:
    """Training examples with at least one reason to doubt them, the most doubtful first.

    They are sorted by the mean of their ranks by alignment, ensemble loss and label quality. On every
    data set with planted flips this mean was close to the best of the three (docs/results.md).

    Args:
        train: the score artifact's table of training examples, in order of position.
        issues: (n_train,) bool, label errors found by confident learning.
    """
    twin = near_duplicates(thumbnails(data), train["label"].to_numpy())
    names = np.array(data.class_names, object)
    reasons = {
        "harms validation": train["alignment"] < 0,
        "high loss": train["loss"] > np.log(len(names)),  # worse than guessing
        "confident learning": issues,
        "near-duplicate with another label": twin >= 0,
    }
    texts = [
        ", ".join(text for text, holds in zip(reasons, row, strict=True) if holds)
        for row in zip(*reasons.values(), strict=True)
    ]
    kinds = train["alignment"], -train["loss"], train["label_quality"]
    order = np.argsort(sum(rankdata(values) for values in kinds), kind="stable")
    differs = (train["predicted_label"] != train["label"]).to_numpy()
    ids = train["example_id"].to_numpy(object)
    table = train.assign(
        label=train["label_name"],
        suggested_label=np.where(differs, names[train["predicted_label"]], ""),
        reasons=texts,
        near_duplicate_of=np.where(twin >= 0, ids[twin], ""),
    ).iloc[order]
    table = table[table["reasons"] != ""].reset_index(drop=True)
    return table[COLUMNS].rename_axis("rank").rename(index=lambda i: i + 1).reset_index()


def thumbnails(data: ImageData) -> np.ndarray:
    """Thumbnails of the training images as vectors with mean 0 and length 1, (n_train, d) float32."""
    from PIL import Image

    pixels, size = data.pixels(), (THUMBNAIL, THUMBNAIL)
    small = [
        np.asarray(Image.fromarray(np.array(pixels[row])).resize(size, Image.Resampling.BOX))
        for row in data.rows("train")
    ]
    vectors = np.stack(small).reshape(len(small), -1).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def near_duplicates(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Position of each example's nearest neighbour with another label, (n,); -1 if none is near.

    Args:
        vectors: (n, d) vectors of length 1.
        labels: (n,) labels.
    """
    nearest = np.full(len(vectors), -1)
    for rows in row_slices(len(vectors), len(vectors)):
        likeness = vectors[rows] @ vectors.T
        likeness[labels[rows, None] == labels] = -1
        best = likeness.argmax(1)
        is_near = likeness[np.arange(len(best)), best] > NEAR
        nearest[rows] = np.where(is_near, best, -1)
    return nearest
