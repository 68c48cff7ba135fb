"""The arms: each is one way to choose which training examples to remove.

An arm takes the first examples in the order of its ArmSpec (names.ARM_SPECS), unless it has a
function here, listed in _OWN. It returns `count` positions in the training set, the first choice
first, or its own number if frac does not apply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from attribution.config import Config
from attribution.errors import InputError
from attribution.experiments.names import ARM_SPECS, check_known
from attribution.runtime.hashing import derive_seed

# From the evidence (see gather_evidence), the number asked for, and what random arms draw with.
Arm = Callable[[pd.DataFrame, int, np.random.Generator], np.ndarray]

STAY = 2  # training examples of each class that no arm takes


def _lowest(values: pd.Series | np.ndarray, count: int) -> np.ndarray:
    return np.argsort(np.asarray(values), kind="stable")[:count]


def _in_order(arm: str) -> Arm:
    """The arm that takes the first examples in the order of its ArmSpec."""
    column, rises = ARM_SPECS[arm].order
    return lambda evidence, count, rng: _lowest(evidence[column] * (1 if rises else -1), count)


def none(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.empty(0, dtype=np.int64)


def random(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(len(evidence), count, replace=False)


def random_matched(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    labels = evidence["label"].to_numpy()
    per_class = np.bincount(labels[_lowest(evidence["trust"], count)])
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == label), number, replace=False)
            for label, number in enumerate(per_class)
        ]
    )


def helpful(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    """Of equal examples the last: harmful takes the first."""
    return np.argsort(evidence["alignment"].to_numpy(), kind="stable")[::-1][:count]


def negative(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    return _lowest(evidence["alignment"], int((evidence["alignment"] < 0).sum()))


def harmful_loss(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    ranks = [rankdata(values, "ordinal") for values in (evidence["trust"], -evidence["loss"])]
    return _lowest(np.maximum(*ranks), count)


def majority(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most all examples of the largest group."""
    groups = evidence["group_id"].to_numpy()
    largest = np.flatnonzero(groups == np.bincount(groups).argmax())
    return rng.choice(largest, min(count, len(largest)), replace=False)


