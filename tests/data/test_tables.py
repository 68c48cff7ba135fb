"""Labels in tables beside the images, as Kaggle, Hugging Face and people write them."""

from __future__ import annotations

import pandas as pd
from image_folders import LABELS, NAMES, fails, labels_of, write_classes


def test_one_table_for_each_part(load, folder) -> None:
    for part, rows in (("train", slice(0, 9)), ("test", slice(9, 12))):
        table = pd.DataFrame({"file": NAMES[rows], "label": LABELS[rows]})
        table.to_csv(folder / f"{part}.csv", index=False)
    loaded = load(folder)
    assert len(loaded.rows("test")) == 3 and labels_of(loaded) == dict(zip(NAMES, LABELS))


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
