"""Class folders as people have them: parts, levels, and what lies beside the images."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import fails, png, sizes, write_classes

from attribution.config import resolve
from attribution.data.listing import list_data

CLASSES = {"cat": 5, "dog": 5}


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Validation", "Test"),
        ("training", "dev", "testing"),
        ("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"),
        ("data/train", "data/valid", "data/test"),
        ("images/train", "images/val", "images/eval"),
        ("train/images", "val/images", "test/images"),
    ],
)
def test_parts_are_found_under_the_names_that_people_give_them(load, tmp_path, names) -> None:
    seed = 0
    for name, count in zip(names, (6, 2, 3)):
        seed = write_classes(tmp_path / "i" / name, dict.fromkeys(CLASSES, count), seed)
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("cat", "dog") and sizes(loaded) == [12, 4, 6]


def test_parts_below_the_classes_are_not_classes(load, tmp_path) -> None:
    counts = {
        "cat/train": 6,
        "cat/val": 2,
        "cat/test": 3,
        "dog/train": 5,
        "dog/val": 1,
        "dog/test": 2,
    }
    write_classes(tmp_path / "i" / "data", counts)
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("cat", "dog") and sizes(loaded) == [11, 3, 5]
    assert {Path(file).parent.name for file in loaded.table("test")["file_name"]} == {"test"}


def test_a_test_part_without_labels_is_said_and_not_used(load, tmp_path, capsys) -> None:
    write_classes(tmp_path / "i" / "train", CLASSES)
    (tmp_path / "i" / "test").mkdir()
    for i in range(4):
        (tmp_path / "i" / "test" / f"{i}.png").write_bytes(png(100 + i))
    assert sizes(load(tmp_path / "i")) == [6, 2, 2]
    assert "test (4 images)" in capsys.readouterr().err


def test_the_deepest_folders_with_images_are_classes_unless_a_level_is_given(
    load, tmp_path, capsys
) -> None:
    fruit = {"Apple/Granny Smith": 4, "Apple/Jonagold": 4, "Citrus/Lime": 4}
    write_classes(tmp_path / "i" / "Fruit", fruit)
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("Granny Smith", "Jonagold", "Lime")
    assert "--class_depth N" in capsys.readouterr().err
    upper = load(tmp_path / "i", class_depth=2)
    assert upper.class_names == ("Apple", "Citrus") and sum(sizes(upper)) == 12


def test_equal_names_on_different_shelves_are_told_apart(load, tmp_path) -> None:
    write_classes(tmp_path / "i", {"Fruit/Red": 4, "Shoes/Red": 4})
    assert load(tmp_path / "i").class_names == ("Fruit/Red", "Shoes/Red")


def test_images_below_a_class_folder_belong_to_its_class_and_are_counted(
    load, tmp_path, capsys
) -> None:
    seed = write_classes(tmp_path / "i", CLASSES)
    write_classes(tmp_path / "i" / "cat", {"more": 3}, seed)
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("cat", "dog") and sum(sizes(loaded)) == 13
    assert "cat/more (3 images)" in capsys.readouterr().err


def test_what_is_not_used_is_counted_and_named(load, root, capsys) -> None:
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/cat/._1.png", "scripts/run.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(1))
    (root / "cat" / ".DS_Store").write_bytes(b"")
    assert load(root).class_names == ("cat", "dog")
    lines = capsys.readouterr().err
    assert "2 files are not images and are not used: 1 .md, 1 .py" in lines
    assert "3 hidden files or folders left out" in lines and "__MACOSX" in lines
    assert "folders without images left out: scripts" in lines


def test_masks_beside_images_are_no_class(load, tmp_path, capsys) -> None:
    write_classes(
        tmp_path / "i", {"images/cat": 5, "images/dog": 5, "masks/cat": 5, "masks/dog": 5}
    )
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("cat", "dog") and sum(sizes(loaded)) == 10
    assert "masks" in capsys.readouterr().err


def test_a_tiny_class_is_left_out_in_a_line_or_refused(load, root, capsys) -> None:
    write_classes(root, {"quince": 2}, 500)
    assert load(root).class_names == ("cat", "dog")
    assert "left out: quince (2); --small_classes stop" in capsys.readouterr().err
    fails(load, root, "class 'quince'", "at least 3", small_classes="stop")


def test_numbers_are_sorted_as_text_and_that_is_said(load, tmp_path, capsys) -> None:
    write_classes(tmp_path / "i", {"10": 3, "2": 3})
    assert load(tmp_path / "i").class_names == ("10", "2")
    assert "sorted as text: 10, 2" in capsys.readouterr().err


def test_parts_beside_the_classes(load, tmp_path, capsys) -> None:
    write_classes(tmp_path / "i", CLASSES | {"valid/cat": 2, "valid/dog": 2})
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("cat", "dog") and len(loaded.rows("validation")) == 4
    write_classes(tmp_path / "k", CLASSES | {"test": 3})
    assert load(tmp_path / "k").class_names == ("cat", "dog")
    assert "not used: test (3 images)" in capsys.readouterr().err
    assert load(tmp_path / "k", class_depth=1).class_names == ("cat", "dog", "test")


def test_parts_beside_a_shelf_of_classes_and_in_another_case(load, tmp_path) -> None:
    shelf = {"Fruit/Apple": 5, "Fruit/Pear": 5, "test/Fruit/Apple": 2, "test/Fruit/Pear": 2}
    write_classes(tmp_path / "i", shelf)
    write_classes(tmp_path / "j", CLASSES | {"Test/Cat": 2, "Test/Dog": 2})
    for folder, names in (("i", ("Apple", "Pear")), ("j", ("cat", "dog"))):
        loaded = load(tmp_path / folder)
        assert loaded.class_names == names and len(loaded.rows("test")) == 4


def test_flat_parts_are_no_classes(load, tmp_path) -> None:
    write_classes(tmp_path / "i", {"train": 6, "test": 6, "extra": 6})
    fails(load, tmp_path / "i", "holds neither class subfolders", "extra (6 images), test")
    for names in (["invalid", "valid"], ["car", "crash_test", "freight_train"]):
        write_classes(tmp_path / names[0], dict.fromkeys(names, 5))
        assert load(tmp_path / names[0]).class_names == tuple(names)


def test_classes_that_differ_in_case_between_parts_are_one(load, tmp_path) -> None:
    write_classes(
        tmp_path / "i", {"train/Cat": 5, "train/Thé": 5, "test/cat": 2, "test/The\u0301": 3}
    )
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("Cat", "Thé") and len(loaded.rows("test")) == 5


def test_the_same_classes_in_several_folders_are_refused_with_both_readings(load, tmp_path) -> None:
    write_classes(tmp_path / "i", {f"fold{k}/{name}": 3 for k in (1, 2) for name in CLASSES})
    words = ("called cat, dog lie in each of fold1, fold2", "--class_depth -1", "--class_depth N")
    fails(load, tmp_path / "i", *words)
    loaded = load(tmp_path / "i", class_depth=-1)
    assert loaded.class_names == ("cat", "dog") and sum(sizes(loaded)) == 12
    assert load(tmp_path / "i", class_depth=1).class_names == ("fold1", "fold2")


def test_masks_in_the_folder_of_their_images_are_left_out(load, tmp_path, capsys) -> None:
    write_classes(tmp_path / "i", {"cat": 5, "dog": 5, "with_mask": 5})
    for i, image in enumerate(sorted((tmp_path / "i" / "cat").iterdir())):
        image.with_name(f"{image.stem}_Mask_1.png").write_bytes(png(100 + i))
    loaded = load(tmp_path / "i")
    assert sum(sizes(loaded)) == 15 and loaded.class_names == ("cat", "dog", "with_mask")
    assert "masks or annotations left out: cat (5 files such as" in capsys.readouterr().err


NAMES = st.text(st.sampled_from("ab,'\"%é #&<"), min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(NAMES, st.integers(3, 5), min_size=2, max_size=4))
def test_classes_keep_their_names_and_images(tmp_path_factory, classes) -> None:
    """Every image is listed once, under the name of its folder."""
    folder = tmp_path_factory.mktemp("any")
    write_classes(folder / "i", classes)
    settings = {"dataset": str(folder / "i"), "image_size": 8, "cache_dir": str(folder / "cache")}
    listing = list_data(resolve(settings))
    assert listing.names == sorted(classes)
    for label, name in enumerate(listing.names):
        own = listing.table[listing.table["label"] == label]
        assert len(own) == classes[name]
        assert {Path(file).parent.name for file in own["file_name"]} == {name}


def test_classes_that_only_the_test_part_has_are_refused_with_the_option_that_reads_them(
    load, tmp_path, capsys
) -> None:
    """As in MVTec: defects in the test part alone, and masks of them in a folder next to it."""
    root = tmp_path / "i"
    seed = write_classes(root / "train", {"good": 6})
    seed = write_classes(root / "test", {"good": 3, "crack": 4}, seed)
    write_classes(root / "ground_truth", {"crack": 4}, seed)
    fails(load, root, "class 'crack' has 0 ", "add --resplit to divide all images anew")
    loaded = load(root, resplit="yes")
    assert loaded.class_names == ("crack", "good") and len(loaded.examples) == 13
    assert "not used: ground_truth/crack (4 images)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["class_to_idx.json", "classes.txt"])
def test_a_list_of_class_names_next_to_class_folders_is_counted_and_changes_nothing(
    load, root, capsys, name
) -> None:
    before = load(root).examples
    (root / name).write_text('{"cat": 0, "dog": 1}' if name.endswith("json") else "cat\ndog\n")
    assert load(root).examples.equals(before)
    assert "1 files are not images and are not used" in capsys.readouterr().err
