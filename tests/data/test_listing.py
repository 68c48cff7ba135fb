"""attribution/data/listing.py."""

from __future__ import annotations

from image_folders import fails, png, write_classes


def test_relative_folder_and_digits_folder(load, root, monkeypatch) -> None:
    monkeypatch.chdir(root.parent)
    assert len(load("images").examples) == 25
    root.rename(root.with_name("digits"))
    assert len(load("digits").examples) == 1797 and len(load("./digits").examples) == 25


def test_missing_folder_and_file(load, tmp_path, root) -> None:
    fails(load, tmp_path / "nowhere", "dataset=", "missing folder")
    fails(load, "./nowhere/at/all", "missing folder")
    fails(load, "not an id", "missing folder")
    fails(load, root / "cat" / "0.png", "is a file")
    (tmp_path / "empty").mkdir()
    fails(load, tmp_path / "empty", "neither class subfolders", "Hub format")
    fails(load, root / "cat", "neither class subfolders")


def test_bad_classes(load, root) -> None:
    fails(load, root, "classes=cta", "did you mean cat", classes="cta,dog")
    fails(load, root, "1 class", "at least 2", classes="cat")
    (root / "eel").mkdir()
    assert load(root).class_names == ("cat", "dog")  # a folder without images is no class
    assert load(root, classes="dog,cat").class_names == ("cat", "dog")


def test_too_few_images(load, tmp_path) -> None:
    write_classes(tmp_path / "three", {"a": 9, "b": 2})
    stop = {"small_classes": "stop"}
    fails(load, tmp_path / "three", "class 'b'", "2", "at least 3", **stop)
    seed = write_classes(tmp_path / "two" / "train", {"a": 9, "b": 1})
    write_classes(tmp_path / "two" / "test", {"a": 2, "b": 2}, seed)
    fails(load, tmp_path / "two", "class 'b'", "1", "at least 2", **stop)
    seed = write_classes(tmp_path / "untested" / "train", {"a": 9, "b": 5})
    write_classes(tmp_path / "untested" / "test", {"a": 2}, seed)
    fails(load, tmp_path / "untested", "the test part lacks the class 'b'")
    write_classes(tmp_path / "copies", {"a": 9, "b": 1})
    for i in range(4):
        (tmp_path / "copies" / "b" / f"copy{i}.png").write_bytes(png(9))
    fails(load, tmp_path / "copies", "class 'b'", "1 different", "at least 3", **stop)


def test_cache_dir_that_cannot_be_written(load, tmp_path, root) -> None:
    (tmp_path / "file").write_text("")
    fails(load, root, "cache_dir=", "writable", cache_dir=str(tmp_path / "file"))


def test_copies_never_lie_on_two_sides(load, tmp_path) -> None:
    root = tmp_path / "i"
    seed = write_classes(root / "train", {"a": 8, "b": 8})
    write_classes(root / "test", {"a": 3, "b": 3}, seed)
    (root / "train" / "a" / "leak.png").write_bytes(png(seed))
    (root / "train" / "b" / "leak.png").write_bytes(png(seed))  # under another label, too
    for i in range(3):
        (root / "train" / "a" / f"again{i}.png").write_bytes(png(0))
    (root / "train" / "b" / "again.png").write_bytes(png(0))
    loaded = load(root)
    assert loaded.dropped_duplicates == 2
    assert not loaded.examples["file_name"].str.contains("leak").any()
    content = loaded.examples.assign(content=loaded.examples["example_id"].str[:16])
    assert (content.groupby("content")["split"].nunique() == 1).all()
    copies = content[content["content"].duplicated(keep=False)]
    assert [name[16:] for name in copies["example_id"]] == ["", "-1", "-2", "-3", "-4"]
    assert loaded.examples["example_id"].is_unique


def test_a_class_that_shares_its_images_has_too_few_of_its_own(load, root) -> None:
    """An image of two classes counts for the first alone, and none is left for some split."""
    write_classes(root, {"zebra": 3}, 300)
    first = sorted(folder for folder in root.iterdir() if folder.name != "zebra")[0]
    for file in sorted((root / "zebra").iterdir())[:2]:
        (first / f"z{file.name}").write_bytes(file.read_bytes())
    says = "class 'zebra' has 1 different images of its own", "at least 3"
    fails(load, root, *says, small_classes="stop")
