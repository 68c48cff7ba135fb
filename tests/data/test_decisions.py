"""Tables in which a person has said which images to keep, and which labels are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.data.decisions import LEFT_OUT, named_rows, read_decisions
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
        (
            {"example_id": ["nobody"], "label": ["red"]},
            "1 of its 1 rows name no image of this data set, e.g. 'nobody' in line 2",
        ),
        ({"file_name": ["red/99.png"], "label": ["red"]}, "'red/99.png' in line 2"),
        (
            {"example_id": ["x"], "class": ["red"]},
            "needs the columns example_id (or file_name) and label",
        ),
        ({"image": ["x"], "label": ["red"]}, "needs the columns"),
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
    with pytest.raises(InputError, match="no such class 'gren' .line 2.; did you mean green"):
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


# -- what spreadsheets do --------------------------------------------------------------------------

CELLS = st.text("abc 019.-/é", min_size=1).map(str.strip).filter(bool)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1),
    st.sampled_from(",;\t"),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_a_table_is_read_however_a_spreadsheet_saved_it(
    tmp_path_factory, rows, delimiter, mark, end
) -> None:
    file = tmp_path_factory.mktemp("table") / "table.csv"
    lines = [("file_name", "label"), *rows]
    file.write_bytes((mark + "".join(delimiter.join(row) + end for row in lines)).encode())
    found = read_decisions("labels=table.csv", str(file))
    assert list(zip(found["file_name"], found["label"])) == rows
    assert found["line"].tolist() == list(range(2, len(rows) + 2))


def test_an_id_that_became_a_number_is_found_by_its_file_name() -> None:
    examples = pd.DataFrame({"example_id": ["1e15", "0123"], "file_name": ["a.png", "b.png"]})
    table = pd.DataFrame({"example_id": ["1e15", "123"], "file_name": ["b.png", "b.png"]})
    assert named_rows(table.assign(line=0), examples, "keep=k.csv").tolist() == [0, 1]
    without = table[["example_id"]].assign(line=[2, 3])
    with pytest.raises(InputError, match="1 of its 2 rows .* '123' in line 3"):
        named_rows(without, examples, "keep=k.csv")


def test_an_image_without_a_name_is_not_named_by_an_empty_cell() -> None:
    examples = pd.DataFrame({"example_id": ["a"], "file_name": [""]})
    table = pd.DataFrame({"example_id": ["x"], "file_name": [""], "line": [2]})
    with pytest.raises(InputError, match="'x' in line 2"):
        named_rows(table, examples, "keep=k.csv")


# -- every split -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_label_of_any_split_can_be_corrected(load, tmp_path, split) -> None:
    before = load()
    own = before.table(split).query("label_name == 'red'").iloc[:1]
    after = load(labels=table(tmp_path / "l.csv", file_name=own["file_name"], label=["blue"]))
    changed = (before.examples["label"] != after.examples["label"]).to_numpy()
    assert before.examples["example_id"][changed].tolist() == own["example_id"].tolist()
    assert after.examples["label_name"][changed].tolist() == ["blue"]
    assert (after.examples["split"] == before.examples["split"]).all()


def test_a_table_with_splits_keeps_what_it_names_of_each_split(load, tmp_path) -> None:
    before = load()
    dropped = [before.table(split)["example_id"].iloc[0] for split in ("train", "test")]
    kept = before.examples[~before.examples["example_id"].isin(dropped)]
    named = kept[kept["split"] != "validation"]
    columns = {"example_id": named["example_id"], "split": named["split"]}
    after = load(keep=table(tmp_path / "keep.csv", **columns))
    is_left_out = (after.examples["split"] == LEFT_OUT).to_numpy()
    assert set(after.examples["example_id"][is_left_out]) == set(dropped)
    unchanged = after.examples["split"][~is_left_out] == before.examples["split"][~is_left_out]
    assert np.all(unchanged)


def test_a_table_of_another_division_is_refused_with_the_line(load, tmp_path) -> None:
    examples = load().examples
    columns = {"example_id": examples["example_id"], "split": examples["split"]}
    file = table(tmp_path / "keep.csv", **columns)
    with pytest.raises(InputError, match=r"line \d+ names a .* image .* another data_seed\?$"):
        load(keep=file, data_seed=1)


def test_a_split_without_a_class_is_refused(load, tmp_path) -> None:
    examples = load().examples
    named = examples[(examples["split"] != "test") | (examples["label_name"] != "red")]
    file = table(tmp_path / "k.csv", example_id=named["example_id"], split=named["split"])
    with pytest.raises(InputError, match="no test example of class 'red' is left"):
        load(keep=file)
