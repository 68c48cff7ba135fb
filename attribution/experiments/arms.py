"""The arms: each is one way to choose which training examples to remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from attribution.config import nearest
from attribution.errors import InputError


@dataclass(frozen=True)
class Evidence:
    """What an arm may look at; arrays are (n_train,), in order of position.

    Nothing here comes from the test split. An arm that needs what is None is refused by name.
    """

    labels: np.ndarray
    alignment: np.ndarray  # positive = helpful
    trust: np.ndarray  # low = suspect: what tells wrong labels; the alignment, if of other groups
    loss: np.ndarray  # ensemble loss in nats, out of sample where the masks allow
    label_quality: np.ndarray | None = None  # cleanlab's, low = suspect
    self_influence: np.ndarray | None = None
    predicted: np.ndarray | None = None  # label that the ensemble predicts, out of sample likewise
    groups: np.ndarray | None = None  # of each example, where they are not found from scores
    is_flipped: np.ndarray | None = None  # where labels were flipped on purpose
    true_labels: np.ndarray | None = None


Arm = Callable[[Evidence, int, np.random.Generator], np.ndarray]


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(values, kind="stable")[:count]


def _rank(values: np.ndarray) -> np.ndarray:
    """Place of each value among all, 0 the lowest; equal ones in order."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def _given(values: np.ndarray | None) -> np.ndarray:
    """Evidence that an arm NEEDS: check_arms has refused the arm where it is None."""
    assert values is not None
    return values


