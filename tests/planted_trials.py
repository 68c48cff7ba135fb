"""Trials whose test results are planted: so many right answers under each seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from attribution.experiments.arms import Trial
from attribution.experiments.outcome import Outcome

N_TEST, N_SEEDS = 200, 6


LABELS = np.arange(N_TEST) % 4


def trial(arm: str, size: int, n: int = 100) -> Trial:
    return Trial(arm, size / n, tuple(np.arange(size) + s for s in range(N_SEEDS)))


def logits_with(correct: list[int]) -> np.ndarray:
    """(n_seeds, n_test, 4) logits that get exactly so many test examples right under each seed."""
    logits = np.zeros((len(correct), N_TEST, 4), np.float32)
    for row, count in zip(logits, correct):
        shown = np.where(np.arange(N_TEST) < count, LABELS, (LABELS + 1) % 4)
        row[np.arange(N_TEST), shown] = 3
    return logits


CORRECT = {
    ("none", 0): [160, 150, 170, 158, 163, 149],
    ("random", 5): [158, 149, 168, 157, 160, 148],
    ("random", 9): [150, 143, 160, 149, 155, 140],
    ("harmful", 5): [170, 162, 181, 168, 173, 160],  # 12 more than random 5, about
    ("helpful", 5): [140, 133, 150, 139, 144, 129],
    ("loss", 5): [159, 148, 169, 156, 161, 147],  # one up, one down
    ("negative", 9): [165, 159, 173, 164, 171, 155],  # about 15 more than random 9
}


def accuracy(key: tuple[str, int]) -> np.ndarray:
    return np.array(CORRECT[key]) / N_TEST


def controls(outcome: Outcome) -> set[str]:
    """What an outcome is compared with."""
    return {name for name in ("none", "random") if f"accuracy_vs_{name}" in outcome.summary}


GROUPS = np.where(np.arange(N_TEST) < 150, 0, 7)  # those after 150 are first to be wrong


def relabelled(arm: str, size: int) -> Trial:
    return replace(trial(arm, size), new_labels=(np.zeros(size, int),) * N_SEEDS)


BOTH = {
    ("none", 0, "remove"): CORRECT["none", 0],
    ("random", 5, "remove"): CORRECT["random", 5],
    ("harmful", 5, "remove"): CORRECT["harmful", 5],
    ("random", 5, "relabel"): CORRECT["random", 9],
    ("harmful", 5, "relabel"): CORRECT["negative", 9],
}


def evidence_of(
    labels: np.ndarray, alignment: np.ndarray, trust: np.ndarray, loss: np.ndarray, **more
) -> pd.DataFrame:
    """Evidence in which all that is not given says nothing."""
    silent = dict.fromkeys(("stored_trust", "label_quality", "self_influence"), 0.0)
    given = {"label": labels, "alignment": alignment, "trust": trust, "loss": loss, **more}
    own = {"predicted_label": labels, "true_label": labels, "is_flipped": False}
    return pd.DataFrame(silent | own | given)
