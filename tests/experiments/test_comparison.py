"""The comparison of arms: what is refused, kept, retrained, and its effect on each class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_trials import evidence_of
from scipy import stats
from toy import toy_config, toy_data

from attribution.config import resolve
from attribution.data.dataset import load_data
from attribution.errors import InputError
from attribution.experiments import comparison
from attribution.experiments.arms import Trial
from attribution.experiments.comparison import (
    CLASS_COLUMNS,
    check,
    class_effects,
    judged_groups,
    retrain,
)
from attribution.experiments.outcome import Outcome
from attribution.models.predict import predict
from attribution.models.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arm_name", "sizes"),
    [
        # Two shares round to as many examples.
        ("harmful", {"harmful_0.05.csv": 5, "harmful_0.049.csv": 5, "harmful_0.09.csv": 9}),
        ("negative", {"negative.csv": 7}),
    ],
)
def test_an_exported_arm_keeps_all_that_it_does_not_choose(arm_name, sizes) -> None:
    n = np.arange(100)
    names = {"example_id": [f"id{i}" for i in n], "label_name": "a", "file_name": ""}
    evidence = evidence_of(n % 2, alignment=n - 6.5, trust=n / 100, loss=-n, **names)
    config = toy_config(arms="harmful,negative", frac="0.05,0.049,0.09", export_arm=arm_name)
    found = comparison.exported(config, evidence)
    assert {name: table["example_id"].tolist() for name, table in found.items()} == {
        name: [f"id{i}" for i in range(size, 100)] for name, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": "harmfull"}, "arms=harmfull: unknown"),
        ({"arms": "oracle"}, "arms=oracle: no label was flipped on purpose"),
        ({"arms": "balanced", "groups": "auto"}, "arms=balanced: groups=auto"),
        ({"frac": "0.2,0.01"}, "frac=0.01: removes none of the 32 training examples"),
        ({"groups": "camera"}, "groups=camera: no such column"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: Path, given, message) -> None:
    data = toy_data(tmp_path)
    check(toy_config(), data)
    with pytest.raises(InputError, match=f"^{message}"):
        check(toy_config(**given), data)


def arm(name: str, *removed: list[int]) -> Trial:
    return Trial(name, len(removed[0]) / 24, tuple(np.array(r, dtype=np.int64) for r in removed))


@pytest.mark.parametrize("groups", ["label", "auto", "auto_uncentred", "group"])
def test_a_planted_patch_judges_arms_that_do_not_know_its_groups(tmp_path: Path, groups) -> None:
    given = {"dataset": "digits", "shortcut": "patch", "groups": groups}
    config = resolve(given | {"cache_dir": str(tmp_path)})
    data = load_data(config)
    found = judged_groups(config, data)
    assert pd.Series(data.table("test")["group"]).groupby(found).nunique().tolist() == [1] * 20
    plain = replace(config, shortcut="none")
    assert groups == "group" or judged_groups(plain, load_data(plain)) is None


def test_a_trial_trains_each_seed_on_what_it_does_not_remove(tmp_path, monkeypatch) -> None:
    data, seeds, wanted = toy_data(tmp_path, n_train=24, n_other=6), [5, 6], []
    monkeypatch.setattr(
        "attribution.experiments.comparison.retrained_logits",
        lambda *given: wanted.extend(given[2]),
    )
    retrain(toy_config(), data, [arm("none", [], []), arm("harmful", [0], [2])], seeds, tmp_path)
    assert [list(series.seeds) for series in wanted] == [seeds, seeds]
    left_out = [[np.flatnonzero(~row).tolist() for row in series.keep] for series in wanted]
    assert left_out == [[[], []], [[0], [2]]]


def test_a_relabelling_trial_keeps_every_example_and_changes_those_labels(tmp_path) -> None:
    data, seeds = toy_data(tmp_path / "data", n_train=24, n_other=6), [5, 6]
    config = toy_config(epochs=1, batch_size=65)
    new = (np.array([1, 1]), np.array([0, 0]))
    given = replace(arm("harmful", [0, 4], [1, 5]), new_labels=new)
    (found,) = retrain(config, data, [given], seeds, tmp_path / "work")
    for seed, positions, labels, logits in zip(seeds, given.removed, new, found, strict=True):
        changed = data.labels("train").copy()
        assert (changed[positions] != labels).all()
        changed[positions] = labels
        every = np.ones(24, dtype=bool)
        model = train(config, data, seed, every, validate=False, labels=changed).model
        np.testing.assert_array_equal(logits, predict(config, model, data, "test"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4))
def test_class_effects_are_those_of_explicit_loops(tmp_path_factory, seed, classes, seeds) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 7)])
    spec = [("none", 0), ("random", 2), ("random", 3), ("harmful", 2), ("negative", 3)]
    trials = [Trial(arm, size / 9, (np.arange(size),) * seeds) for arm, size in spec]
    logits = [rng.normal(size=(seeds, len(labels), classes)) for _ in spec]
    right = [
        [(each.argmax(2) == labels)[:, labels == c].mean(1) for c in range(classes)]
        for each in logits
    ]
    outcomes = [Outcome(trial, {}, found) for trial, found in zip(trials, right, strict=True)]
    names = [f"c{i}" for i in range(classes)]
    table = class_effects(outcomes, labels, names)
    assert list(table) == CLASS_COLUMNS and len(table) == 2 * classes
    rows = iter(table.to_dict("records"))
    for treated, control in ((3, 1), (4, 2)):
        for label in range(classes):
            d = []
            for s in range(seeds):
                own = [i for i in range(len(labels)) if labels[i] == label]
                hits = [
                    sum(logits[t][s, i].argmax() == label for i in own) for t in (treated, control)
                ]
                d.append((hits[0] - hits[1]) / len(own))
            row = next(rows)
            assert (row["arm"], row["label_name"]) == (spec[treated][0], f"c{label}")
            assert row["n_test"] == len(own) and row["frac"] == round(spec[treated][1] / 9, 6)
            assert row["accuracy_vs_random"] == pytest.approx(np.mean(d), abs=1e-12)
            half = stats.t.ppf(0.975, seeds - 1) * np.std(d, ddof=1) / np.sqrt(seeds)
            low, high = np.mean(d) - half, np.mean(d) + half
            assert row["accuracy_vs_random_ci_low"] == pytest.approx(low, abs=1e-9)
            assert row["accuracy_vs_random_ci_high"] == pytest.approx(high, abs=1e-9)
