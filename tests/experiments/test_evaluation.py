"""Is the attribution right: judged by planted truth, and run as a user would."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from toy import toy_config, toy_data

from attribution.errors import InputError
from attribution.experiments import methods
from attribution.experiments.evaluation import brittleness, count_retrainings, judge
from attribution.experiments.methods import Attribution, Subject, check_methods
from attribution.experiments.statistics import detection, predicted_margins, resampled, slope
from attribution.experiments.subset_bank import Bank, build_bank, load_bank
from attribution.models.predict import predict
from attribution.models.train import train_stacked
from attribution.reporting import terminal
from attribution.runtime.hashing import derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_bank_that_was_made_anew_is_another_bank(tmp_path) -> None:
    from attribution.tracking.fingerprint import fingerprint

    data, keys = toy_data(tmp_path / "data"), []
    for value in (0.0, 0.0, 1.0):
        for name in ("masks", "margins"):
            np.save(tmp_path / f"{name}.npy", np.full(3, value))
        keys.append(fingerprint("evaluate", toy_config(bank=str(tmp_path)), data))
    assert keys[0] == keys[1] != keys[2]


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


def test_detection_is_scikit_learns_and_a_count() -> None:
    rng = np.random.default_rng(1)
    flipped, values = rng.random(200) < 0.1, rng.normal(size=200)
    found = detection(flipped, values)
    assert found["auroc"] == pytest.approx(roc_auc_score(flipped, -values))
    assert found["average_precision"] == pytest.approx(average_precision_score(flipped, -values))
    first = sorted(range(200), key=lambda i: values[i])[:40]
    assert found["recall_20pct"] == sum(flipped[i] for i in first) / flipped.sum()
    assert found["auroc_ci_low"] < found["auroc"] < found["auroc_ci_high"]


def test_the_slope_is_that_of_a_regression_of_what_is_left_of_each_target() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(3, 1, (20, 4)), rng.normal(-1, 2, (20, 4))
    centred = [(values - values.mean(axis=0)).ravel() for values in (x, y)]
    assert slope(x, y) == pytest.approx(stats.linregress(*centred).slope)
    assert slope(x, 0.3 * x + np.arange(4)) == pytest.approx(0.3)


def test_predicted_margins_do_not_depend_on_the_size_of_a_block(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    values, masks = rng.normal(size=(50, 7)), rng.random((9, 50)) < 0.5
    monkeypatch.setattr("attribution.runtime.npy_blocks.BLOCK_ROWS", 8)
    np.testing.assert_allclose(predicted_margins(values, masks), masks @ values, atol=1e-12)


def test_a_draw_takes_rows_and_columns_anew() -> None:
    matrix = np.arange(30).reshape(5, 6)
    drawn = [matrix[part] for part in resampled(5, 6, 200)]
    assert all(d.shape == (5, 6) for d in drawn)
    assert {len(np.unique(d[:, 0] // 6)) for d in drawn} >= {2, 3, 4}
    assert np.mean(drawn) == pytest.approx(matrix.mean(), abs=1)


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


# The bank on disk


@pytest.fixture
def kept(tmp_path: Path):
    data, config = toy_data(tmp_path / "data", n_train=20, n_other=6), toy_config(epochs=1)
    bank = build_bank(config, data, 10, 1, 0.5, tmp_path / "work")
    folder = tmp_path / "bank"
    folder.mkdir()
    bank.save(folder, config, data)
    return bank, folder, config, data


def test_a_bank_that_was_saved_is_read_back_whatever_the_seed(kept) -> None:
    bank, folder, config, data = kept
    for seed in (0, 7):
        found = load_bank(str(folder), toy_config(epochs=1, seed=seed), data)
        np.testing.assert_array_equal(found.masks, bank.masks)
        np.testing.assert_array_equal(found.margins, bank.margins)
    spec = json.loads((folder / "spec.json").read_text())
    assert (spec["num_subsets"], spec["num_repeats"], spec["alpha"]) == (10, 1, 0.5)


def test_a_bank_for_something_else_is_refused(kept, tmp_path: Path) -> None:
    _, folder, config, data = kept
    other = toy_data(tmp_path / "other", n_train=22, n_other=6)
    for settings, examples in ((toy_config(epochs=2), data), (config, other)):
        with pytest.raises(InputError, match="^bank=.*was built for other data"):
            load_bank(str(folder), settings, examples)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "masks.npy").unlink(),
        lambda f: (f / "spec.json").write_text("{"),
        lambda f: np.save(f / "masks.npy", np.array([{}], object), allow_pickle=True),
        lambda f: np.save(f / "margins.npy", np.zeros((10, 1, 5))),
        lambda f: np.save(f / "margins.npy", np.full((10, 1, 6), np.nan)),
        lambda f: np.save(f / "masks.npy", np.ones((10, 20))),
        lambda f: np.save(f / "masks.npy", np.full((10, 20), 2, np.uint8).view(bool)),
        lambda f: np.save(f / "masks.npy", np.ones((1, 20), bool)),
        lambda f: np.save(f / "margins.npy", np.zeros((10, 0, 6))),
        lambda f: np.save(f / "margins.npy", np.zeros((10, 1, 6), int)),
        lambda f: (f / "spec.json").write_text("[]"),
        lambda f: (f / "spec.json").write_text("[" * 100_000),
        lambda f: ((f / "spec.json").unlink(), os.mkfifo(f / "spec.json")),
    ],
)
def test_a_damaged_bank_is_refused_in_one_line(kept, damage) -> None:
    _, folder, config, data = kept
    damage(folder)
    with pytest.raises(InputError, match="^bank=") as caught:
        load_bank(str(folder), config, data)
    assert "\n" not in str(caught.value)


# The command


SMALL = {"num_subsets": 10, "num_repeats": 2, "brittleness_targets": 3, "brittleness_k": 2}
ALL = "trak,trak_unweighted,trak_weighted,gradient_dot,gradient_cosine,penultimate,loss,random"


def test_evaluate_judges_reuses_and_takes_a_bank(new_place) -> None:
    place = new_place("evaluate")
    first = place.done("evaluate", **SMALL, methods=ALL)
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
        ({"alpha": 1}, "alpha=1.0: must be below 1"),
        ({"num_subsets": 3}, "num_subsets=3: must be at least 10"),
        ({"bank": "/nowhere"}, "bank=/nowhere: cannot be read"),
        ({"brittleness_targets": 1}, "brittleness_targets=1: an interval needs at least 2"),
        (
            {"brittleness_targets": 2, "brittleness_k": 10**6},
            "brittleness_k=1000000: must be below the",
        ),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(new_place, given, message) -> None:
    result = new_place("bad-evaluate").run("evaluate", **given)
    assert result.code == 2 and message in result.err
    assert not result.made()


def test_ekfac_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[benchmark\]'"):
        check_methods(["ekfac"])


# The methods


def test_gradient_products_are_those_of_explicit_gradients(tmp_path: Path, new_place) -> None:
    """Of long features, whose sketch is nearly the gradient itself."""
    import torch

    from attribution.gradients.per_sample import capture
    from attribution.models import classifier
    from attribution.models.batches import batches_of

    data = toy_data(tmp_path / "data", n_train=12, n_other=5)
    config = toy_config(proj_dim=1 << 15, num_blocks=1, epochs=1)
    folder = tmp_path / "model"
    classifier.save(
        classifier.build("resnet-mini", data.class_names, 0), folder, 16, (0.5,) * 3, (0.5,) * 3
    )

    class Stub:
        values = np.zeros((12, 5), np.float32)

    work = tmp_path / "work"
    work.mkdir()
    subject = Subject(config, data, [folder], Stub, work)
    model = classifier.load(folder)

    def gradients(split: str) -> np.ndarray:
        ((images, labels),) = batches_of(config, data, split, 64, torch.device("cpu"))
        found = capture(model, images, labels).per_sample().values()
        return torch.cat([g.flatten(1) for g in found], 1).double().numpy()

    train, targets = gradients("train"), gradients("validation")
    exact = train @ targets.T
    dot = methods.gradient_dot(subject).values
    assert np.corrcoef(dot.ravel(), exact.ravel())[0, 1] > 0.99
    lengths = np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(targets, axis=1)
    cosine = methods.gradient_cosine(subject).values
    assert np.abs(cosine - exact / lengths).max() < 0.1

    found: list[torch.Tensor] = []
    for split in ("train", "validation"):
        ((images, _),) = batches_of(config, data, split, 64, torch.device("cpu"))
        with torch.no_grad():
            found.append(model.resnet(images).pooler_output.flatten(1))
    similarity = torch.nn.functional.cosine_similarity(found[0][:, None], found[1][None], dim=2)
    same = data.labels("train")[:, None] == data.labels("validation")
    expected = np.where(same, 1, -1) * similarity.numpy()
    np.testing.assert_allclose(methods.penultimate(subject).values, expected, atol=1e-5)


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
