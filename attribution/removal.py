"""The arms: each is one way to choose which training examples to remove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from attribution.config import nearest
from attribution.errors import InputError


@dataclass(frozen=True)
class Evidence:
    """What an arm may look at; arrays are (n_train,), in order of position.

    Nothing here comes from the test split.
    """

    labels: np.ndarray
    alignment: np.ndarray  # positive = helpful
    loss: np.ndarray  # ensemble loss in nats, out of sample where the masks allow


Arm = Callable[[Evidence, int, np.random.Generator], np.ndarray]


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(values, kind="stable")[:count]


def none(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Nothing: the baseline."""
    return np.empty(0, dtype=np.int64)


def random(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """A fresh uniform draw for every seed, so that the draw's own variance counts."""
    return rng.choice(len(evidence.labels), count, replace=False)


def helpful(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Highest alignment: removing these should hurt."""
    return np.argsort(evidence.alignment, kind="stable")[::-1][:count]


def harmful(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lowest alignment: removing these should help."""
    return _lowest(evidence.alignment, count)


def negative(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Every example with negative alignment, however many: frac does not apply."""
    return np.flatnonzero(evidence.alignment < 0)


def loss(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Highest ensemble loss: the cheap baseline that attribution has to earn its place beside."""
    return _lowest(-evidence.loss, count)


ARMS: dict[str, Arm] = {f.__name__: f for f in (none, random, helpful, harmful, negative, loss)}
FRAC_FREE = ("none", "negative")  # their size does not depend on frac


@dataclass(frozen=True)
class Trial:
    """One (arm, frac) of the comparison, with what it removes under each seed."""

    arm: str
    frac: float  # as asked for; the share removed where the arm decides it
    removed: tuple[np.ndarray, ...]  # one array of training positions a seed, ascending

    @property
    def name(self) -> str:
        return self.arm if self.arm == "none" else f"{self.arm} {self.frac:.3g}"


def check_arms(arms: list[str]) -> None:
    """Refuse unknown names.

    Raises:
        InputError: with the nearest valid names.
    """
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"arms={arm}: unknown; {nearest(arm, list(ARMS), limit=20)}")


def plan_trials(
    arms: list[str], fracs: list[float], evidence: Evidence, seeds: list[int]
) -> list[Trial]:
    """Every (arm, frac) to retrain, each beside `none` and a `random` of its own size.

    `none` and `random` are added where they are not named: without them no difference could be
    told from chance. An arm whose size does not depend on frac appears once, at its own share.

    Raises:
        InputError: an unknown arm, or a removal that empties a class or removes nothing.
    """
    check_arms(arms)
    n = len(evidence.labels)
    shares = {round(frac * n): frac for frac in sorted(fracs)}  # how many, as it was asked for
    if min(shares) < 1:
        raise InputError(f"frac={min(fracs):g}: removes none of the {n} training examples")
    controls = dict(shares)
    trials = []
    for arm in dict.fromkeys(arms):
        if arm in ("none", "random"):
            continue
        for count in [0] if arm in FRAC_FREE else shares:
            trial = _trial(arm, count, shares.get(count), evidence, seeds)
            trials.append(trial)
            if len(trial.removed[0]):
                controls.setdefault(len(trial.removed[0]), trial.frac)
    random_trials = [
        _trial("random", count, controls[count], evidence, seeds) for count in sorted(controls)
    ]
    trials = [_trial("none", 0, None, evidence, seeds), *random_trials, *trials]
    for trial in trials:
        _check_classes(trial, evidence.labels)
    return trials


def _trial(arm: str, count: int, frac: float | None, evidence: Evidence, seeds: list[int]) -> Trial:
    removed = tuple(
        np.sort(ARMS[arm](evidence, count, np.random.default_rng([seed, count]))) for seed in seeds
    )
    share = len(removed[0]) / len(evidence.labels)
    return Trial(arm, share if frac is None else frac, removed)


def _check_classes(trial: Trial, labels: np.ndarray) -> None:
    before = np.bincount(labels)
    for removed in trial.removed:
        left = before - np.bincount(labels[removed], minlength=len(before))
        emptied = np.flatnonzero((left == 0) & (before > 0))
        if len(emptied):
            label = int(emptied[0])
            raise InputError(
                f"frac={trial.frac:.3g}: arm {trial.arm} would remove all {before[label]} training "
                f"examples of class {label}; use a smaller frac or leave out the arm"
            )


def removed_table(trial: Trial, train: pd.DataFrame, evidence: Evidence) -> pd.DataFrame:
    """One row a removed example with its evidence and `seeds`, how many seeds removed it.

    Args:
        train: the score artifact's table of training examples, in order of position.
    """
    positions, seeds = np.unique(np.concatenate(trial.removed), return_counts=True)
    table = train.iloc[positions].assign(alignment=evidence.alignment[positions], seeds=seeds)
    return table.reset_index(drop=True)


def removal_metrics(table: pd.DataFrame, n_flipped: int, n_seeds: int) -> dict[str, float]:
    """Removals per class (mean over seeds) and, where flips are known, precision and recall."""
    per_class = table.groupby("label_name")["seeds"].sum() / n_seeds
    metrics = {f"removed/{name}": float(count) for name, count in per_class.items()}
    if n_flipped and len(table):
        found = table.loc[table["is_flipped"], "seeds"].sum()
        metrics["flips_precision"] = float(found / table["seeds"].sum())
        metrics["flips_recall"] = float(found / (n_flipped * n_seeds))
    return metrics
