"""Which column of a table names the images, which holds labels, and which parts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from image_folders import LABELS, NAMES, fails, labels_of, png, sizes

NUMBERS = [str(i) for i in range(12)]


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Twelve images called 0.png to 11.png, of which a column of numbers may name another one."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    for i in NUMBERS:
        (tmp_path / "set" / "images" / f"{i}.png").write_bytes(png(int(i)))
    return tmp_path / "set"


@pytest.mark.parametrize("ids", [NUMBERS[::-1], range(1, 13)])
@pytest.mark.parametrize("suffix", [".png", ""])
def test_numbers_of_rows_do_not_name_images(load, numbered, capsys, ids, suffix) -> None:
    columns = {"id": ids, "image": [i + suffix for i in NUMBERS], "label": LABELS}
    pd.DataFrame(columns).to_csv(numbered / "t.csv", index=False)
    assert labels_of(load(numbered)) == dict(zip(NUMBERS, LABELS))
    is_said = (
        "column image of t.csv; --image_column takes another one (id)" in capsys.readouterr().err
    )
    assert is_said == (suffix == "")


def test_the_column_of_masks_is_not_that_of_the_images(load, folder) -> None:
    (folder / "seen").mkdir()
    for i, name in enumerate(NAMES):
        (folder / "seen" / f"{name}.png").write_bytes(png(50 + i))
    columns = {kind: [f"{kind}/{name}.png" for name in NAMES] for kind in ("images", "seen")}
    table = pd.DataFrame({"mask": columns["images"], "photo": columns["seen"], "label": LABELS})
    table.to_csv(folder / "t.csv", index=False)
    loaded = load(folder, label_column="label")
    assert {Path(file).parent.name for file in loaded.examples["file_name"]} == {"seen"}


@pytest.mark.parametrize("number", [int, float])
def test_one_column_per_class_is_read_as_labels(load, folder, number) -> None:
    flags = {name: [number(label == name) for label in LABELS] for name in ("cat", "dog", "emu")}
    pd.DataFrame({"image": NAMES} | flags).to_csv(folder / "truth.csv", index=False)
    assert labels_of(load(folder)) == dict(zip(NAMES, LABELS))


def test_several_columns_that_may_be_labels_are_refused_with_the_option(load, folder) -> None:
    table = pd.DataFrame({"file": NAMES, "breed": LABELS, "colour": ["red", "blue"] * 6})
    table.to_csv(folder / "t.csv", index=False)
    fails(load, folder, "2 columns of t.csv may hold the labels", "--label_column", "breed, colour")
    assert load(folder, label_column="colour").class_names == ("blue", "red")


def test_a_column_of_parts_divides_the_images(load, folder) -> None:
    parts = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    columns = {"file": [f"{name}.png" for name in NAMES], "label": LABELS, "split": parts}
    pd.DataFrame(columns).to_csv(folder / "all.csv", index=False)
    loaded = load(folder)
    assert sizes(loaded) == [6, 3, 3]
    test = loaded.table("test")["file_name"].map(lambda file: Path(file).stem)
    assert set(test) == set(NAMES[9:])


@pytest.mark.parametrize(
    ("column", "names", "expected"),
    [
        ("split", ["train ", "test", "extra"], [6, 3]),
        ("Usage", ["Training", "PublicTest", ""], [6, 3]),
        ("is_train", ["1", "0", "0"], [6, 6]),
        ("split", ["0", "1", "2"], [12, 0]),
    ],
)
def test_a_column_of_parts_in_other_words(load, folder, capsys, column, names, expected) -> None:
    parts = [names[0]] * 6 + [names[1]] * 3 + [names[2]] * 3
    table = pd.DataFrame({"file": [f"{n}.png" for n in NAMES], "label": LABELS, column: parts})
    table.to_csv(folder / "all.csv", index=False)
    loaded = load(folder, val_fraction=0.3)
    official = {Path(file).stem for file in loaded.table("test")["file_name"]}
    lines = capsys.readouterr().err
    if expected[1]:
        assert official == set(NAMES[6 : 6 + expected[1]])
        assert ("(3 images): is not used" in lines) == (names[1] != names[2])
    else:
        assert "column split of all.csv names no parts and is not used: 0, 1, 2" in lines
    assert len(loaded.examples) == sum(expected)


def test_labels_that_sound_like_parts_are_labels(load, folder) -> None:
    for column, labels in (
        ("is_train_station", ["0", "1"] * 6),
        ("label", ["freight_train", "crash_test", "car"] * 4),
        ("kind", ["train", "test", "car"] * 4),
    ):
        table = pd.DataFrame({"file": [f"{n}.png" for n in NAMES], column: labels})
        table.to_csv(folder / "t.csv", index=False)
        assert labels_of(load(folder, label_column=column)) == dict(zip(NAMES, labels))


def test_each_table_may_name_its_own_part(load, folder, capsys) -> None:
    for part, rows in (("train", slice(0, 9)), ("test", slice(9, 12))):
        table = pd.DataFrame({"file": NAMES[rows], "label": LABELS[rows], "split": part})
        table.to_csv(folder / f"{part[::-1]}.csv", index=False)
    assert len(load(folder).rows("test")) == 3
    assert "names no parts" not in capsys.readouterr().err
