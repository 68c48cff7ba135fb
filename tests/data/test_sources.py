"""attribution/data/sources.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from image_folders import fails, png, sizes, write_classes
from PIL import Image

from attribution.data import sources
from attribution.data.decoding import decode_image
from attribution.data.sources import PART, digits, map_cells


def test_digits(load) -> None:
    loaded = load("digits", image_size=16, label_noise=0.1)
    assert loaded.class_names == tuple("0123456789")
    assert loaded.pixels().shape == (1797, 16, 16, 3) and loaded.pixels().dtype == np.uint8
    assert sizes(loaded) == [1079, 359, 359]
    assert (loaded.examples["file_name"] == "").all()
    assert loaded.examples["is_flipped"].sum() == round(0.1 * sizes(loaded)[0])
    assert loaded.pixels().max() > 250 and np.ptp(loaded.pixels().astype(int), axis=3).max() == 0


def test_folder_without_parts(load, root) -> None:
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / ".hidden").mkdir()
    loaded = load(root)
    assert loaded.class_names == ("cat", "dog") and sizes(loaded) == [15, 5, 5]
    columns = "example_id file_name split label label_name true_label is_flipped"
    assert list(loaded.examples) == columns.split()
    for row in loaded.examples.itertuples():
        assert row.label_name == Path(row.file_name).parent.name == loaded.class_names[row.label]
        expected = decode_image(Image.open(root / row.file_name), 8)
        assert (loaded.pixels()[row.Index] == expected).all()
    table = loaded.table("test")
    assert table["position"].tolist() == list(range(5))
    assert (table["label"].to_numpy() == loaded.labels("test")).all()
    assert loaded.labels("test").dtype == loaded.rows("test").dtype == np.int64


def test_folder_with_official_parts(load, tmp_path) -> None:
    root = tmp_path / "images"
    seed = write_classes(root / "train", {"cat": 5, "dog": 10})
    seed = write_classes(root / "test", {"cat": 2, "dog": 3}, seed)
    loaded = load(root)
    assert sizes(loaded) == [12, 3, 5]
    assert all(name.startswith("test/") for name in loaded.table("test")["file_name"])
    write_classes(root / "valid", {"cat": 1, "dog": 1}, seed)
    assert sizes(load(root)) == [15, 2, 5]


def test_a_validation_part_alone_is_the_validation_split(load, tmp_path) -> None:
    seed = write_classes(tmp_path / "i" / "train", {"a": 5, "b": 5})
    write_classes(tmp_path / "i" / "val", {"a": 2, "b": 2}, seed)
    loaded = load(tmp_path / "i")
    assert sizes(loaded) == [8, 4, 2]
    assert all(name.startswith("val/") for name in loaded.table("validation")["file_name"])


def test_class_folders_named_like_splits(load, tmp_path) -> None:
    write_classes(tmp_path / "i", {"train": 5, "test_bench": 5, "tram": 5})
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("test_bench", "train", "tram")
    assert sizes(loaded) == [9, 3, 3]


def test_odd_names_and_upper_case_suffixes(load, tmp_path) -> None:
    root = tmp_path / "im[1]ages"
    write_classes(root, {"a [x]": 3, "b*": 3, "ü ñ": 3})
    for file in root.glob("*/*.png"):
        file.rename(file.with_name(f"im[{file.stem}] #1?.PNG"))
    loaded = load(root)
    assert loaded.class_names == ("a [x]", "b*", "ü ñ") and len(loaded.examples) == 9


BROKEN = {
    "a link to nowhere": (lambda f: f.symlink_to("/nowhere/x.png"), "odd.png cannot be decoded"),
    "a link to itself": (lambda f: f.symlink_to(f), "odd.png cannot be decoded"),
    "no UTF-8": (lambda f: write_bytes_name(f), "a name that is not UTF-8"),
}  # fmt: skip


def write_bytes_name(file: Path) -> None:
    with open(os.fsencode(file.parent) + b"/\xff\xfe.png", "wb") as out:
        out.write(png(99))


@pytest.mark.parametrize(("make", "says"), BROKEN.values(), ids=BROKEN)
def test_an_image_that_would_be_left_out_without_a_word_is_told(load, root, make, says) -> None:
    make(root / "cat" / "odd.png")
    fails(load, root, f"dataset={root}", "cat", says)


def test_two_links_to_each_other_are_told(load, root) -> None:
    (root / "cat" / "a.png").symlink_to(root / "cat" / "b.png")
    (root / "cat" / "b.png").symlink_to(root / "cat" / "a.png")
    fails(load, root, "a.png and 1 others cannot be decoded", "cannot be read")


@pytest.mark.parametrize(
    "make",
    [
        lambda root: (root / "cat" / "loop").symlink_to(root / "cat"),
        lambda root: (root / "loop").symlink_to(root / "loop"),
        lambda root: os.mkfifo(root / "cat" / "pipe.png"),
        lambda root: (root / "cat" / "folder.png").mkdir(),
    ],
    ids=["a loop in a class", "a loop", "a pipe", "a folder"],
)
def test_what_is_no_file_is_left_out(load, root, make) -> None:
    make(root)
    assert len(load(root).examples) == 25


def test_a_link_to_the_whole_is_no_class(load, root) -> None:
    (root / "loop").symlink_to(root)
    assert load(root).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "name",
    ["a b", "new\nline", "é 😀", "\u202eevil", "-rf", "%s {x} $y$", "a.zip", "\x1b[31m", "http::x"],
)
def test_any_name_that_is_a_name_is_taken(load, tmp_path, name) -> None:
    root = tmp_path / "images"
    write_classes(root, {name: 3, "other": 3})
    for file in (root / name).iterdir():
        file.rename(file.with_name(f"{name} {file.name}"))
    loaded = load(root)
    assert set(loaded.class_names) == {name, "other"}
    assert {f for f in loaded.examples["file_name"] if f.startswith(name)} == {
        f"{name}/{file.name}" for file in (root / name).iterdir()
    }
    fails(load, root, "classes=x", classes="x,other")


def test_a_file_too_large_for_an_image_is_not_read(load, tmp_path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(sources.MOST_BYTES + 1)
    assert sources.content({"bytes": None, "path": str(tmp_path / "large.png")}) == b""


@pytest.mark.parametrize("most", [0, 1 << 30], ids=["forks", "threads"])
def test_cells_are_mapped_in_order(monkeypatch, most: int) -> None:
    monkeypatch.setattr(sources, "MANY", most)
    rows = np.random.default_rng(0).permutation(1797)[: 6 * PART + 1]

    def seen(first: int, cells: list) -> list:
        return [(i, cell["bytes"], os.getpid()) for i, cell in enumerate(cells, first)]

    found = list(map_cells(digits(), rows, seen, "test"))
    expected = [cell["bytes"] for cell in digits().cells(rows)]
    assert [result[:2] for result in found] == list(enumerate(expected))
    assert (os.getpid() in {pid for *_, pid in found}) == bool(most)