def balanced(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    groups = evidence["group_id"].to_numpy()
    shuffled = rng.permutation(len(groups))
    # Number the members of each group. The highest numbers of all groups are removed first, so
    # that larger groups shrink until they are as small as the others.
    number = np.empty(len(shuffled), dtype=np.int64)
    for group in np.unique(groups):
        rows = shuffled[groups[shuffled] == group]
        number[rows] = np.arange(len(rows))
    return shuffled[np.argsort(-number[shuffled], kind="stable")][:count]


def oracle(evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.flatnonzero(evidence["is_flipped"])


_OWN = {  # the others only rank
    f.__name__: f
    for f in (none, random, random_matched, helpful, negative, harmful_loss, majority, balanced, oracle)
}  # fmt: skip
ARMS: dict[str, Arm] = {name: _OWN.get(name) or _in_order(name) for name in ARM_SPECS}


@dataclass(frozen=True)
class Trial:
    """One (arm, frac, action) of the comparison, with the examples that it removes or relabels.

    Attributes:
        frac: the share asked for; the share removed if the arm decides how many.
        removed: training positions in ascending order, one array per seed.
        new_labels: labels for those positions, if they are relabelled and not removed.
    """

    arm: str
    frac: float
    removed: tuple[np.ndarray, ...]
    new_labels: tuple[np.ndarray, ...] | None = None

    @property
    def size(self) -> int:
        """How many examples are removed or relabelled, the same under every seed."""
        return len(self.removed[0])

    @property
    def action(self) -> str:
        return "remove" if self.new_labels is None else "relabel"

    @property
    def name(self) -> str:
        return trial_name(self.arm, self.action, self.frac)


def trial_name(arm: str, action: str, frac: float | None = None) -> str:
    """Name of a trial in runs, tables and figures, such as 'harmful 0.05 relabelled'."""
    name = arm
    if frac is not None and arm != "none":
        name += f" {frac:.3g}"
    if action == "relabel":
        name += " relabelled"
    return name


def check_arms(arms: Sequence[str], missing: Sequence[str] = ()) -> None:
    """Refuse unknown arms, and arms whose evidence is missing.

    Args:
        missing: columns that the evidence will not have, or that say nothing.

    Raises:
        InputError: with the nearest valid names, or with what the arm needs.
    """
    check_known("arms", arms, ARMS)
    for arm in arms:
        column, reason = ARM_SPECS[arm].needs
        if column in missing:
            raise InputError(f"arms={arm}: {reason}, or leave out the arm")


def check_fracs(fracs: Sequence[float], labels: np.ndarray) -> None:
    """Refuse a share that rounds to no training example, or does not leave STAY of each class.

    Raises:
        InputError: with the smallest or the largest share that can be removed.
    """
    n_train, most = len(labels), int(_takeable(labels).sum())
    if round(max(fracs) * n_train) > most:
        raise InputError(
            f"frac={max(fracs):g}: no arm takes the last {STAY} training examples of a class, here "
            f"{n_train - most} of {n_train}; use at most {int(1000 * most / n_train) / 1000:g}"
        )
    if round(min(fracs) * n_train) < 1:
        raise InputError(
            f"frac={min(fracs):g}: removes none of the {n_train} training examples; "
            f"use {1 / n_train:.2g} or more"
        )


def actions_of(config: Config) -> tuple[str, ...]:
    """The actions that parameter `action` stands for."""
    return ("remove", "relabel") if config.action == "both" else (config.action,)


def count_trials(config: Config, n_train: int) -> int:
    """How many trials plan_trials makes at most, known before the scores are.

    Fewer if two arms remove equally many examples and share a random control.
    """
    specs = [ARM_SPECS[arm] for arm in set(config.arm_names) - {"none", "random"}]
    free = sum(spec.is_frac_free for spec in specs)
    shares = len({round(frac * n_train) for frac in config.fracs})
    # Every share has a random control. So has every arm with a size of its own, and the size at
    # which an arm has no more examples.
    chosen = shares * (1 + len(specs) - free) + 2 * free + sum(s.may_run_out for s in specs)
    return 1 + chosen * len(actions_of(config))


def plan_trials(config: Config, evidence: pd.DataFrame, seeds: Sequence[int]) -> list[Trial]:
    """List every (arm, frac, action) to retrain, with `none` and a `random` of each size and action.

    `none` and `random` are added if they are not named: every other arm is compared with them. An
    arm whose size does not depend on frac appears once, under the share that it removes.

    Args:
        config: with arms and shares that check_arms and check_fracs do not refuse.
    """
    # By number of examples.
    frac_of = {round(frac * len(evidence)): frac for frac in sorted(config.fracs)}
    chosen = _chosen(config.arm_names, frac_of, evidence, seeds)
    sizes = {trial.size: trial.frac for trial in chosen if trial.size} | frac_of
    controls = [make_trial("random", size, sizes[size], evidence, seeds) for size in sorted(sizes)]
    planned = [make_trial("none", 0, None, evidence, seeds)]
    for action in actions_of(config):
        for trial in controls + chosen:
            planned.append(trial if action == "remove" else _relabelled(trial, evidence))
    return planned


def _chosen(
    arms: Sequence[str], frac_of: dict[int, float], evidence: pd.DataFrame, seeds: Sequence[int]
) -> list[Trial]:
    """One trial for each size of every arm that is no control; an arm may run out of examples."""
    found: dict[tuple[str, int], Trial] = {}
    for arm in arms:
        if arm not in ("none", "random"):
            for count in [0] if ARM_SPECS[arm].is_frac_free else frac_of:
                trial = make_trial(arm, count, frac_of.get(count), evidence, seeds)
                found.setdefault((arm, trial.size), trial)
    return list(found.values())


def make_trial(
    arm: str, count: int, frac: float | None, evidence: pd.DataFrame, seeds: Sequence[int]
) -> Trial:
    """Let an arm choose `count` examples, the share `frac`; 0 and None where it decides how many."""
    # The arm's name is part of the seed, so that no two arms draw from one stream.
    generators = [np.random.default_rng(derive_seed(seed, arm, count)) for seed in seeds]
    removed = tuple(np.sort(_sparing(arm, evidence, count, rng)) for rng in generators)
    size = len(removed[0])
    if frac is None or size != count:  # the arm decides, or has fewer examples than asked for
        frac = size / len(evidence)
    return Trial(arm, frac, removed)


def _sparing(arm: str, evidence: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    """What an arm chooses; where STAY examples of a class are left, its next choices of other classes."""
    labels, wanted = evidence["label"].to_numpy(), count
    most = _takeable(labels)
    while True:
        found = ARMS[arm](evidence, wanted, rng)
        own = labels[found]
        number = rankdata(own, "ordinal") - rankdata(own, "min")  # within its class, from 0
        spared = found[number < most[own]]
        if ARM_SPECS[arm].is_frac_free:
            return spared
        missing = count - len(spared)
        if missing <= 0 or len(found) < wanted:
            return spared[:count]
        wanted += missing


def _takeable(labels: np.ndarray) -> np.ndarray:
    """How many training examples of each class an arm may take."""
    return np.maximum(np.bincount(labels) - STAY, 0)


def _relabelled(trial: Trial, evidence: pd.DataFrame) -> Trial:
    """The same trial with predicted labels in place of removal; the oracle takes the true ones."""
    column = "true_label" if trial.arm == "oracle" else "predicted_label"
    labels = evidence[column].to_numpy()
    return replace(trial, new_labels=tuple(labels[removed] for removed in trial.removed))


def removed_table(trial: Trial, evidence: pd.DataFrame) -> pd.DataFrame:
    """One row per removed example with its evidence and `seeds`, how many seeds removed it."""
    positions, seeds = np.unique(np.concatenate(trial.removed), return_counts=True)
    return evidence.iloc[positions].assign(seeds=seeds).reset_index(drop=True)


def kept_table(trial: Trial, evidence: pd.DataFrame) -> pd.DataFrame:
    """The training examples that a trial keeps under its first seed, as parameter `keep` reads them."""
    kept = np.delete(np.arange(len(evidence)), trial.removed[0])
    return evidence.iloc[kept][["example_id", "label_name", "file_name"]]


def export_files(config: Config) -> dict[str, float | None]:
    """Names of the files that parameter `export_arm` writes, each with its frac if that applies.

    Raises:
        InputError: the arm is not part of this comparison, or does not choose the same examples
            under every seed.
    """
    arm = config.export_arm
    if not arm:
        return {}
    if arm not in config.arm_names:
        raise InputError(f"export_arm={arm}: not among arms={','.join(config.arm_names)}")
    if arm == "none":
        raise InputError("export_arm=none: keeps every example; name another arm")
    if ARM_SPECS[arm].is_drawn:
        raise InputError(
            f"export_arm={arm}: draws other examples for every seed, so there is no one list; "
            "name another arm"
        )
    if config.action == "relabel":
        raise InputError(f"export_arm={arm}: action=relabel keeps every example; use remove")
    if ARM_SPECS[arm].is_frac_free:
        return {f"{arm}.csv": None}
    return {f"{arm}_{frac:g}.csv": frac for frac in config.fracs}


def removal_metrics(trial: Trial, evidence: pd.DataFrame) -> dict[str, float]:
    """Removals per class (mean over seeds) and, where flips are known, precision and recall."""
    removed, n_seeds = removed_table(trial, evidence), len(trial.removed)
    n_flipped = int(evidence["is_flipped"].sum())
    per_class = removed.groupby("label_name")["seeds"].sum() / n_seeds
    metrics = {f"removed/{name}": float(count) for name, count in per_class.items()}
    if n_flipped and len(removed):
        found = removed.loc[removed["is_flipped"], "seeds"].sum()
        metrics["flips_precision"] = float(found / removed["seeds"].sum())
        metrics["flips_recall"] = float(found / (n_flipped * n_seeds))
    return metrics
