"""Why this prediction: stored features against the formula, and `explain` against the artifacts it reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Place, Result, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models.checkpoints import train_checkpoints
from attribution.reporting.terminal import print_explanations
from attribution.scores import explanation, stored_features
from attribution.scores.explanation import Explanation, confident_mistakes
from attribution.scores.features import Store, featurize
from attribution.scores.stored_features import load_features, write_features
from attribution.scores.trak import combine, score

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = ("mean", "none")
HALF = 2.0**-11  # the relative rounding of float16


# -- stored features -------------------------------------------------------------------------------


def write_store(folder: Path, m: int, rng: np.random.Generator, sizes: dict[str, int], k: int):
    """A store as traker leaves it, of random features; returns it with what it holds."""
    store, held = Store(folder / f"{m:03d}", m), {}
    for split, n in sizes.items():
        held[split] = rng.normal(size=(n, k)).astype(np.float32)
        held[f"{split} 1 - p"] = rng.random((n, 1)).astype(np.float32)
        for file, values in (
            (store.features_file(split), held[split]),
            (store.one_minus_p_file(split), held[f"{split} 1 - p"]),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                np.save(stream, values)
    return store, held


def ridge_scores(
    train: list[np.ndarray], new: list[np.ndarray], one_minus_p: list[np.ndarray], blocks: int,
    lambda_reg: float, weight: str,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The formula of compute_scores, block by block in float64, and how far float16 may move it."""
    total = bound = 0.0
    for X, Y in zip(train, new, strict=True):
        k = X.shape[1] // blocks
        lengths = np.zeros(len(X)), np.zeros(len(Y))
        for b in range(blocks):
            x, y = (part[:, b * k : (b + 1) * k].astype(np.float64) for part in (X, Y))
            gram = x.T @ x
            inverse = np.linalg.inv(gram + lambda_reg * np.trace(gram) / k * np.eye(k))
            total = total + x @ inverse @ y.T / len(train)
            for own, part in zip(lengths, (x, y), strict=True):
                own += np.einsum("ij,jk,ik->i", part, inverse, part)
        bound = bound + np.sqrt(np.outer(*lengths)) / len(train)
    factor = np.mean(one_minus_p, axis=0) if weight == "mean" else np.ones((len(total), 1))
    return total * factor, bound * factor


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(3, 12), st.integers(1, 3), st.integers(1, 5),
    st.integers(1, 3), st.sampled_from(WEIGHTS), st.sampled_from([0.1, 2.0]),
)  # fmt: skip
def test_stored_features_score_anything_by_the_formula(
    tmp_path_factory, seed, n, blocks, k, models, weight, lambda_reg
) -> None:
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(seed)
    sizes = {"train": n, "validation": 2}
    stores, held = zip(
        *(write_store(folder / "work", m, rng, sizes, blocks * k) for m in range(models))
    )
    combine(list(stores), folder / "scores.npy", lambda_reg, weight, torch.device("cpu"), blocks)
    config = toy_config(loss_gradient_weight=weight)
    write_features(folder / "features", list(stores), config)
    new = [rng.normal(size=(4, blocks * k)).astype(np.float32) for _ in stores]
    found = load_features(folder / "features").scores(new)
    expected, bound = ridge_scores(
        [each["train"] for each in held], new, [each["train 1 - p"] for each in held],
        blocks, lambda_reg, weight,
    )  # fmt: skip
    assert found.dtype == np.float32 and found.shape == (n, 4)
    assert (np.abs(found - expected) <= (2 * HALF + 1e-4) * bound + 1e-7).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[ImageData, list[Path]]:
    """Two checkpoints on halves of the toy data."""
    folder = tmp_path_factory.mktemp("trained")
    data = toy_data(folder / "data")
    masks = np.array([np.arange(32) % 4 < 2, np.arange(32) % 4 >= 2])
    found = train_checkpoints(toy_config(num_models=2), data, masks, folder / "work")
    return data, [checkpoint.folder for checkpoint in found]


