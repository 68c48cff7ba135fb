"""The list to act on: which training examples are on it, in what order, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import write_images
from toy import toy_data

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.data.splits import SPLITS
from attribution.scores import suspects as module
from attribution.scores.suspects import COLUMNS, near_duplicates, suspects, thumbnails

pytestmark = pytest.mark.usefixtures("one_thread")
REASONS = (
    "contradicts other images", "high loss", "confident learning",
    "near-duplicate with another label",
)  # fmt: skip


def evidence(data: ImageData, seed: int = 0) -> pd.DataFrame:
    """What trak finds out about all images, at random; some values are equal."""
    table, rng = pd.concat(map(data.table, SPLITS), ignore_index=True), np.random.default_rng(seed)
    n = len(table)
    return table.assign(
        trust=rng.normal(size=n).round(1),
        loss=rng.exponential(size=n).round(1),
        label_quality=rng.random(n).round(1),
        predicted_label=rng.integers(0, 2, n),
    )


def uniform(examined: pd.DataFrame) -> np.ndarray:
    """Probabilities by which confident learning doubts nothing."""
    return np.full((len(examined), 2), 0.5)


def doubting(monkeypatch, issues: np.ndarray) -> None:
    """Let confident learning take these for wrong, (n,) bool."""
    monkeypatch.setattr(module, "label_issues", lambda labels, probabilities: issues)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    """Dark and bright, of independent noise: no two are alike."""
    return toy_data(tmp_path_factory.mktemp("toy"))


def reasons_of(row: pd.Series, issue: bool) -> list[str]:
    holds = row["trust"] < 0, row["loss"] > np.log(2), issue, False
    return [text for text, is_so in zip(REASONS, holds, strict=True) if is_so]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_the_list_holds_what_has_a_reason_in_order_of_its_rank(data, seed, share, by_loss) -> None:
    """Twice as many images are looked at as confident learning takes for wrong."""
    examined, rng = evidence(data, seed), np.random.default_rng(seed)
    issues = rng.random(len(examined)) < share
    ranks = -examined["loss"] if by_loss else examined["trust"].rank() + (-examined["loss"]).rank()
    reasons = [reasons_of(row, issues[i]) for i, row in examined.iterrows()]
    first = ranks.sort_values(kind="stable").index[: 2 * issues.sum()]
    expected = [i for i in first if reasons[i]]
    with pytest.MonkeyPatch.context() as patch:
        doubting(patch, issues)
        table = suspects(data, examined, uniform(examined), by_loss)
    assert list(table) == ["rank", *COLUMNS]
    assert table["rank"].tolist() == list(range(1, len(expected) + 1))
    assert table["reasons"].tolist() == [", ".join(reasons[i]) for i in expected]
    copied = "example_id", "file_name", "split", "position", "trust", "loss", "label_quality"
    for name in (*copied, "is_flipped"):
        assert table[name].tolist() == examined[name].iloc[expected].tolist()
    assert table["label"].tolist() == examined["label_name"].iloc[expected].tolist()
    for row, i in zip(table.itertuples(), expected, strict=True):
        predicted = data.class_names[examined["predicted_label"][i]]
        assert row.suggested_label == ("" if predicted == row.label else predicted)


def test_a_list_without_suspects_has_all_columns(data) -> None:
    examined = evidence(data)
    table = suspects(data, examined, uniform(examined))
    assert list(table) == ["rank", *COLUMNS] and table.empty


def test_one_image(tmp_path, monkeypatch) -> None:
    data = toy_data(tmp_path / "data", n_train=1)
    doubting(monkeypatch, np.array([True]))
    examined = evidence(data).iloc[:1].assign(trust=-1.0, loss=0.1)
    table = suspects(data, examined, uniform(examined))
    assert table["reasons"].tolist() == ["contradicts other images, confident learning"]
    assert table["rank"].tolist() == [1] and table["near_duplicate_of"].tolist() == [""]


def test_a_loss_is_high_above_that_of_a_guess(data, monkeypatch) -> None:
    examined = evidence(data).assign(trust=1.0, loss=0.1)
    examined.loc[5, "loss"] = np.log(2)
    doubting(monkeypatch, np.arange(len(examined)) == 5)
    assert suspects(data, examined, uniform(examined))["reasons"].tolist() == ["confident learning"]
    examined.loc[5, "loss"] = np.nextafter(np.log(2), 1)
    table = suspects(data, examined, uniform(examined))
    assert table[["position", "reasons"]].to_numpy().tolist() == [
        [5, "high loss, confident learning"]
    ]


# -- twins -----------------------------------------------------------------------------------------


def with_twins(folder: Path, pairs: list[tuple[int, int]], change) -> ImageData:
    """The toy data with pixels of the first of each pair, changed, in place of the second's."""
    data = toy_data(folder)
    pixels = np.array(data.pixels())
    for of, twin in pairs:
        pixels[twin] = change(pixels[of])
    np.save(folder / "twins.npy", pixels)
    return dataclasses.replace(data, pixels_file=folder / "twins.npy")


