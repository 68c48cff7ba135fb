"""The bank that attribution is judged by: models retrained on random subsets, and their margins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data import ImageData
from attribution.retraining import Series, retrained_logits
from attribution.training import derive_seed, margins
from attribution.trak import TARGETS


@dataclass(frozen=True)
class Bank:
    """Actual margins of models that saw random subsets; never the checkpoints that are scored.

    Attributes:
        masks: (S, n_train) bool, which examples each subset holds.
        margins: (S, R, n_targets) float64, margin of each target under each of R retrainings.
    """

    masks: np.ndarray
    margins: np.ndarray


def build_bank(
    config: Config,
    data: ImageData,
    num_subsets: int,
    num_repeats: int,
    alpha: float,
    work: Path,
) -> Bank:
    """Train `num_repeats` models on each of `num_subsets` random subsets of share `alpha`.

    The first subsets and repeats of a larger bank are those of a smaller one, and what `work`
    holds is not trained again.
    """
    n = len(data.rows("train"))
    masks = np.zeros((num_subsets, n), dtype=bool)
    for s, mask in enumerate(masks):
        rng = np.random.default_rng(derive_seed(config.seed, "bank", s))
        mask[rng.permutation(n)[: round(alpha * n)]] = True
    wanted = [
        Series(
            f"subsets, repeat {r}",
            [derive_seed(config.seed, "bank", s, r) for s in range(num_subsets)],
            masks,
        )
        for r in range(num_repeats)
    ]
    labels = data.labels(TARGETS)
    logits = retrained_logits(config, data, wanted, TARGETS, work, "bank")
    repeats = [np.stack([margins(each, labels) for each in repeat]) for repeat in logits]
    return Bank(masks, np.stack(repeats, axis=1))