SETTINGS = [
    {"loss_gradient_weight": "mean", "num_blocks": 1},
    {"loss_gradient_weight": "mean", "num_blocks": 5},
    {"loss_gradient_weight": "none", "num_blocks": 5},
    {"loss_gradient_weight": "none", "num_blocks": 1, "projector": "normal"},
]


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: " ".join(map(str, given.values())))
def test_a_target_looked_at_anew_has_the_scores_of_its_column(trained, tmp_path, given) -> None:
    data, checkpoints = trained
    config = toy_config(num_models=2, proj_dim=16, lambda_reg=0.1, **given)
    stores = featurize(config, data, checkpoints, tmp_path / "work")
    values = np.array(score(config, stores, tmp_path / "work" / "scores.npy").values)
    write_features(tmp_path / "features", stores, config)
    stored, rows, labels = load_features(tmp_path / "features"), data.rows("validation"), (
        data.labels("validation")
    )  # fmt: skip
    chosen = np.array([0, 3, 7])
    for some in ([chosen], chosen[:, None]):  # three at once, and one at a time
        found = np.concatenate(
            [
                stored.scores(
                    stored_features.new_features(
                        config, checkpoints, np.array(data.pixels()[rows[i]]), labels[i]
                    )
                )
                for i in some
            ],
            axis=1,
        )
        assert np.abs(found - values[:, chosen]).max() < 2e-3 * np.abs(values).max()
        assert np.abs(values).max() > 0


