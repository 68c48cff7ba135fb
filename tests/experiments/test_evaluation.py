"""Is the attribution right: judged by planted truth, and run as a user would."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from places import unreadable_artifacts
from scipy import stats
from toy import toy_config, toy_data

from attribution.errors import InputError
from attribution.experiments import evaluation
from attribution.experiments.evaluation import brittleness, count_retrainings, judge
from attribution.experiments.methods import Attribution
from attribution.experiments.subset_bank import Bank, build_bank
from attribution.models.predict import predict
from attribution.models.train import train_stacked
from attribution.reporting import terminal
from attribution.runtime.hashing import derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "DRAWS", 100)


def planted(
    n: int = 60, subsets: int = 40, targets: int = 12, noise: float = 0.0, repeats: int = 2
):
    """Scores, and a bank whose margins they really generate."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, targets))
    masks = rng.random((subsets, n)) < 0.5
    truth = (masks @ values)[:, None]
    return values, Bank(masks, truth + noise * rng.normal(size=(subsets, repeats, targets)))


def row(table: pd.DataFrame, method: str) -> pd.Series:
    return table.set_index("method").loc[method]


def test_the_scores_that_made_the_margins_are_perfect_and_calibrated() -> None:
    values, bank = planted()
    flipped = np.arange(60) < 6
    table = judge(
        {"true": Attribution.of(values), "wrong": Attribution.of(-2 * values)}, bank, flipped
    )
    true, wrong = row(table, "true"), row(table, "wrong")
    assert true["lds"] == pytest.approx(1) and true["lds_share_of_ceiling"] == pytest.approx(1)
    assert true["calibration_slope"] == pytest.approx(1)
    assert wrong["lds"] == pytest.approx(-1)
    assert wrong["calibration_slope"] == pytest.approx(-0.5)
    assert wrong["auroc"] == pytest.approx(1 - true["auroc"])


def test_noise_has_no_lds_and_intervals_hold_it() -> None:
    values, bank = planted(noise=3.0)
    rng = np.random.default_rng(5)
    table = judge(
        {"true": Attribution.of(values), "random": Attribution.of(rng.normal(size=values.shape))},
        bank,
        np.arange(60) < 6,
    )
    noise, true = row(table, "random"), row(table, "true")
    assert noise["lds_ci_low"] < 0 < noise["lds_ci_high"] < true["lds_ci_low"]
    assert true["lds_ci_low"] < true["lds"] < true["lds_ci_high"] < 1
    # Perfect knowledge reaches the ceiling, which repeats alone have told.
    assert true["lds_share_of_ceiling"] == pytest.approx(1, abs=0.1)


def test_a_ranking_without_scores_has_detection_alone() -> None:
    values, bank = planted()
    flipped = np.arange(60) < 6
    suspects = Attribution(trust=np.where(flipped, -1.0, 1.0))
    table = judge({"scores": Attribution.of(values), "ranking": suspects}, bank, flipped)
    found = row(table, "ranking")
    assert np.isnan(found["lds"]) and np.isnan(found["calibration_slope"])
    assert found["auroc"] == found["average_precision"] == found["recall_10pct"] == 1
    without = judge({"scores": Attribution.of(values)}, bank, np.zeros(60, dtype=bool))
    assert "auroc" not in without


def test_rankings_alone_can_be_judged() -> None:
    _, bank = planted()
    table = judge({"loss": Attribution(trust=np.arange(60.0))}, bank, np.arange(60) < 6)
    assert row(table, "loss")["auroc"] == 1 and np.isnan(row(table, "loss")["lds"])


def test_scores_without_a_ranking_have_no_detection() -> None:
    values, bank = planted()
    scores = Attribution(values)
    table = judge({"scores": scores, "both": Attribution.of(values)}, bank, np.arange(60) < 6)
    assert np.isnan(row(table, "scores")["auroc"]) and row(table, "both")["auroc"] <= 1
    assert row(table, "scores")["lds"] == row(table, "both")["lds"]


def test_one_repeat_has_no_ceiling() -> None:
    values, bank = planted(repeats=1)
    table = judge({"true": Attribution.of(values)}, bank, np.arange(60) < 6)
    assert table[["noise_ceiling", "lds_share_of_ceiling"]].isna().all(axis=None)