CHANGES = {
    "same": lambda p: p,
    "darker": lambda p: (p * 0.8).astype(np.uint8),
    "noisier": lambda p: np.clip(p + np.random.default_rng(0).normal(0, 3, p.shape), 0, 255),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_twin_with_another_label_is_found_on_both_sides(tmp_path, change) -> None:
    """Examples 4 and 9 are of two classes, 6 and 8 of one."""
    data = with_twins(tmp_path, [(4, 9), (6, 8)], CHANGES[change])
    examined = evidence(data).assign(trust=1.0, loss=0.0)
    table = suspects(data, examined, uniform(examined)).set_index("position")
    assert sorted(table.index) == [4, 9] and set(table["split"]) == {"train"}
    assert set(table["reasons"]) == {"near-duplicate with another label"}
    assert table["near_duplicate_of"].to_dict() == {4: "id9", 9: "id4"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 3), st.floats(0.01, 1))
def test_near_duplicates_are_those_of_a_double_loop(seed, n, classes, spread) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(3, 6))[rng.integers(0, 3, n)] + spread * rng.normal(size=(n, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = rng.integers(0, classes, n)
    for i, found in enumerate(near_duplicates(vectors, labels)):
        likeness = {j: vectors[i] @ vectors[j] for j in range(n) if labels[j] != labels[i]}
        best = max(likeness.values(), default=-1)
        if abs(best - 0.97) > 1e-5:  # float32 sums differ in the last bit
            assert (found >= 0) == (best > 0.97)
        if found >= 0:
            assert labels[found] != labels[i] and likeness[found] > best - 1e-5


def test_thumbnails_are_centred_means_over_squares(data) -> None:
    """16 by 16 pixels: every thumbnail's pixel is the mean of four."""
    found = thumbnails(data, data.table("train"))
    for i, row in enumerate(data.rows("train")[:5]):
        image = data.pixels()[row].astype(float)
        small = np.array(
            [
                [image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for x in range(8)]
                for y in range(8)
            ]
        ).ravel()
        assert np.corrcoef(small, found[i])[0, 1] > 0.999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-6)


def test_pictures_of_one_colour_are_twins_of_nothing(tmp_path) -> None:
    data = with_twins(tmp_path, [(4, 4), (9, 9)], lambda p: np.full_like(p, 77))
    vectors = thumbnails(data, data.table("train"))
    assert np.isfinite(vectors).all()
    assert (near_duplicates(vectors, data.labels("train")) == -1).all()


# -- the stage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(new_place):
    """Scores of the digits with a tenth of 1,079 labels flipped, from two small checkpoints."""
    place = new_place("suspects")
    given = {
        "dataset": "digits", "label_noise": 0.1, "num_models": 2, "epochs": 8, "proj_dim": 32,
        "num_blocks": 2, "batch_size": 32, "image_size": 16, "learning_rate": 2e-3,
    }  # fmt: skip
    return place, place.done("trak", **given)


@pytest.mark.slow
def test_planted_flips_come_first_on_the_digits(digits) -> None:
    place, result = digits
    folder = place.artifacts(result.run_id)
    table = pd.read_csv(folder / "suspects.csv", keep_default_na=False)
    train = pd.read_parquet(folder / "scores" / "train.parquet")
    assert f"suspects: {len(table)} of 1797 images" in result.out
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    flips = int(train["is_flipped"].sum())
    assert flips == 108 and table["is_flipped"].head(50).mean() > 0.8
    assert table["is_flipped"].head(flips).sum() > 0.6 * flips
    assert table["is_flipped"].sum() > 0.9 * flips and len(table) < 4 * flips
    # Among those found, the class that is suggested is mostly the true one.
    found = table.head(flips).query("is_flipped")
    true = train.set_index("example_id").loc[found["example_id"], "true_label"]
    suggested = found["suggested_label"].astype(str).to_numpy()
    assert np.mean(suggested == true.astype(str).to_numpy()) > 0.7


@pytest.mark.slow
def test_the_stage_s_list_is_about_all_splits_and_follows_the_score_table(digits) -> None:
    place, result = digits
    folder = place.artifacts(result.run_id)
    table = pd.read_csv(folder / "suspects.csv", keep_default_na=False)
    assert set(table["split"]) == {"train", "validation", "test"}
    train = pd.read_parquet(folder / "scores" / "train.parquet").set_index("example_id")
    own = table[table["split"] == "train"]
    same = train.loc[own["example_id"]]
    for name in ("trust", "loss", "label_quality"):
        np.testing.assert_allclose(own[name], same[name], rtol=1e-5)
    assert own["position"].tolist() == same["position"].tolist()


@pytest.mark.slow
def test_a_planted_twin_is_on_the_list_of_the_stage(new_place, tmp_path) -> None:
    place, folder = new_place("twin"), write_images(tmp_path / "images", 8)
    config = resolve({"dataset": str(folder), "image_size": 16, "cache_dir": str(place.cache)})
    red = load_data(config).table("train").query("label_name == 'red'")["file_name"].iloc[0]
    pixels = np.asarray(Image.open(folder / red)).copy()
    pixels[0, 0] ^= 4  # another file, and to the eye the same picture
    for seed in range(40):  # until its place in the draw is in training
        pixels[0, 1] = seed
        Image.fromarray(pixels).save(folder / "blue" / "twin.png")
        names = set(load_data(config).table("train")["file_name"])
        if {"blue/twin.png", red} <= names:
            break
    result = place.done("trak", dataset=folder, epochs=1)
    table = pd.read_csv(place.artifacts(result.run_id) / "suspects.csv", keep_default_na=False)
    table = table.set_index("file_name")
    for own, other in ((red, "blue/twin.png"), ("blue/twin.png", red)):
        assert "near-duplicate with another label" in table.loc[own, "reasons"]
        assert table.loc[own, "near_duplicate_of"] == table.loc[other, "example_id"]


@pytest.mark.slow
def test_scores_without_suspects_are_logged(finished, new_place, monkeypatch) -> None:
    from attribution.scores import scored as module

    place = new_place("none", like=finished[0])
    original = module.suspects
    monkeypatch.setattr(module, "suspects", lambda *args, **how: original(*args, **how)[:0])
    result = place.done("trak", lambda_reg=0.7)
    assert result.made() == {"trak"} and "suspects: 0 of " in result.out
    assert not place.done("trak", lambda_reg=0.7).made()


def test_images_without_contrast_are_near_duplicates_of_nothing() -> None:
    assert (
        near_duplicates(np.zeros((4, 6), np.float32), np.array([0, 1, 0, 1])).tolist() == [-1] * 4
    )