def test_the_probabilities_are_the_mean_of_the_checkpoints(trained) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    data, checkpoints = trained
    pixels = np.array(data.pixels()[data.rows("test")[:3]])
    expected = 0
    for folder in checkpoints:
        processor = AutoImageProcessor.from_pretrained(folder)
        images = processor([Image.fromarray(p) for p in pixels], return_tensors="pt")
        with torch.no_grad():
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            expected = expected + model(images["pixel_values"]).logits.softmax(1).numpy() / 2
    config = toy_config(num_models=2)
    found = stored_features.probabilities(config, checkpoints, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder of write_features: two checkpoints, 6 examples, 2 blocks of 3."""
    rng, sizes = np.random.default_rng(0), {"train": 6, "validation": 2}
    stores = [write_store(tmp_path / "work", m, rng, sizes, 6)[0] for m in range(2)]
    combine(stores, tmp_path / "scores.npy", 0.1, "mean", torch.device("cpu"), 2)
    write_features(tmp_path / "features", stores, toy_config())
    return tmp_path / "features"


STORED = ["000/factor.npy", "000/train.npy", "001/factor.npy", "001/train.npy", "scale.npy"]


def test_the_training_features_are_kept_in_half_precision(stored: Path) -> None:
    assert sorted(str(f.relative_to(stored)) for f in stored.rglob("*.npy")) == STORED
    train = np.load(stored / "000" / "train.npy")
    assert train.dtype == np.float16 and train.shape == (6, 6) and np.abs(train).max() <= 1


@pytest.mark.parametrize("name", [*STORED, "metadata.json"])
@pytest.mark.parametrize("damage", ["missing", "one byte", "short"])
def test_damaged_features_are_refused_in_one_line(stored: Path, name: str, damage: str) -> None:
    load_features(stored)
    file = stored / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 128
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "one byte" else file.read_bytes()[:-4])
    with pytest.raises(InputError, match=f"^features={stored}: cannot be read") as caught:
        load_features(stored)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"schema_version": 2},
        *(
            (lambda d, count=count: d | {"num_models": count})
            for count in (3, 0, -1, True, 2.0, "2", None, 10**12)
        ),
        lambda d: d | {"sha256": {"../" + name: value for name, value in d["sha256"].items()}},
        lambda d: d | {"sha256": dict.fromkeys(d["sha256"], 1)},
        lambda d: d | {"sha256": {}},
        lambda d: {"schema_version": 1},
        lambda d: [d],
    ],
)
def test_features_with_other_metadata_are_refused(stored: Path, change) -> None:
    file = stored / "metadata.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match="^features=.*cannot be read"):
        load_features(stored)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "pickled objects": ("scale.npy", np.full((6, 1), {}, object)),
        "another type": ("000/train.npy", np.zeros((6, 6), np.float32)),
        "other examples": ("001/train.npy", np.zeros((5, 6), np.float16)),
        "other lengths": ("000/train.npy", np.zeros((6, 5), np.float16)),
        "factors that are no squares": ("001/factor.npy", np.ones((6, 4), np.float32)),
        "one dimension": ("scale.npy", np.ones(6, np.float32)),
        "nothing": ("scale.npy", np.ones((0, 1), np.float32)),
        "two scales": ("scale.npy", np.ones((6, 2), np.float32)),
    }.values(),
)
def test_features_that_do_not_fit_are_refused_whatever_their_hashes(stored, name, values) -> None:
    np.save(stored / name, values, allow_pickle=True)
    bless(stored)
    with pytest.raises(InputError, match="^features=.*cannot be read"):
        load_features(stored)


def bless(stored: Path) -> None:
    """Give every file the hash that metadata.json promises."""
    file = stored / "metadata.json"
    document = json.loads(file.read_text())
    document["sha256"] = {n: sha256((stored / n).read_bytes()).hexdigest() for n in STORED}
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["000/train.npy", "001/factor.npy", "scale.npy"])
def test_stored_features_that_are_not_finite_make_no_scores(stored: Path, name: str) -> None:
    values = np.load(stored / name)
    values.flat[0] = np.nan
    np.save(stored / name, values)
    bless(stored)
    with pytest.raises(InputError, match="^features=.*not finite"):
        load_features(stored).scores([np.ones((1, 6), np.float32)] * 2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_features_of_other_checkpoints_are_refused(stored: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"are of 2 checkpoints, not {count}"):
        load_features(stored).scores([np.zeros((1, 6), np.float32)] * count)


@pytest.mark.parametrize("kind", ["pipe", "folder", "PostScript", "loop"])
def test_a_picture_that_is_none_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a picture.png"
    make = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "PostScript": lambda f: f.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "loop": lambda f: f.symlink_to(f),
    }
    make[kind](file)
    with pytest.raises(InputError, match=f"^image={file}: cannot be read") as caught:
        explanation.read_picture(toy_config(image=str(file)))
    assert "\n" not in str(caught.value)


def test_logits_of_other_data_explain_no_mistakes() -> None:
    with pytest.raises(InputError, match="are of 3 targets, the data has 4"):
        confident_mistakes(np.full((3, 2), 0.5), np.zeros(4, int), 2)


def test_features_of_another_length_are_refused(stored: Path) -> None:
    with pytest.raises(InputError, match="stored ones are 6 long, these 5"):
        load_features(stored).scores([np.zeros((1, 5), np.float32)] * 2)


def test_auto_keeps_features_up_to_its_bound(trained, tmp_path, monkeypatch) -> None:
    data, checkpoints = trained
    config = toy_config(num_models=2, proj_dim=16, num_blocks=2, lambda_reg=0.1)
    assert config.keep_features == "auto"
    stores = featurize(config, data, checkpoints, tmp_path / "work")
    score(config, stores, tmp_path / "work" / "scores.npy")
    write_features(tmp_path / "features", stores, config)
    size = sum(np.load(f).nbytes for f in (tmp_path / "features").glob("*/train.npy"))
    assert size == 2 * 32 * 2 * 16 * 2  # num_models x n_train x num_blocks x proj_dim x 2 bytes
    for bound, wanted in ((size, True), (size - 1, False)):
        monkeypatch.setattr(stored_features, "AUTO_BYTES", bound)
        assert stored_features.are_wanted(config, stores) is wanted
        for keep in ("yes", "no"):
            asked = toy_config(keep_features=keep)
            assert stored_features.are_wanted(asked, stores) is (keep == "yes")


# -- which mistakes --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 4), st.integers(0, 14))
def test_confident_mistakes_are_all_mistakes_in_falling_order(seed, n, classes, count) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n).round(1)  # rounded: some are equal
    labels = rng.integers(0, classes, n)
    found = confident_mistakes(p, labels, count)
    wrong = [i for i in range(n) if list(p[i]).index(max(p[i])) != labels[i]]
    assert found == sorted(wrong, key=lambda i: (-max(p[i]), i))[:count]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(new_place: Callable[..., Place]) -> Place:
    """A store with one finished trak run: 24 training examples, 9 targets, two checkpoints."""
    place = new_place("explain")
    place.done("trak")
    return place


def run_id(place: Place, stage: str) -> str:
    return place.runs(stage)[0].info.run_id


def scores_of(place: Place) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame]:
    folder = place.artifacts(run_id(place, "trak")) / "scores"
    tables = (pd.read_parquet(folder / f"{name}.parquet") for name in ("train", "targets"))
    return np.load(folder / "scores.npy"), *tables


def mean_probabilities(place: Place) -> np.ndarray:
    """Of the targets, (9, 3), from the logits that the finetune run kept."""
    file = place.artifacts(run_id(place, "finetune")) / "training" / "logits.npz"
    with np.load(file) as arrays:
        e = np.exp(arrays["validation_logits"].astype(np.float64))
    return (e / e.sum(axis=2, keepdims=True)).mean(axis=0)


def explained(place: Place, result: Result) -> pd.DataFrame:
    table = pd.read_csv(place.artifacts(result.run_id) / "explanation.csv")
    as_json = json.loads((place.artifacts(result.run_id) / "explanation.json").read_text())
    assert as_json["columns"] == list(table) and len(as_json["data"]) == len(table)
    return table


def cached_pixels(place: Place, file_name: str) -> np.ndarray:
    """What decoding makes of an image of the data set: it has the models' size already."""
    return np.asarray(Image.open(place.dataset / file_name).convert("RGB"))


@pytest.fixture
def picture(place: Place, tmp_path: Path) -> Path:
    """The pixels of target 4 in a file outside of the data set."""
    file = tmp_path / "somewhere" / "mine.png"
    file.parent.mkdir()
    Image.fromarray(cached_pixels(place, scores_of(place)[2]["file_name"][4])).save(file)
    return file


def check_side(shown: pd.DataFrame, column: np.ndarray, train: pd.DataFrame, k: int) -> None:
    """The rows of one side are the k extremes of the column that have its sign, in order."""
    side = shown["side"].iloc[0]
    sign = 1 if side == "helpful" else -1
    order = sorted(range(len(column)), key=lambda i: (-sign * column[i], i))
    expected = [i for i in order if sign * column[i] > 0][:k]
    assert shown["position"].tolist() == expected
    assert shown["rank"].tolist() == list(range(1, len(expected) + 1))
    np.testing.assert_allclose(shown["score"], column[expected], rtol=1e-6)
    for name in ("example_id", "file_name", "label_name", "is_flipped"):
        assert shown[name].tolist() == train[name].iloc[expected].tolist()


def test_named_targets_are_the_columns_of_the_scores(place) -> None:
    result = place.done("explain", target="5,3,5", num_examples=4)
    assert result.made() == {"explain"} and result.tags["trak_run_id"] == run_id(place, "trak")
    assert result.tags["finetune_run_id"] == run_id(place, "finetune")
    values, train, targets = scores_of(place)
    p, table = mean_probabilities(place), explained(place, result)
    assert table["explained"].drop_duplicates().tolist() == ["target 5", "target 3"]
    for target in (5, 3):
        own = table[table["explained"] == f"target {target}"]
        assert set(own["explained_label"]) == {targets["label_name"][target]}
        assert set(own["predicted"]) == {("blue", "green", "red")[p[target].argmax()]}
        np.testing.assert_allclose(own["probability"], p[target].max(), rtol=1e-5)
        for _, shown in own.groupby("side"):
            check_side(shown, values[:, target], train, k=4)
    folder = place.artifacts(result.run_id)
    assert {f.name for f in folder.iterdir()} == {
        "explanation.html", "explanation.csv", "explanation.json", "environment.json",
        "explanation-target-3.png", "explanation-target-5.png",
    }  # fmt: skip
    for name in ("explanation-target-3.png", "explanation-target-5.png"):
        assert min(Image.open(folder / name).size) > 100
    lines = [line for line in result.out.splitlines() if line.split()[:1] == ["target"]]
    assert [line.split()[1] for line in lines] == ["5:", "3:"]
    assert f"explain run: {result.run_id}" in result.out
    assert str(folder / "explanation.html") in result.err


def test_every_example_is_on_the_side_of_its_sign(place) -> None:
    """Asked for more than there are, neither side borrows from the other."""
    table = explained(place, place.done("explain", target="0", num_examples=24))
    assert (table.loc[table["side"] == "helpful", "score"] > 0).all()
    assert (table.loc[table["side"] == "harmful", "score"] < 0).all()
    assert table["position"].is_unique and len(table) == 24


def test_a_picture_with_a_target_s_pixels_and_label_has_its_scores(place, picture) -> None:
    values, train, targets = scores_of(place)
    label, p = targets["label_name"][4], mean_probabilities(place)[4]
    result = place.done("explain", image=picture, label=label, num_examples=24)
    assert result.made() == {"explain"}
    table = explained(place, result)
    assert set(table["explained"]) == {"mine.png"} and set(table["explained_label"]) == {label}
    np.testing.assert_allclose(table["probability"], p.max(), atol=0.02)  # bf16 in training
    column = values[table["position"], 4]
    bound = 2e-3 * np.abs(values[:, 4]).max() + 1e-7
    assert len(table) == 24 and np.abs(table["score"] - column).max() < bound
    assert (place.artifacts(result.run_id) / "explanation-mine.png").is_file()


def test_without_a_label_it_is_the_predicted_one(place, picture) -> None:
    table = explained(place, place.done("explain", image=picture))
    names = "blue", "green", "red"
    assert set(table["explained_label"]) == set(table["predicted"])
    assert set(table["predicted"]) == {names[mean_probabilities(place)[4].argmax()]}


def test_another_label_asks_another_question(place, picture) -> None:
    tables = [
        explained(place, place.done("explain", image=picture, label=label)).set_index("position")
        for label in ("blue", "red")
    ]
    assert [set(t["explained_label"]) for t in tables] == [{"blue"}, {"red"}]
    both = tables[0].join(tables[1], rsuffix="_red", how="inner")
    assert not np.allclose(both["score"], both["score_red"])
    assert set(tables[0]["predicted"]) == set(tables[1]["predicted"])


def predict_wrongly(monkeypatch, place: Place, wrong: list[int]) -> np.ndarray:
    """Let the ensemble be certain of every target but be wrong about some, the first most."""
    from attribution.models.ensemble import Ensemble

    labels = scores_of(place)[2]["label"].to_numpy()
    p = np.eye(3)[labels]
    for place_in_order, target in enumerate(wrong):
        p[target] = np.roll(np.eye(3)[labels[target]], 1) * (0.9 - 0.1 * place_in_order) + 0.03
    monkeypatch.setattr(Ensemble, "validation_probabilities", lambda self: p)
    return p


def test_without_a_wish_it_explains_six_mistakes_the_most_confident_first(
    place, monkeypatch
) -> None:
    wrong = [7, 2, 8, 0, 5, 1, 3]
    predict_wrongly(monkeypatch, place, wrong)
    table = explained(place, place.done("explain"))
    names = [f"target {target}" for target in wrong]
    assert table["explained"].drop_duplicates().tolist() == names[:6]
    assert (table["explained_label"] != table["predicted"]).all()
    few = explained(place, place.done("explain", errors=2, target="8"))
    assert few["explained"].drop_duplicates().tolist() == ["target 8", *names[:2]]
    none = explained(place, place.done("explain", target="6"))  # no mistakes unless asked for
    assert set(none["explained"]) == {"target 6"}
    # A target that is a mistake too appears once.
    once = explained(place, place.done("explain", errors=1, target="7"))
    assert once["explained"].drop_duplicates().tolist() == ["target 7"]


def test_no_mistakes_at_all(place, monkeypatch) -> None:
    predict_wrongly(monkeypatch, place, [])
    refused(place, "explain", "errors=3", "makes no mistake", "target=0", errors=3)
    table = explained(place, place.done("explain", errors=3, target="1"))
    assert set(table["explained"]) == {"target 1"}


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"target": "9"}, ["target=9", "from 0 to 8"]),
        ({"target": "3,-1"}, ["target=-1", "from 0 to 8"]),
        ({"target": "three"}, ["target=three", "whole numbers"]),
        ({"target": "1.5"}, ["target=1.5", "whole numbers"]),
        ({"image": "/nowhere/cat.png"}, ["image=/nowhere/cat.png", "No such file"]),
        ({"errors": "-1"}, ["errors=-1", "at least 0"]),
        ({"num_examples": "0"}, ["num_examples=0", "at least 1"]),
        ({"label": "re", "target": "1"}, ["label=re", "did you mean red"]),
        ({"label": "red", "target": "1"}, ["label=red", "image"]),
        ({"num_models": "0"}, ["num_models=0", "at least 1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_explained_is_refused_before_anything_is_trained(
    place, given, fragments
) -> None:
    refused(place, "explain", *fragments, **{"seed": 9} | given)  # whose checkpoints are not there


@pytest.mark.parametrize("kind", ["text", "truncated", "folder", "empty", "unreadable"])
def test_a_picture_that_cannot_be_read_is_refused_before_anything_is_trained(
    place, picture, kind
) -> None:
    content = {"text": b"not an image", "truncated": picture.read_bytes()[:200], "empty": b""}
    file = picture
    if kind in content:
        picture.write_bytes(content[kind])
    elif kind == "folder":
        file = picture.parent
    else:
        picture.unlink()
        picture.symlink_to(picture)
    refused(place, "explain", f"image={file}", "cannot be read", image=file, seed=9)


def test_an_unknown_label_of_a_picture(place, picture) -> None:
    refused(place, "explain", "label=gren", "did you mean green", image=picture, label="gren")


def test_scores_without_features_are_refused_by_name(place, picture, monkeypatch) -> None:
    refused(
        place, "explain", "keep_features=no", "image", image=picture, keep_features="no", seed=9
    )
    monkeypatch.setattr(stored_features, "AUTO_BYTES", 10)
    made = place.done("trak", proj_dim=8)
    assert {f.name for f in place.artifacts(made.run_id).iterdir()} >= {"scores", "suspects.csv"}
    assert not (place.artifacts(made.run_id) / "features").exists()
    refused(
        place, "explain", f"trak_run_id={made.run_id}", "keep_features=yes",
        image=picture, proj_dim=8,
    )  # fmt: skip
    done = place.done("explain", image=picture, proj_dim=8, keep_features="yes")
    assert done.made() == {"trak", "explain"}
    targets = place.done("explain", target="1", proj_dim=8)  # which needs none
    assert targets.tags["trak_run_id"] == made.run_id


def test_damaged_features_stop_the_command(place, new_place, picture) -> None:
    copy = new_place("damaged", like=place)
    file = copy.artifacts(run_id(copy, "trak")) / "features" / "001" / "train.npy"
    values = np.load(file)
    values[0] = -values[0]
    np.save(file, values)
    refused(copy, "explain", "features=", "001/train.npy", "hash", image=picture, errors=1)


# -- reuse, and what is saved ----------------------------------------------------------------------


def test_a_finished_explanation_is_reused_until_the_picture_changes(place, picture) -> None:
    first = place.done("explain", image=picture, num_examples=3)
    again = place.done("explain", image=picture, num_examples=3)
    assert not again.made() and again.tags["reused_run_id"] == first.run_id
    assert again.out == first.out
    pixels = np.asarray(Image.open(picture)).copy()
    Image.fromarray(255 - pixels).save(picture)
    changed = place.done("explain", image=picture, num_examples=3)
    assert changed.made() == {"explain"}
    assert not explained(place, first).equals(explained(place, changed))


def test_a_copy_of_the_picture_is_called_by_its_own_name(place, picture) -> None:
    place.done("explain", image=picture, num_examples=2)
    copy = Path(shutil.copy(picture, picture.with_name("other.png")))
    result = place.done("explain", image=copy, num_examples=2)
    assert "other.png" in result.out and "mine.png" not in result.out


def test_output_saves_the_page_the_pictures_and_the_table(place, tmp_path) -> None:
    folder = tmp_path / "new" / "folder"
    result = place.done("explain", target="2", output=folder)
    artifacts = place.artifacts(result.run_id)
    names = {"explanation.html", "explanation.csv", "explanation-target-2.png"}
    assert {f.name for f in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (artifacts / name).read_bytes()
    assert str(folder / "explanation.html") in result.err
    before = {f: f.read_bytes() for f in folder.iterdir()}
    refused(
        place, "explain", f"output={folder}", "exists", "--overwrite", target="3", output=folder
    )
    assert {f: f.read_bytes() for f in folder.iterdir()} == before
    place.done("explain", target="3", output=folder, overwrite="yes")
    assert "target 3" in (folder / "explanation.html").read_text()


def test_a_reused_explanation_is_saved_too(place, tmp_path) -> None:
    first = place.done("explain", target="6", num_examples=5)
    again = place.done("explain", target="6", num_examples=5, output=tmp_path / "saved")
    assert not again.made() and again.tags["reused_run_id"] == first.run_id
    assert (tmp_path / "saved" / "explanation.html").is_file()


def test_saving_beside_the_picture_leaves_the_picture_alone(place, picture) -> None:
    before = picture.read_bytes()
    place.done("explain", image=picture, output=picture.parent)
    assert picture.read_bytes() == before
    assert (picture.parent / "explanation.html").is_file()


def test_one_file_that_is_there_keeps_all_from_being_saved(place, tmp_path) -> None:
    mine = tmp_path / "explanation-target-2.png"
    mine.write_text("mine")
    result = place.run("explain", target="2", output=tmp_path)
    assert result.code == 2 and result.errors == result.err.splitlines()[-1:]
    assert f"output={mine}: exists" in result.errors[0]
    assert [f.name for f in tmp_path.iterdir()] == [mine.name] and mine.read_text() == "mine"
    place.done("explain", target="2", output=tmp_path, overwrite="yes")
    assert mine.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("stage", ["explain", "ablation"])
def test_the_script_itself_looks_for_files_that_are_there(
    place, tmp_path, monkeypatch, capsys, stage
) -> None:
    import runpy
    import sys

    name = {"explain": "explanation.html", "ablation": "harmful_0.1.csv"}[stage]
    (tmp_path / name).write_text("mine")
    given = {"explain": {"target": "1"}, "ablation": {"export_arm": "harmful"}}[stage]
    argv = place.argv(stage, output=tmp_path, seed=9, **given)
    monkeypatch.setattr(sys, "argv", [stage, *argv])
    monkeypatch.delitem(sys.modules, f"scripts.{stage}", raising=False)
    with place.active(), pytest.raises(SystemExit) as stop:
        runpy.run_module(f"scripts.{stage}", run_name="__main__")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.startswith(f"error: output={tmp_path / name}: exists")


@pytest.mark.parametrize("what", ["file", "below a file"])
def test_an_output_that_is_no_folder_is_refused_before_anything_is_trained(
    place, tmp_path, what
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    output = tmp_path / "notes.txt" / ("" if what == "file" else "folder")
    refused(place, "explain", f"output={output}", target="1", output=output, seed=9)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_tilde_in_output_is_the_home_folder(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place.done("explain", target="2", output="~/saved")
    assert (tmp_path / "saved" / "explanation.html").is_file()
    refused(place, "explain", "exists", target="2", output="~/saved")


# -- what is shown ---------------------------------------------------------------------------------


def explanation_table(**changes: Any) -> pd.DataFrame:
    row = {
        "explained": "target 1", "explained_label": "cat", "predicted": "dog", "probability": 0.9,
        "side": "helpful", "rank": 1, "score": 1.5, "file_name": "a.png", "example_id": "id7",
        "label_name": "cat", "is_flipped": False,
    }  # fmt: skip
    return pd.DataFrame([row | changes])


@pytest.mark.parametrize("name", ["[red]", "[/x]", ":smile:", "a[b]c", "$x$"])
def test_names_are_printed_as_they_are(capsys, name: str) -> None:
    print_explanations(
        explanation_table(explained=name, explained_label=name, file_name=name, label_name=name)
    )
    assert capsys.readouterr().out.count(name) == 4


def test_three_on_each_side_are_printed(capsys) -> None:
    rows = [
        explanation_table(side=side, rank=rank, file_name=f"{side}{rank}.png", is_flipped=rank == 2)
        for side in ("helpful", "harmful")
        for rank in (1, 2, 3, 4)
    ]
    print_explanations(pd.concat([*rows, explanation_table(rank=2, file_name="")]))
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if ".png" in line]
    assert len(shown) == 6 and all(
        f"{side}4" not in "".join(lines) for side in ("helpful", "harmful")
    )
    assert ["flipped" in line for line in shown] == [False, True, False] * 2
    assert "raised it" in shown[0] and "lowered it" in shown[3]
    assert "target 1: cat" in shown[0] and "dog 0.90" in shown[0]
    assert "id7" in lines[-2]  # an example without a file


def made_up(name: str = "target 0", **changes: Any) -> Explanation:
    train = pd.DataFrame(
        {
            "position": [3, 5], "label_name": ["bright"] * 2, "is_flipped": [False, True],
            "true_label": [1, 0], "file_name": ["", "<b>.png"], "example_id": ["id3", "id5"],
            "score": [0.5, 0.25],
        }
    )  # fmt: skip
    values = {
        "pixels": np.full((16, 16, 3), 9, np.uint8), "label": "bright", "predicted": "dark",
        "probability": 0.75, "label_probability": 0.25, "helpful": train, "harmful": train[:1],
    }  # fmt: skip
    return Explanation(name, **values | changes)


@pytest.mark.parametrize("empty", [(), ("helpful",), ("harmful",), ("helpful", "harmful")])
def test_a_side_may_be_empty(tmp_path, empty) -> None:
    from attribution.reporting import figures
    from attribution.reporting import html as pages

    data, none = toy_data(tmp_path / "data"), made_up().helpful[:0]
    found = made_up(**dict.fromkeys(empty, none))
    figures.save(figures.explanation(data, found), tmp_path / "found.png")
    assert min(Image.open(tmp_path / "found.png").size) > 100
    page = pages.explanations(data, [found], {"trak run": "0123"})
    assert page.count("<img") == 1 + 2 * ("helpful" not in empty) + ("harmful" not in empty)
    assert len(found.table()) == page.count("<img") - 1


def test_right_and_wrong_predictions_are_told_apart() -> None:
    assert not made_up().is_right and made_up(predicted="bright").is_right


def test_a_target_out_of_range_is_refused_by_the_library(tmp_path) -> None:
    from attribution.scores.artifact import Scores

    data = toy_data(tmp_path / "data")
    scores = Scores(
        np.zeros((32, 16), np.float32), data.table("train"), data.table("validation"), {}
    )
    for target in (-1, 16):
        with pytest.raises(InputError, match=f"^target={target}: must be from 0 to 15"):
            explanation.explain_targets(data, scores, np.full((16, 2), 0.5), [0, target], 2)


def test_class_names_that_look_like_numbers_or_nothing(new_place, tmp_path) -> None:
    """What is printed has been a .csv file in between."""
    names, folder = {"blue": "007", "green": "NA", "red": "1e5"}, tmp_path / "images"
    place = new_place("names")
    shutil.copytree(place.dataset, folder)
    for old, new in names.items():
        (folder / old).rename(folder / new)
    given = {"dataset": folder, "epochs": 1, "num_models": 1, "num_examples": 1}
    result = place.done("explain", **given, target="0,1,2,3,4,5,6,7,8")
    shown = [line.split()[2] for line in result.out.splitlines() if line.split()[:1] == ["target"]]
    targets = pd.read_parquet(
        place.artifacts(result.tags["trak_run_id"]) / "scores" / "targets.parquet"
    )
    assert shown == targets["label_name"].tolist() and set(shown) == set(names.values())


def test_scores_go_with_the_checkpoints_that_they_were_made_from(new_place, tmp_path) -> None:
    """A newer run with the same settings may be of another number of threads, or another device."""
    place = new_place("own")
    first = place.done("trak")
    own = first.tags["finetune_run_id"]
    checkpoints, kept = place.artifacts(own) / "checkpoints", tmp_path / "kept"
    checkpoints.rename(kept)
    newer = place.done("finetune").run_id
    pictures = iter(sorted(place.dataset.rglob("*.png")))
    result = place.done("explain", image=next(pictures))
    assert result.tags["finetune_run_id"] == newer != own and "are others" not in result.err
    logits = place.artifacts(own) / "training" / "logits.npz"
    arrays = dict(np.load(logits))
    arrays["train_logits"] = arrays["train_logits"] + 1
    np.savez(logits, **arrays)
    result = place.done("explain", image=next(pictures))
    assert f"trak run {first.run_id} scored" in result.err and "are others" in result.err
    kept.rename(checkpoints)
    result = place.done("explain", image=next(pictures))
    assert result.tags["finetune_run_id"] == own and "are others" not in result.err
    result = place.done("explain", image=next(pictures), finetune_run_id=newer)
    assert result.tags["finetune_run_id"] == newer and "are others" in result.err
