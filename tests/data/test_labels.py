"""Parameter `labels`: labels that a person has corrected."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.errors import InputError


@pytest.fixture
def load(images: Path, tmp_path: Path):
    def run(**given) -> ImageData:
        fixed = {"dataset": str(images), "image_size": 16, "cache_dir": str(tmp_path / "cache")}
        return load_data(resolve(fixed | given))

    return run


def table(file: Path, **columns) -> str:
    pd.DataFrame(columns).to_csv(file, index=False)
    return str(file)


@pytest.mark.parametrize("key", ["example_id", "file_name"])
def test_the_labels_of_named_training_examples_change_and_no_others(load, tmp_path, key) -> None:
    before = load(label_noise=0.3)
    train = before.table("train")
    flipped = train[train["is_flipped"]].head(2)
    names = [before.class_names[i] for i in flipped["true_label"]]
    file = table(tmp_path / "labels.csv", **{key: flipped[key], "label": names})
    after = load(label_noise=0.3, labels=file)
    changed = (before.examples["label"] != after.examples["label"]).to_numpy()
    assert set(before.examples["example_id"][changed]) == set(flipped["example_id"])
    own = after.examples[changed]
    assert list(own["label"]) == list(own["true_label"]) and not own["is_flipped"].any()
    assert [after.class_names[i] for i in own["label"]] == list(own["label_name"])
    assert after.fingerprint != before.fingerprint


def test_the_label_that_is_there_already_changes_nothing(load, tmp_path) -> None:
    before = load()
    first = before.table("train").iloc[:1]
    file = table(tmp_path / "l.csv", example_id=first["example_id"], label=first["label_name"])
    assert load(labels=file).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"example_id": ["nobody"], "label": ["red"]}, "'nobody' is no example_id of this"),
        ({"file_name": ["red/99.png"], "label": ["red"]}, "is no file_name of this training set"),
        ({"example_id": ["x"]}, "needs the columns example_id (or file_name) and label"),
        ({"label": ["red"]}, "needs the columns"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(load, tmp_path, columns, says) -> None:
    with pytest.raises(InputError) as refused:
        load(labels=table(tmp_path / "l.csv", **columns))
    assert str(refused.value).startswith(f"labels={tmp_path / 'l.csv'}: ") and says in str(
        refused.value
    )


def test_an_unknown_class_is_refused_with_the_nearest(load, tmp_path) -> None:
    example = load().table("train")["example_id"].iloc[0]
    file = table(tmp_path / "l.csv", example_id=[example], label=["gren"])
    with pytest.raises(InputError, match="no such class 'gren'; did you mean green"):
        load(labels=file)


def test_a_missing_table_is_refused(load) -> None:
    with pytest.raises(InputError, match="labels=nowhere.csv: cannot be read"):
        load(labels="nowhere.csv")


def test_labels_that_leave_a_class_without_training_examples_are_refused(load, tmp_path) -> None:
    train = load().table("train")
    red = train[train["label_name"] == "red"]
    file = table(tmp_path / "l.csv", example_id=red["example_id"], label=["green"] * len(red))
    with pytest.raises(InputError, match="no training example of class 'red' is left"):
        load(labels=file)
