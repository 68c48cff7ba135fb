"""The list of images whose labels a person should check, in order, each with its reasons."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from attribution.data.dataset import ImageData
from attribution.models.ensemble import label_issues
from attribution.runtime.npy_blocks import row_slices

THUMBNAIL = 8  # pixels per side of the thumbnails that are compared
# Least correlation of near-duplicates. In Food-101's ten classes and in the digits no two images of
# different classes reach it, while 181 pairs of one class do.
NEAR = 0.97
# Images on the list for each label that is expected to be wrong.
MARGIN = 2
COLUMNS = [
    "example_id", "file_name", "split", "label", "suggested_label", "reasons", "trust", "loss",
    "label_quality", "near_duplicate_of", "position", "is_flipped",
]  # fmt: skip


def suspects(
    data: ImageData, examined: pd.DataFrame, probabilities: np.ndarray, by_loss: bool = False
) -> pd.DataFrame:
    """The images whose labels are worth a look, the most doubtful first.

    The order is the mean of the ranks by trust and by loss (docs/results.md). Confident
    learning estimates how many labels are wrong; the list holds twice as many images, as far as there
    is a reason to doubt them, and all near-duplicates with another label.

    Args:
        examined: one row per image, with the columns of ImageData.table, trust, loss, label_quality
            and predicted_label.
        probabilities: (n, C) of the same images, out of sample.
        by_loss: whether the order is that of the loss alone, as with cross-fitting.
    """
    labels, names = examined["label"].to_numpy(), np.array(data.class_names, object)
    issues = label_issues(labels, probabilities)
    twin = near_duplicates(thumbnails(data, examined), labels)
    reasons = {
        "contradicts other images": examined["trust"] < 0,
        "high loss": examined["loss"] > np.log(len(names)),  # worse than guessing
        "confident learning": issues,
        "near-duplicate with another label": twin >= 0,
    }
    texts = [
        ", ".join(text for text, holds in zip(reasons, row, strict=True) if holds)
        for row in zip(*reasons.values(), strict=True)
    ]
    ranks = rankdata(-examined["loss"]) + (0 if by_loss else rankdata(examined["trust"]))
    order = np.argsort(ranks, kind="stable")
    differs = (examined["predicted_label"] != labels).to_numpy()
    ids = examined["example_id"].to_numpy(object)
    table = examined.assign(
        label=examined["label_name"],
        suggested_label=np.where(differs, names[examined["predicted_label"]], ""),
        reasons=texts,
        near_duplicate_of=np.where(twin >= 0, ids[twin], ""),
    ).iloc[order]
    is_first = np.arange(len(table)) < MARGIN * issues.sum()
    listed = (table["reasons"] != "") & (is_first | (table["near_duplicate_of"] != ""))
    table = table[listed].reset_index(drop=True)
    return table[COLUMNS].rename_axis("rank").rename(index=lambda i: i + 1).reset_index()


def thumbnails(data: ImageData, examples: pd.DataFrame) -> np.ndarray:
    """Thumbnails of some examples as vectors with mean 0 and length 1, (n, d) float32.

    Args:
        examples: with the columns split and position.
    """
    from PIL import Image

    pixels, size = data.pixels(), (THUMBNAIL, THUMBNAIL)
    small = [
        np.asarray(Image.fromarray(np.array(pixels[row])).resize(size, Image.Resampling.BOX))
        for row in data.rows_of(examples)
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