def test_brittleness_retrains_without_what_supports_a_target(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", n_train=24, n_other=10)
    config = toy_config(brittleness_targets=4, brittleness_k=5, epochs=3)
    rng = np.random.default_rng(0)
    support = rng.normal(size=(24, 10))
    table = brittleness(config, data, {"mine": support}, tmp_path / "work").set_index("removed")
    assert list(table.index) == ["mine", "random"] and (table["targets"] == 4).all()

    seed, labels = derive_seed(0, "brittleness"), data.labels("validation")
    everything = np.ones(24, dtype=bool)
    (whole,) = train_stacked(config, data, [seed], [everything])
    correct = np.flatnonzero(predict(config, whole, data, "validation").argmax(1) == labels)
    targets = np.random.default_rng(seed).permutation(correct)[:4]
    keeps = [everything.copy() for _ in targets]
    for keep, t in zip(keeps, targets, strict=True):
        keep[np.argsort(support[:, t])[-5:]] = False
    trained = train_stacked(config, data, [seed] * 4, keeps)
    after = [predict(config, m, data, "validation")[t] for m, t in zip(trained, targets)]
    flips = np.mean([a.argmax() != labels[t] for a, t in zip(after, targets)])
    assert table.loc["mine", "flipped"] == flips
    assert table.loc["mine", "flipped_ci_low"] <= flips <= table.loc["mine", "flipped_ci_high"]


def test_brittleness_needs_two_targets_that_are_right(tmp_path: Path, monkeypatch) -> None:
    data = toy_data(tmp_path / "data", n_train=24, n_other=10)
    config = toy_config(brittleness_targets=4, brittleness_k=5, epochs=1)
    labels = data.labels("validation")
    wrong = np.eye(len(data.class_names), dtype=np.float32)[(labels + 1) % len(data.class_names)]
    monkeypatch.setattr(
        "attribution.experiments.evaluation.retrained_logits", lambda *_: [wrong[None]]
    )
    with pytest.raises(InputError, match="classifies 0 targets correctly"):
        brittleness(config, data, {}, tmp_path / "work")


def test_retrainings_are_counted_for_the_bank_and_for_brittleness(tmp_path, monkeypatch) -> None:
    config = toy_config(num_subsets=10, num_repeats=3, brittleness_targets=4, brittleness_k=5)
    trained: list[int] = []

    def count(config, data, wanted, *given):
        trained.append(sum(map(len, wanted)))
        right = 5 * np.eye(2, dtype=np.float32)[data.labels("validation")]
        return [np.stack([right] * len(each)) for each in wanted]

    for module in ("evaluation", "subset_bank"):
        monkeypatch.setattr(f"attribution.experiments.{module}.retrained_logits", count)
    data, supports = toy_data(tmp_path), np.zeros((32, 16))
    build_bank(config, data, 10, 3, 0.5, tmp_path)
    brittleness(config, data, {"trak": supports, "nearest": supports}, tmp_path)
    assert count_retrainings(config) == (trained[0], sum(trained[1:])) == (30, 13)
    without = replace(config, bank="somewhere", brittleness_targets=0)
    assert count_retrainings(without) == (0, 0)


# The command


SMALL = {"num_subsets": 10, "num_repeats": 2, "brittleness_targets": 3, "brittleness_k": 2}
ALL = "trak,trak_unweighted,trak_weighted,gradient_dot,gradient_cosine,penultimate,loss,random"


@pytest.mark.slow
def test_evaluate_judges_reuses_and_takes_a_bank(new_place) -> None:
    place = new_place("evaluate")
    with unreadable_artifacts():  # what was just computed is handed on
        first = place.done("evaluate", **SMALL, methods=ALL)
    assert place.unfinished() == {f for f in place.unfinished() if f.startswith("retrainings")}
    assert first.made() == {"finetune", "trak", "evaluate"}
    assert "10 examples" not in first.out and "noise ceiling" in first.out
    with place.active():
        from mlflow import MlflowClient
        from mlflow.artifacts import download_artifacts

        table = pd.read_csv(download_artifacts(f"runs:/{first.run_id}/evaluation.csv"))
        names = {a.path for a in MlflowClient().list_artifacts(first.run_id)}
        trak_id = first.tags["trak_run_id"]
        scores = np.load(download_artifacts(f"runs:/{trak_id}/scores/scores.npy"))
        masks = np.load(download_artifacts(f"runs:/{first.run_id}/bank/masks.npy"))
        margins = np.load(download_artifacts(f"runs:/{first.run_id}/bank/margins.npy"))
    assert {"bank", "evaluation.png", "evaluation.json", "brittleness.csv"} <= names
    assert list(table["method"]) == ALL.split(",")
    expected = [
        stats.spearmanr(masks @ scores[:, j], margins.mean(axis=1)[:, j]).statistic
        for j in range(scores.shape[1])
    ]
    figures = table.set_index("method")
    assert figures.loc["trak", "lds"] == pytest.approx(np.nanmean(expected), abs=1e-6)
    # The artifact's scores carry the factor 1 - p, and one of the variants is the same.
    assert figures.loc["trak_weighted", "lds"] == pytest.approx(figures.loc["trak", "lds"])
    nested = [r for r in first.runs if r.data.tags.get("stage") == "evaluate_method"]
    assert {r.data.params["method"] for r in nested} == set(ALL.split(","))

    again = place.done("evaluate", **SMALL, methods=ALL)
    assert not again.made()
    given = place.done("evaluate", bank=f"runs:/{first.run_id}/bank", methods="trak", lambda_reg=5)
    assert given.made() == {"trak", "evaluate"} and "to train" not in given.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "trax"}, "methods=trax: unknown; did you mean trak"),
        ({"methods": ""}, "methods: names none"),
        ({"alpha": 1.0}, "alpha=1.0: must be below 1"),
        ({"alpha": 0.03}, "alpha=0.03: a subset needs 2 of the 32 training examples"),
        ({"num_subsets": 3}, "num_subsets=3: must be at least 10"),
        ({"brittleness_targets": 1}, "brittleness_targets=1: an interval needs at least 2"),
        (
            {"brittleness_targets": 2, "brittleness_k": 32},
            "brittleness_k=32: must be below the 32 training examples",
        ),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: Path, given, message) -> None:
    data = toy_data(tmp_path)
    evaluation.check(toy_config(), data)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        evaluation.check(toy_config(**given), data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "trax"}, "methods=trax: unknown"),
        ({"bank": "/nowhere"}, "bank=/nowhere: cannot be read"),
    ],
)
def test_a_command_refuses_bad_input_before_anything_is_trained(new_place, given, message) -> None:
    result = new_place("bad-evaluate").run("evaluate", **given)
    assert result.code == 2 and message in result.err
    assert not result.made()