def none(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Nothing: the baseline."""
    return np.empty(0, dtype=np.int64)


def random(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """A fresh uniform draw for every seed, so that the draw's own variance counts."""
    return rng.choice(len(evidence.labels), count, replace=False)


def random_matched(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random, with as many of each class as `harmful` takes: what its class balance alone does."""
    wanted = np.bincount(evidence.labels[harmful(evidence, count, rng)])
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(evidence.labels == label), number, replace=False)
            for label, number in enumerate(wanted)
        ]
    )


def helpful(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Highest alignment: removing these should hurt."""
    return np.argsort(evidence.alignment, kind="stable")[::-1][:count]


def harmful(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lowest trust: removing these should help. With groups, alignment: D3M (Jain et al. 2024)."""
    return _lowest(evidence.trust, count)


def negative(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Every example with negative alignment, however many: frac does not apply."""
    return np.flatnonzero(evidence.alignment < 0)


def loss(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Highest ensemble loss: the cheap baseline that attribution has to earn its place beside."""
    return _lowest(-evidence.loss, count)


def confident(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lowest label quality by confident learning (cleanlab; Northcutt et al. 2021)."""
    return _lowest(_given(evidence.label_quality), count)


def self_influence(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Highest influence on itself: memorised examples (Feldman and Zhang 2020 use it so)."""
    return _lowest(-_given(evidence.self_influence), count)


def harmful_loss(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Both of low trust and of high loss: the `count` that come first in both orders."""
    return _lowest(np.maximum(_rank(evidence.trust), _rank(-evidence.loss)), count)


def majority(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """At random from the largest group alone, of those of its label or column."""
    groups = _given(evidence.groups)
    largest = np.flatnonzero(groups == np.bincount(groups).argmax())
    return rng.choice(largest, min(count, len(largest)), replace=False)


def balanced(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """At random, one by one from the group that is then largest: balances the groups."""
    groups = _given(evidence.groups)
    shuffled = rng.permutation(len(groups))
    # An example goes when its group has shrunk to its place in it: the largest places go first.
    place = np.empty(len(shuffled), dtype=np.int64)
    for group in np.unique(groups):
        rows = shuffled[groups[shuffled] == group]
        place[rows] = np.arange(len(rows))
    return shuffled[np.argsort(-place[shuffled], kind="stable")][:count]


def oracle(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly the labels that were flipped on purpose: the ceiling. frac does not apply."""
    return np.flatnonzero(_given(evidence.is_flipped))


ARMS: dict[str, Arm] = {
    f.__name__: f
    for f in (
        none, random, random_matched, helpful, harmful, negative, loss, confident, self_influence,
        harmful_loss, majority, balanced, oracle,
    )
}  # fmt: skip
FRAC_FREE = ("none", "negative", "oracle")  # their size does not depend on frac
DRAWN = ("random", "random_matched", "majority", "balanced")  # another choice for every seed
NO_GROUPS = "groups", "groups=auto has none for training examples; use label or a column"
OLD_SCORES = "the scores do not say; make them anew"
NEEDS = {
    "confident": ("label_quality", OLD_SCORES),
    "self_influence": ("self_influence", OLD_SCORES),
    "majority": NO_GROUPS,
    "balanced": NO_GROUPS,
    "oracle": ("is_flipped", "no label was flipped on purpose; use label_noise above 0"),
}


@dataclass(frozen=True)
class Trial:
    """One (arm, frac, action) of the comparison, with what it removes under each seed.

    With the action 'relabel' the examples stay, under `new_labels`.
    """

    arm: str
    frac: float  # as asked for; the share removed where the arm decides it
    removed: tuple[np.ndarray, ...]  # one array of training positions a seed, ascending
    new_labels: tuple[np.ndarray, ...] | None = None  # of those positions

    @property
    def action(self) -> str:
        return "remove" if self.new_labels is None else "relabel"

    @property
    def name(self) -> str:
        return trial_name(self.arm, self.action, self.frac)


def trial_name(arm: str, action: str, frac: float | None = None) -> str:
    """What an arm is called in runs, tables and pictures; with its share where that is given."""
    share = "" if frac is None or arm == "none" else f" {frac:.3g}"
    return arm + share + " relabelled" * (action == "relabel")


def check_arms(arms: list[str], lacking: Sequence[str] = ()) -> None:
    """Refuse unknown names, and arms that need what is lacking.

    Args:
        lacking: fields of Evidence that will be None.

    Raises:
        InputError: with the nearest valid names, or with what the arm needs.
    """
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"arms={arm}: unknown; {nearest(arm, list(ARMS), limit=20)}")
        field, reason = NEEDS.get(arm, ("", ""))
        if field in lacking:
            raise InputError(f"arms={arm}: {reason}, or leave out the arm")


def check_fracs(fracs: Sequence[float], n: int) -> None:
    """Refuse a share that comes to none of n training examples.

    Raises:
        InputError: with the smallest that removes one.
    """
    if round(min(fracs) * n) < 1:
        raise InputError(
            f"frac={min(fracs):g}: removes none of the {n} training examples; use {1 / n:.2g} or more"
        )


def plan_trials(
    arms: list[str],
    fracs: list[float],
    evidence: Evidence,
    seeds: list[int],
    actions: Sequence[str] = ("remove",),
    class_names: Sequence[str] = (),
) -> list[Trial]:
    """Every (arm, frac, action) to retrain, each beside `none` and a `random` of its size and action.

    `none` and `random` are added where they are not named: without them no difference could be
    told from chance. An arm whose size does not depend on frac appears once, at its own share.

    Raises:
        InputError: an unknown arm, one that lacks its evidence, or a removal that empties a class
            or removes nothing.
    """
    check_arms(arms, [name for name, value in vars(evidence).items() if value is None])
    for arm in arms:
        labels = evidence.true_labels if arm == "oracle" else evidence.predicted
        if "relabel" in actions and arm != "none" and labels is None:
            raise InputError(f"arms={arm}: to relabel, {OLD_SCORES}, or use action=remove")
    n = len(evidence.labels)
    check_fracs(fracs, n)
    shares = {round(frac * n): frac for frac in sorted(fracs)}  # how many, as it was asked for
    controls = dict(shares)
    trials: list[Trial] = []
    for arm in dict.fromkeys(arms):
        if arm in ("none", "random"):
            continue
        for count in [0] if arm in FRAC_FREE else shares:
            trial = _trial(arm, count, shares.get(count), evidence, seeds)
            if any(t.arm == arm and t.frac == trial.frac for t in trials):
                continue  # it had no more to give at a smaller share already
            trials.append(trial)
            if len(trial.removed[0]):
                controls.setdefault(len(trial.removed[0]), trial.frac)
    chosen = [
        *(_trial("random", count, controls[count], evidence, seeds) for count in sorted(controls)),
        *trials,
    ]
    trials = [_trial("none", 0, None, evidence, seeds)]
    for action in actions:
        trials += chosen if action == "remove" else [_relabelled(t, evidence) for t in chosen]
    for trial in trials:
        _check_classes(trial, evidence.labels, class_names)
    return trials


def _trial(arm: str, count: int, frac: float | None, evidence: Evidence, seeds: list[int]) -> Trial:
    removed = tuple(
        np.sort(ARMS[arm](evidence, count, np.random.default_rng([seed, count]))) for seed in seeds
    )
    if frac is None or len(removed[0]) != count:  # the arm decides, or has no more to give
        frac = len(removed[0]) / len(evidence.labels)
    return Trial(arm, frac, removed)


def _relabelled(trial: Trial, evidence: Evidence) -> Trial:
    """The same choice with another action: to be seen with the label that the ensemble predicts.

    The oracle knows the true one.
    """
    labels = _given(evidence.true_labels if trial.arm == "oracle" else evidence.predicted)
    return replace(trial, new_labels=tuple(labels[removed] for removed in trial.removed))


def _check_classes(trial: Trial, labels: np.ndarray, class_names: Sequence[str]) -> None:
    before = np.bincount(labels)
    for s, removed in enumerate(trial.removed):
        left = before - np.bincount(labels[removed], minlength=len(before))
        if trial.new_labels is not None:
            left = left + np.bincount(trial.new_labels[s], minlength=len(before))[: len(before)]
        emptied = np.flatnonzero((left == 0) & (before > 0))
        if len(emptied):
            label = int(emptied[0])
            name = class_names[label] if class_names else label
            raise InputError(
                f"frac={trial.frac:.3g}: arm {trial.arm} would {trial.action} all {before[label]} "
                f"training examples of class {name}; use a smaller frac or leave out the arm"
            )


def removed_table(trial: Trial, train: pd.DataFrame, evidence: Evidence) -> pd.DataFrame:
    """One row a removed example with its evidence and `seeds`, how many seeds removed it.

    Args:
        train: the score artifact's table of training examples, in order of position.
    """
    positions, seeds = np.unique(np.concatenate(trial.removed), return_counts=True)
    own = {name: getattr(evidence, name)[positions] for name in ("alignment", "trust")}
    table = train.iloc[positions].assign(**own, seeds=seeds)
    return table.reset_index(drop=True)


def kept_table(trial: Trial, train: pd.DataFrame) -> pd.DataFrame:
    """The training examples that a trial keeps under its first seed, as parameter `keep` takes them."""
    kept = np.delete(np.arange(len(train)), trial.removed[0])
    return train.iloc[kept][["example_id", "label_name", "file_name"]]


def export_files(
    arm: str, arms: list[str], fracs: list[float], action: str
) -> dict[str, float | None]:
    """The names of the files that parameter `export_arm` asks for, each with its frac if it has one.

    Raises:
        InputError: not an arm of this comparison, or one that has no one choice to export.
    """
    if not arm:
        return {}
    if arm not in arms:
        raise InputError(f"export_arm={arm}: not among arms={','.join(arms)}")
    if arm in ("none", *DRAWN):
        raise InputError(f"export_arm={arm}: makes no one choice of its own; name another arm")
    if action == "relabel":
        raise InputError(f"export_arm={arm}: with action=relabel every example is kept; use remove")
    if arm in FRAC_FREE:
        return {f"{arm}.csv": None}
    return {f"{arm}_{frac:g}.csv": frac for frac in fracs}


def removal_metrics(table: pd.DataFrame, n_flipped: int, n_seeds: int) -> dict[str, float]:
    """Removals per class (mean over seeds) and, where flips are known, precision and recall."""
    per_class = table.groupby("label_name")["seeds"].sum() / n_seeds
    metrics = {f"removed/{name}": float(count) for name, count in per_class.items()}
    if n_flipped and len(table):
        found = table.loc[table["is_flipped"], "seeds"].sum()
        metrics["flips_precision"] = float(found / table["seeds"].sum())
        metrics["flips_recall"] = float(found / (n_flipped * n_seeds))
    return metrics
