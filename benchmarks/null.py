"""Intervals and tests on scores without meaning, where the true difference is known to be zero."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from attribution.experiments.statistics import bootstrap_interval, holm, mean_estimate

ARMS = 4  # arms ranked by permuted scores in each experiment
FRAC = 0.1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--experiments", type=int, default=1000, help="comparisons to simulate")
    parser.add_argument("--num_seeds", type=int, default=10, help="seeds per comparison")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count how often 95 % intervals contain zero, and how often a family of arms finds an effect.

    The learner is linear (least squares from the digits' pixels to one-hot labels, a tenth flipped),
    so a comparison of 4 arms over 10 seeds takes half a second. Each seed draws its own training set
    of 300 out of 1,200. Each arm ranks by freshly permuted scores, so its expected difference from
    random removal is zero. The rest is the code of `ablation`: paired differences, Student's t,
    bootstrap, Holm.
    """
    learner, rng = _Learner(), np.random.default_rng(0)
    covered, bootstrapped, found = [], [], []
    for _ in range(options.experiments):
        differences = np.array([learner.differences(rng) for _ in range(options.num_seeds)]).T
        estimates = [mean_estimate(row) for row in differences]
        covered += [e.ci_low <= 0 <= e.ci_high for e in estimates]
        intervals = [bootstrap_interval(row, draws=999) for row in differences]
        bootstrapped += [low <= 0 <= high for low, high in intervals]
        found.append(min(holm([e.p for e in estimates])) < 0.05)
    rows = []
    for name, hits in (
        ("Student's t intervals that contain zero", covered),
        ("bootstrap (BCa) intervals that contain zero", bootstrapped),
        ("families with a false finding after Holm", found),
    ):
        low, high = binomtest(int(sum(hits)), len(hits)).proportion_ci(method="wilson")
        row = {"figure": name, "n": len(hits), "share": float(np.mean(hits))}
        rows.append(row | {"ci_low": low, "ci_high": high})
    return rows


class _Learner:
    """Test accuracy of a linear model after removals from a training set drawn per seed."""

    def __init__(self) -> None:

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        images = np.c_[images[order] / 16, np.ones(len(labels))]
        self.labels = labels[order]
        self.train, self.test = images[:1200], images[1200:]

    def differences(self, rng: np.random.Generator) -> list[float]:
        """Accuracy of each arm minus that of random removal, on one training set."""
        rows = rng.permutation(len(self.train))[:300]
        labels = self.labels[rows].copy()
        flipped = rng.choice(300, 30, replace=False)
        labels[flipped] = (labels[flipped] + rng.integers(1, 10, 30)) % 10
        self.own = self.train[rows], np.eye(10)[labels]
        count, scores = round(FRAC * 300), np.arange(300.0)
        baseline = self._accuracy(rng.choice(300, count, replace=False))
        arms = [np.argsort(rng.permutation(scores))[:count] for _ in range(ARMS)]
        return [self._accuracy(removed) - baseline for removed in arms]

    def _accuracy(self, removed: np.ndarray) -> float:
        x, y = (np.delete(part, removed, axis=0) for part in self.own)
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        return float(((self.test @ weights).argmax(1) == self.labels[1200:]).mean())