def judged(values: np.ndarray, margins: np.ndarray) -> pd.Series:
    masks = np.random.default_rng(1).random((len(margins), len(values))) < 0.5
    flipped = np.arange(len(values)) % 3 == 0
    return judge({"a": Attribution.of(values)}, Bank(masks, margins), flipped).iloc[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_undefined_of_equal_scores_is_empty_and_the_rest_is_chance() -> None:
    row = judged(np.zeros((12, 4), np.float32), np.random.default_rng(0).normal(size=(10, 2, 4)))
    assert np.isnan([row["lds"], row["calibration_slope"], row["lds_share_of_ceiling"]]).all()
    assert terminal.interval(row, "lds", ".3f") == terminal.interval(row, "auroc_", ".3f") == ""
    assert row["auroc"] == 0.5 and 0 <= row["noise_ceiling"] <= 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_target_whose_margins_are_all_equal_counts_in_no_mean() -> None:
    values, margins = (
        np.random.default_rng(0).normal(size=(12, 4)),
        np.random.default_rng(0).normal(size=(10, 2, 4)),
    )
    margins[:, :, 1] = 2.5
    others = [0, 2, 3]
    found = judged(values, margins)["lds"]
    assert found == pytest.approx(judged(values[:, others], margins[:, :, others])["lds"])
