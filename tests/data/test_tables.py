"""Labels in tables beside the images, as Kaggle, Hugging Face and people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from image_folders import fails, png, sizes, write_classes

NAMES = [f"im{i:02d}" for i in range(12)]
LABELS = ["cat", "dog", "emu"] * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in a folder `images`, without labels."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (tmp_path / "set" / "images" / f"{name}.png").write_bytes(png(i))
    return tmp_path / "set"


def labels_of(loaded) -> dict[str, str]:
    examples = loaded.examples
    return {Path(f).stem: name for f, name in zip(examples["file_name"], examples["label_name"])}


WRITTEN = {
    "ids without suffix": ("train.csv", {"id": NAMES, "breed": LABELS}, ","),
    "names, semicolons": ("labels.csv", {"file": [f"{n}.png" for n in NAMES], "class": LABELS}, ";"),
    "paths": ("l.tsv", {"path": [f"images/{n}.png" for n in NAMES], "label": LABELS}, "\t"),
    "windows paths": ("l.csv", {"file": [f"images\\{n}.png" for n in NAMES], "label": LABELS}, ","),
    "more columns": (
        "meta.csv", {"file_name": [f"{n}.png" for n in NAMES], "width": range(12), "label": LABELS}, ",",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_table_beside_the_images_gives_their_labels(load, folder, kind) -> None:
    name, columns, delimiter = WRITTEN[kind]
    pd.DataFrame(columns).to_csv(folder / name, sep=delimiter, index=False, encoding="utf-8-sig")
    loaded = load(folder)
    assert loaded.class_names == ("cat", "dog", "emu")
    assert labels_of(loaded) == dict(zip(NAMES, LABELS))


def test_other_kinds_of_tables(load, folder, tmp_path) -> None:
    expected = dict(zip(NAMES, LABELS))
    files = [f"images/{name}.png" for name in NAMES]
    written = {
        "list.txt": "".join(f"{file} {label}\n" for file, label in zip(files, LABELS)),
        "labels.json": json.dumps(dict(zip(files, LABELS))),
        "metadata.jsonl": "".join(
            json.dumps({"file_name": file, "label": label}) + "\n"
            for file, label in zip(files, LABELS)
        ),
    }
    for name, text in written.items():
        (folder / name).write_text(text)
        assert labels_of(load(folder)) == expected
        (folder / name).unlink()
    pd.DataFrame({"file_name": files, "label": LABELS}).to_parquet(folder / "labels.parquet")
    assert labels_of(load(folder)) == expected


@pytest.mark.parametrize("number", [int, float])
def test_one_column_per_class_is_read_as_labels(load, folder, number) -> None:
    flags = {name: [number(label == name) for label in LABELS] for name in ("cat", "dog", "emu")}
    pd.DataFrame({"image": NAMES} | flags).to_csv(folder / "truth.csv", index=False)
    assert labels_of(load(folder)) == dict(zip(NAMES, LABELS))


def test_a_column_of_parts_divides_the_images(load, folder) -> None:
    parts = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    columns = {"file": [f"{name}.png" for name in NAMES], "label": LABELS, "split": parts}
    pd.DataFrame(columns).to_csv(folder / "all.csv", index=False)
    loaded = load(folder)
    assert sizes(loaded) == [6, 3, 3]
    test = loaded.table("test")["file_name"].map(lambda file: Path(file).stem)
    assert set(test) == set(NAMES[9:])


def test_one_table_for_each_part(load, folder) -> None:
    for part, rows in (("train", slice(0, 9)), ("test", slice(9, 12))):
        table = pd.DataFrame({"file": NAMES[rows], "label": LABELS[rows]})
        table.to_csv(folder / f"{part}.csv", index=False)
    loaded = load(folder)
    assert len(loaded.rows("test")) == 3 and labels_of(loaded) == dict(zip(NAMES, LABELS))


def test_several_columns_that_may_be_labels_are_refused_with_the_option(load, folder) -> None:
    table = pd.DataFrame({"file": NAMES, "breed": LABELS, "colour": ["red", "blue"] * 6})
    table.to_csv(folder / "t.csv", index=False)
    fails(load, folder, "2 columns of t.csv may hold the labels", "--label_column", "breed, colour")
    assert load(folder, label_column="colour").class_names == ("blue", "red")


def test_rows_without_an_image_and_images_without_a_row_are_counted(load, folder, capsys) -> None:
    table = pd.DataFrame({"id": [*NAMES[:10], "gone"], "label": [*LABELS[:10], "cat"]})
    table.to_csv(folder / "t.csv", index=False)
    assert len(load(folder).examples) == 10
    lines = capsys.readouterr().err
    assert "1 rows of t.csv name no image, such as 'gone'" in lines
    assert "2 images are in no table with labels" in lines


def test_an_image_with_two_labels_is_refused(load, folder) -> None:
    table = pd.DataFrame({"id": [*NAMES, NAMES[0]], "label": [*LABELS, "dog"]})
    table.to_csv(folder / "t.csv", index=False)
    fails(load, folder, "1 images have several labels", "im00.png (cat, dog")


def test_a_table_against_the_folders_is_refused_with_both_options(load, root) -> None:
    files = sorted(file.name for file in root.rglob("*.png"))
    table = pd.DataFrame({"file": files, "label": ["x", "y", "z"] * 8 + ["x"]})
    table.to_csv(root / "labels.csv", index=False)
    fails(load, root, "give different classes", "--class_depth 1", "--label_column")
    assert load(root, class_depth=1).class_names == ("cat", "dog")
    assert load(root, label_column="label").class_names == ("x", "y", "z")


def test_lists_of_parts_divide_class_folders(load, tmp_path) -> None:
    root = tmp_path / "set"
    write_classes(root / "images", {"cat": 6, "dog": 6})
    files = sorted(str(file.relative_to(root / "images")) for file in root.rglob("*.png"))
    test = [file for i, file in enumerate(files) if i % 3 == 0]
    (root / "train.txt").write_text("\n".join(file for file in files if file not in test))
    (root / "test.txt").write_text("\n".join(test))
    loaded = load(root)
    assert loaded.class_names == ("cat", "dog")
    own = set(loaded.table("test")["file_name"])
    assert {file.removeprefix("images/") for file in own} == set(test)


def test_a_folder_without_labels_says_what_it_holds(load, folder) -> None:
    fails(load, folder, "neither class subfolders with images, nor a table", "images (12 images)")
    (folder / "ages.csv").write_text("person,age\nx,1\n")
    fails(load, folder, "neither class subfolders with images, nor a table", "tables: ages.csv")
    (folder / "instances_train.json").write_text("{}")
    fails(load, folder, "COCO", "one label per image")


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


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_tables_as_spreadsheets_write_them(load, folder, capsys, encoding) -> None:
    labels = [name.replace("cat", "Bär").replace("dog", "Bör") for name in LABELS]
    text = "".join(f"{name}.png,{label}\n" for name, label in zip(NAMES, labels))
    (folder / "t.csv").write_bytes(f"file,label\n{text}".encode(encoding))
    assert labels_of(load(folder)) == dict(zip(NAMES, labels))
    assert ("read as cp1252" in capsys.readouterr().err) == (encoding == "cp1252")


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


def test_names_may_differ_in_case_and_accents(load, tmp_path) -> None:
    (tmp_path / "set").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "set" / f"É{name}.PNG").write_bytes(png(i))  # composed
    rows = "".join(f"é{name}.png , {label} \n" for name, label in zip(NAMES, LABELS))
    (tmp_path / "set" / "LABELS.CSV").write_text(f"file,label\n{rows}")
    found = labels_of(load(tmp_path / "set"))
    assert found == {f"É{name}": label for name, label in zip(NAMES, LABELS)}


def test_a_label_of_several_words_and_one_that_is_unknown(load, folder) -> None:
    rows = [f"{name}.png {label}" for name, label in zip(NAMES, LABELS)]
    (folder / "t.txt").write_text("\n".join(rows).replace("dog", "big dog"))
    assert load(folder).class_names == ("big dog", "cat", "emu")
    (folder / "t.txt").write_text("\n".join(rows).replace("dog", "NaN"))
    fails(load, folder, "4 of 12 images have no label")
    table = pd.DataFrame({"image": NAMES, "smiles": ["1", "-1"] * 6})
    table.to_csv(folder / "t.csv", index=False)
    (folder / "t.txt").unlink()
    assert load(folder).class_names == ("-1", "1")


def test_a_clear_table_is_taken_and_an_unclear_one_is_not(load, folder, capsys) -> None:
    more = {"sex": ["f", "m"] * 6, "place": ["a", "b", "c"] * 4}
    pd.DataFrame({"image": NAMES} | more).to_csv(folder / "about.csv", index=False)
    pd.DataFrame({"image": NAMES, "label": LABELS}).to_csv(folder / "truth.csv", index=False)
    assert labels_of(load(folder)) == dict(zip(NAMES, LABELS))
    assert "tables without labels are not used: about.csv" in capsys.readouterr().err
    part = pd.DataFrame({"image": NAMES[:9], "label": LABELS[:9]})
    part.to_csv(folder / "truth.csv", index=False)  # the other one may have the labels of the rest
    fails(load, folder, "2 columns of about.csv may hold the labels", "sex, place")


def test_a_table_without_labels_beside_class_folders(load, root) -> None:
    files = sorted(file.name for file in root.rglob("*.png"))
    more = {"camera": ["a", "b", "c"] * 8 + ["c"], "iso": [100, 200] * 12 + [200]}
    pd.DataFrame({"file": files} | more).to_csv(root / "exif.csv", index=False)
    fails(load, root, "camera, iso", "or --class_depth 1 for the class folders")
    assert load(root, class_depth=1).class_names == ("cat", "dog")
