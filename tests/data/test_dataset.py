"""Data: sources, canonical order, splits, planted noise, pixel cache, decoding, augmentation."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attribution.config import resolve
from attribution.data import dataset as data
from attribution.data import pixel_cache as pixels
from attribution.data.dataset import SPLITS, ImageData, load_data
from attribution.data.pixel_cache import augment_batch, decode_image, draw_augmentation, to_batch
from attribution.errors import InputError

FOOD = Path(__file__).resolve().parents[3] / "shared" / "data" / "food101-10"


def picture(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def write_classes(folder: Path, counts: dict[str, int], first: int = 0) -> int:
    """Class subfolders with that many different images; returns the next unused seed."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            (folder / name / f"{first}.png").write_bytes(png(first))
            first += 1
    return first


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_classes(tmp_path / "images", {"cat": 10, "dog": 15})
    return tmp_path / "images"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ImageData]:
    def run(dataset: str | Path, **given) -> ImageData:
        given = {"image_size": 8, "cache_dir": str(tmp_path / "cache"), **given}
        return load_data(resolve({"dataset": str(dataset), **given}))

    return run


@pytest.fixture
def decodes(monkeypatch) -> list[int]:
    calls: list[int] = []
    original = pixels.decode_image
    monkeypatch.setattr(pixels, "decode_image", lambda *a: (calls.append(1), original(*a))[1])
    return calls


def sizes(loaded: ImageData) -> list[int]:
    return [len(loaded.rows(split)) for split in SPLITS]


def fails(load, dataset, *words: str, **given) -> None:
    with pytest.raises(InputError) as caught:
        load(dataset, **given)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Sources


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


def test_validation_part_alone_is_the_test_split(load, tmp_path) -> None:
    seed = write_classes(tmp_path / "i" / "train", {"a": 5, "b": 5})
    write_classes(tmp_path / "i" / "val", {"a": 2, "b": 2}, seed)
    loaded = load(tmp_path / "i")
    assert sizes(loaded) == [8, 2, 4]
    assert all(name.startswith("val/") for name in loaded.table("test")["file_name"])


def test_class_folders_named_like_splits(load, tmp_path) -> None:
    write_classes(tmp_path / "i", {"train": 5, "test_bench": 5, "validation": 5})
    loaded = load(tmp_path / "i")
    assert loaded.class_names == ("test_bench", "train", "validation")
    assert sizes(loaded) == [9, 3, 3]


def test_odd_names_and_upper_case_suffixes(load, tmp_path) -> None:
    root = tmp_path / "im[1]ages"
    write_classes(root, {"a [x]": 3, "b*": 3, "ü ñ": 3})
    for file in root.glob("*/*.png"):
        file.rename(file.with_name(f"im[{file.stem}] #1?.PNG"))
    loaded = load(root)
    assert loaded.class_names == ("a [x]", "b*", "ü ñ") and len(loaded.examples) == 9


def hub_dataset(first: int, counts: list[int], labels: bool = True) -> Any:
    import datasets

    ids = [label for label, count in enumerate(counts) for _ in range(count)]
    images = [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(len(ids))]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["pizza", "apple"])
    )
    columns = {"image": images, "label": ids if labels else [-1] * len(ids)}
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(folder: Path, **parts) -> Path:
    for name, part in parts.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def test_hub_format_with_train_and_validation(load, tmp_path) -> None:
    folder = write_parquet(
        tmp_path / "hub", train=hub_dataset(0, [10, 5]), validation=hub_dataset(50, [3, 2])
    )
    loaded = load(folder)
    assert loaded.class_names == ("pizza", "apple") and sizes(loaded) == [12, 3, 5]
    assert set(loaded.table("test")["file_name"]) == {f"{i}.png" for i in range(50, 55)}


def test_unlabelled_test_part_is_not_used(load, tmp_path) -> None:
    folder = write_parquet(
        tmp_path / "hub",
        train=hub_dataset(0, [5, 5]),
        test=hub_dataset(30, [2, 2], labels=False),
        validation=hub_dataset(50, [3, 2]),
    )
    assert set(load(folder).table("test")["file_name"]) == {f"{i}.png" for i in range(50, 55)}


def test_saved_to_disk_and_same_content_as_a_folder(load, tmp_path, root) -> None:
    import datasets

    hub_dataset(0, [6, 6]).save_to_disk(tmp_path / "one")
    parts = {"train": hub_dataset(0, [6, 6]), "test": hub_dataset(50, [2, 2])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    assert sizes(load(tmp_path / "one")) == [8, 2, 2]
    assert sizes(load(tmp_path / "dict")) == [10, 2, 4]
    for index, name in enumerate(("pizza", "apple")):
        (tmp_path / "same" / name).mkdir(parents=True)
        for i in range(6 * index, 6 * index + 6):
            (tmp_path / "same" / name / f"x{i}.png").write_bytes(png(i))
    same = load(tmp_path / "same")  # only the order of the classes differs
    ids = [set(d.table("test")["example_id"]) for d in (same, load(tmp_path / "one"))]
    assert ids[0] == ids[1]


def test_columns_found_named_or_refused(load, tmp_path) -> None:
    import datasets

    part = hub_dataset(0, [6, 6])
    thumbs = part.with_format("arrow")[:]["image"].to_pylist()
    part = part.add_column("thumb", thumbs, feature=datasets.Image())
    part = part.add_column("kind", ["b", "a"] * 6).add_column("price", [0.5] * 12)
    folder = write_parquet(tmp_path / "hub", train=part)
    fails(load, folder, "image_column", "2 columns", "image, thumb")
    fails(load, folder, "image_column=imgae", "did you mean image", image_column="imgae")
    fails(load, folder, "label_column=price", image_column="image", label_column="price")
    fails(load, folder, "image_column=price", "images", image_column="price")
    loaded = load(folder, image_column="image", label_column="kind")
    assert loaded.class_names == ("a", "b")
    write_parquet(tmp_path / "plain", train=part.remove_columns(["label", "thumb"]))
    fails(load, tmp_path / "plain", "label_column", "0 columns", "kind")


def test_bad_image_and_unlabelled_part_of_a_hub_format(load, tmp_path) -> None:
    import datasets

    part = hub_dataset(0, [6, 6])
    cells = part.with_format("arrow")[:]["image"].to_pylist()
    cells[3] = {"bytes": b"no image", "path": None}
    columns = {"image": cells, "label": part["label"][:]}
    part = datasets.Dataset.from_dict(columns, features=part.features)
    test = hub_dataset(50, [2, 2]).remove_columns("label")
    datasets.DatasetDict({"test": test, "train": part}).save_to_disk(tmp_path / "saved")
    fails(load, tmp_path / "saved", "row 3 (train) cannot be decoded")
    loaded = load(tmp_path / "saved", on_bad_image="skip")
    assert loaded.skipped == ("row 3 (train)",) and sum(sizes(loaded)) == 11
    labelled = {"test": hub_dataset(50, [2, 2]), "train": part}
    datasets.DatasetDict(labelled).save_to_disk(tmp_path / "second")
    fails(load, tmp_path / "second", "row 3 (train) cannot be decoded")
    holes = datasets.Dataset.from_dict(
        {"image": cells, "label": [-1] + [0, 1] * 5 + [None]}, features=part.features
    )
    holes.save_to_disk(tmp_path / "holes")
    fails(load, tmp_path / "holes", "2 images have no label")


def test_relative_folder_and_digits_folder(load, root, monkeypatch) -> None:
    monkeypatch.chdir(root.parent)
    assert len(load("images").examples) == 25
    root.rename(root.with_name("digits"))
    assert len(load("digits").examples) == 1797 and len(load("./digits").examples) == 25


# Bad input


def test_missing_folder_and_file(load, tmp_path, root) -> None:
    fails(load, tmp_path / "nowhere", "dataset=", "missing folder")
    fails(load, "./nowhere/at/all", "missing folder")
    fails(load, "not an id", "missing folder")
    fails(load, root / "cat" / "0.png", "is a file")
    (tmp_path / "empty").mkdir()
    fails(load, tmp_path / "empty", "neither class subfolders", "Hub format")
    fails(load, root / "cat", "neither class subfolders")


def test_a_file_that_changes_while_it_is_read_is_named(load, root, tmp_path, monkeypatch) -> None:
    list_data = data.list_data

    def then_changed(config: Any) -> Any:
        listing = list_data(config)
        sorted(root.rglob("*.png"))[0].write_bytes(png(12345))
        return listing

    monkeypatch.setattr(data, "list_data", then_changed)
    fails(load, root, sorted(root.rglob("*.png"))[0].name, "changed while it was read")
    monkeypatch.setattr(data, "list_data", list_data)
    assert load(root).pixels().shape[0]


def test_hub_out_of_reach(tmp_path) -> None:
    code = (
        "from attribution.config import resolve; from attribution.data.dataset import load_data;"
        f"load_data(resolve({{'dataset': 'nobody/nothing', 'cache_dir': {str(tmp_path)!r}}}))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path.cwd()
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError: dataset=nobody/nothing: cannot be loaded" in last and "a folder" in last


def test_bad_classes(load, root) -> None:
    fails(load, root, "classes=cta", "did you mean cat", classes="cta,dog")
    fails(load, root, "1 class", "at least 2", classes="cat")
    (root / "eel").mkdir()
    fails(load, root, "empty class 'eel'")
    assert load(root, classes="dog,cat").class_names == ("cat", "dog")


def test_too_few_images(load, tmp_path) -> None:
    write_classes(tmp_path / "three", {"a": 9, "b": 2})
    fails(load, tmp_path / "three", "class 'b'", "2", "at least 3")
    seed = write_classes(tmp_path / "two" / "train", {"a": 9, "b": 1})
    write_classes(tmp_path / "two" / "test", {"a": 2, "b": 2}, seed)
    fails(load, tmp_path / "two", "class 'b'", "1", "at least 2")
    seed = write_classes(tmp_path / "untested" / "train", {"a": 9, "b": 5})
    write_classes(tmp_path / "untested" / "test", {"a": 2}, seed)
    fails(load, tmp_path / "untested", "class 'b'", "no images in the test")
    write_classes(tmp_path / "copies", {"a": 9, "b": 1})
    for i in range(4):
        (tmp_path / "copies" / "b" / f"copy{i}.png").write_bytes(png(9))
    fails(load, tmp_path / "copies", "class 'b'", "1 different", "at least 3")


def test_cache_dir_that_cannot_be_written(load, tmp_path, root) -> None:
    (tmp_path / "file").write_text("")
    fails(load, root, "cache_dir=", "writable", cache_dir=str(tmp_path / "file"))


# Splits


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=25), min_size=2, max_size=4),
    st.integers(0, 99),
    st.booleans(),
)
def test_splits_of_any_table(classes, seed, official_test) -> None:
    rows = [
        (f"{label}-{group}", label, "pool")
        for label, groups in enumerate(classes)
        for group, copies in enumerate(groups)
        for _ in range(copies)
    ]
    if official_test:
        rows += [(f"t{label}", label, "test") for label in range(len(classes))]
    table = pd.DataFrame(rows, columns=["digest", "label", "role"])
    split = data._carve(table, seed)
    assert (split == data._carve(table, seed)).all()
    table["split"] = split
    assert (table.groupby("digest")["split"].nunique() == 1).all()
    pool = table[table["role"] == "pool"]
    for label, groups in enumerate(classes):
        counts = pool["split"][pool["label"] == label].value_counts()
        assert set(counts.index) == set(SPLITS if not official_test else SPLITS[:2])
        target = 0.2 * sum(groups)
        for carved in set(counts.index) - {"train"}:
            slack = 0.5 if max(groups) == 1 else max(groups)
            assert abs(counts[carved] - max(1, target)) <= slack
    shuffled = table.sample(frac=1, random_state=seed).reset_index(drop=True)
    assert (data._carve(shuffled, seed) == shuffled["split"]).all()


@pytest.mark.parametrize("sizes", [[1, 1, 8], [8, 1, 1], [5, 5, 5], [1, 1, 1], [9, 1, 9, 1]])
def test_many_copies_leave_an_image_for_every_split(sizes) -> None:
    split = data._divide({str(i): size for i, size in enumerate(sizes)}, ["test", "validation"])
    assert set(split.values()) == set(SPLITS)


def test_splits_depend_on_data_seed(load, root) -> None:
    first, again, other = load(root), load(root), load(root, data_seed=1)
    assert first.examples.equals(again.examples) and first.fingerprint == again.fingerprint
    assert set(first.table("test")["example_id"]) != set(other.table("test")["example_id"])
    assert other.fingerprint != first.fingerprint


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


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.33, 0.9])
def test_planted_noise(load, root, noise) -> None:
    clean, noisy = load(root), load(root, label_noise=noise)
    table = noisy.examples
    changed = table["label"] != table["true_label"]
    assert (
        changed.sum() == round(noise * sizes(clean)[0]) and (changed == table["is_flipped"]).all()
    )
    assert set(table["split"][changed]) <= {"train"}
    assert (table["true_label"] == clean.examples["label"]).all()
    assert (table["split"] == clean.examples["split"]).all()
    assert [noisy.class_names[i] for i in table["label"]] == table["label_name"].tolist()


def test_noise_reaches_every_other_class(load) -> None:
    table = load("digits", image_size=8, label_noise=0.5).examples
    table = table[table["is_flipped"]]
    offsets = (table["label"] - table["true_label"]) % 10
    assert set(offsets) == set(range(1, 10)) and offsets.value_counts().max() < 90


@pytest.mark.parametrize("noise", [0.1, 0.33, 0.9])
def test_pair_noise_makes_every_flip_the_next_class(load, root, noise) -> None:
    write_classes(root, {"eel": 12}, 100)
    uniform = load(root, label_noise=noise).examples
    table = load(root, label_noise=noise, noise_kind="pair").examples
    flipped = table["label"] != table["true_label"]
    assert flipped.sum() == round(noise * (table["split"] == "train").sum())
    assert (flipped == table["is_flipped"]).all() and (flipped == uniform["is_flipped"]).all()
    following = {0: 1, 1: 2, 2: 0}
    assert table["label"][flipped].tolist() == [following[t] for t in table["true_label"][flipped]]
    assert set(table["split"][flipped]) == {"train"}
    assert noise < 0.3 or set(table["true_label"][flipped]) == {0, 1, 2}
    names = ("cat", "dog", "eel")
    assert table["label_name"].tolist() == [names[i] for i in table["label"]]


# A shortcut


@pytest.fixture
def three(tmp_path: Path) -> Path:
    write_classes(tmp_path / "three", {"cat": 70, "dog": 45, "eel": 33})
    return tmp_path / "three"


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_patch_goes_to_exact_shares_of_each_true_class_and_split(load, three, noise) -> None:
    loaded = load(three, shortcut="patch", label_noise=noise)
    table, shares = loaded.examples, set()
    for split in SPLITS:
        for label in range(3):
            rows = table[(table["split"] == split) & (table["true_label"] == label)]
            share = 0.5 if split != "train" else 0.95 if label == 0 else 0.05
            assert rows["has_patch"].sum() == round(share * len(rows)), (split, label)
            shares.add(rows["has_patch"].mean() > 0)
    assert shares == {True}
    named = {True: "with patch", False: "without patch"}
    expected = [
        f"{name}, {named[has]}" for name, has in zip(table["label_name"], table["has_patch"])
    ]
    assert table["group"].tolist() == expected and len(set(expected)) == 6
    plain = load(three, label_noise=noise).examples
    assert not {"has_patch", "group"} & set(plain)
    assert table[list(plain)].equals(plain)


@pytest.mark.parametrize(("size", "side"), [(8, 2), (12, 2), (18, 3), (31, 5)])
def test_a_patch_is_a_square_and_nothing_else_changes(load, three, size, side) -> None:
    plain = load(three, image_size=size)
    expected, before = np.array(plain.pixels()), plain.pixels_file.read_bytes()
    loaded = load(three, image_size=size, shortcut="patch")
    for row in np.flatnonzero(loaded.examples["has_patch"]):
        for y in range(side, 2 * side):
            for x in range(side, 2 * side):
                expected[row, y, x] = (255, 0, 255)
    assert (loaded.pixels() == expected).all()
    assert loaded.pixels_file != plain.pixels_file and plain.pixels_file.read_bytes() == before
    assert (load(three, image_size=size).pixels() == plain.pixels()).all()


def test_a_patch_is_painted_once_and_by_the_seed(load, three, monkeypatch, decodes) -> None:
    first = load(three, shortcut="patch")
    written = first.pixels_file.stat().st_mtime_ns
    again = load(three, shortcut="patch")
    assert again.examples.equals(first.examples) and again.pixels_file == first.pixels_file
    assert again.pixels_file.stat().st_mtime_ns == written and len(decodes) == 148
    assert again.fingerprint == first.fingerprint
    other = load(three, shortcut="patch", data_seed=1)
    id_patched = [set(d.examples["example_id"][d.examples["has_patch"]]) for d in (first, other)]
    assert id_patched[0] != id_patched[1]
    folders = [p.name for p in first.pixels_file.parent.parent.iterdir()]
    assert len(folders) == 3  # plain, and one a seed: no leftovers


def test_the_fingerprint_tells_patched_data_and_noise_kinds_apart(load, three) -> None:
    given = [{}, {"shortcut": "patch"}, {"label_noise": 0.3}]
    given += [{"label_noise": 0.3, "noise_kind": "pair"}, {"label_noise": 0.3, "shortcut": "patch"}]
    assert len({load(three, **each).fingerprint for each in given}) == len(given)
    assert load(three, noise_kind="pair").fingerprint == load(three).fingerprint  # of no flips


# A column that groups


def with_column(first: int, counts: list[int], **columns: Callable[[int], Any]) -> Any:
    """A data set whose row of image i has column(i)."""
    part = hub_dataset(first, counts)
    for name, value in columns.items():
        part = part.add_column(name, [value(first + i) for i in range(sum(counts))])
    return part


def camera(i: int) -> str:
    return "abc"[(i * i) % 7 % 3] + str(i)


def test_the_column_that_groups_name_stays_with_its_image(load, tmp_path) -> None:
    folder = write_parquet(
        tmp_path / "hub",
        train=with_column(0, [14, 9], camera=camera, year=lambda i: 1990 + i),
        test=with_column(50, [5, 4], camera=camera, year=lambda i: 1990 + i),
    )
    plain = load(folder)
    assert not {"camera", "year"} & set(plain.examples)
    for groups, value in (("camera", camera), ("year", lambda i: 1990 + i)):
        loaded = load(folder, groups=groups)
        numbers = [int(name.removesuffix(".png")) for name in loaded.examples["file_name"]]
        assert sorted(numbers) == [*range(23), *range(50, 59)] != numbers
        assert loaded.examples[groups].tolist() == [value(i) for i in numbers]
        assert loaded.examples.drop(columns=groups).equals(plain.examples)
        assert loaded.fingerprint == plain.fingerprint


def test_the_column_stays_with_its_image_where_rows_are_left_out(load, tmp_path) -> None:
    import datasets

    train = with_column(0, [12, 12], camera=camera)
    cells = train.with_format("arrow")[:]["image"].to_pylist()
    cells[4] = {"bytes": b"no image", "path": "4.png"}
    columns = {"image": cells, "label": train["label"][:], "camera": train["camera"][:]}
    train = datasets.Dataset.from_dict(columns, features=train.features)
    copies = with_column(6, [2, 0], camera=lambda i: f"copy of {i}")  # images 6 and 7 again
    test = datasets.concatenate_datasets([copies, with_column(50, [5, 4], camera=camera)])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", groups="camera", on_bad_image="skip")
    assert loaded.dropped_duplicates == 2 and loaded.skipped == ("4.png",)
    table = loaded.examples
    numbers = [int(name.removesuffix(".png")) for name in table["file_name"]]
    expected = [f"copy of {i}" if i in (6, 7) else camera(i) for i in numbers]
    assert table["camera"].tolist() == expected
    assert set(table["split"][table["camera"].str.startswith("copy")]) == {"test"}


def test_a_column_that_some_part_lacks_is_not_taken(load, tmp_path) -> None:
    parts = {"train": with_column(0, [12, 12], camera=camera), "test": hub_dataset(50, [3, 3])}
    import datasets

    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert "camera" not in load(tmp_path / "saved", groups="camera").examples


@pytest.mark.parametrize("name", ["split", "file_name", "position"])
def test_a_column_that_has_the_name_of_ours_is_refused(load, tmp_path, name) -> None:
    """Groups would be of another thing than was asked for, and nothing would show it."""
    part = hub_dataset(0, [12, 12]).add_column(name, ["left", "right"] * 12)
    folder = write_parquet(tmp_path / "hub", train=part)
    assert load(folder, groups="label").examples.equals(load(folder).examples)
    fails(load, folder, f"groups={name}", "rename it", groups=name)


def test_a_group_is_no_list_and_no_image(load, tmp_path) -> None:
    part = hub_dataset(0, [12, 12]).add_column("tags", [["a", "b"]] * 24)
    folder = write_parquet(tmp_path / "hub", train=part)
    for name in ("tags", "image"):
        fails(load, folder, f"groups={name}", "number or a text", groups=name)


def test_a_class_that_the_training_part_does_not_know_is_refused(load, tmp_path) -> None:
    import datasets

    train, test = hub_dataset(0, [12, 12]), hub_dataset(50, [5, 4])
    names = [*train.features["label"].names[:1], "another"]
    test = test.cast_column("label", datasets.ClassLabel(names=names))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    fails(load, tmp_path / "saved", "label_column=label", "'another'")


def test_a_class_that_shares_its_images_has_too_few_of_its_own(load, root) -> None:
    """An image of two classes counts for the first alone, and none is left for some split."""
    write_classes(root, {"zebra": 3}, 300)
    first = sorted(folder for folder in root.iterdir() if folder.name != "zebra")[0]
    for file in sorted((root / "zebra").iterdir())[:2]:
        (first / f"z{file.name}").write_bytes(file.read_bytes())
    fails(load, root, "class 'zebra' has 1 different images of its own", "at least 3")


# Fingerprint


def test_fingerprint_follows_what_matters(load, root, tmp_path) -> None:
    write_classes(root, {"eel": 5}, 100)
    base = load(root).fingerprint
    changes = [
        {"label_noise": 0.2},
        {"data_seed": 1},
        {"image_size": 9},
        {"classes": "cat,dog"},
    ]
    prints = [load(root, **change).fingerprint for change in changes]
    (root / "cat" / "0.png").rename(root / "dog" / "0.png")
    prints.append(load(root).fingerprint)
    (root / "dog" / "0.png").rename(root / "cat" / "0.png")
    (root / "cat" / "0.png").write_bytes(png(999))
    prints.append(load(root).fingerprint)
    (root / "cat" / "0.png").unlink()
    prints.append(load(root).fingerprint)
    assert len({base, *prints}) == 1 + len(prints)
    (root / "cat" / "0.png").write_bytes(png(0))
    assert load(root).fingerprint == base


def test_fingerprint_ignores_what_does_not(load, root, tmp_path) -> None:
    base = load(root, label_noise=0.2)
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    for i, file in enumerate(sorted(moved.glob("*/*.png"))):
        os.utime(file, (i, i))
        file.rename(file.with_name(f"z{97 * i % 31}.png"))
    other = load(moved, label_noise=0.2, cache_dir=str(tmp_path / "other"))
    assert other.fingerprint == base.fingerprint
    assert other.examples.drop(columns="file_name").equals(base.examples.drop(columns="file_name"))
    assert (other.pixels() == base.pixels()).all()


# Pixel cache


def test_cache_hit_decodes_nothing(load, root, decodes) -> None:
    load(root)
    assert len(decodes) == 25
    load(root)
    load(root, data_seed=3, label_noise=0.2)
    assert len(decodes) == 25
    load(root, image_size=9)
    load(root)
    assert len(decodes) == 50


def test_broken_cache_is_rebuilt(load, root, decodes) -> None:
    first = load(root)
    file, good = first.pixels_file, np.array(first.pixels())
    np.save(file, good[:-1])
    assert (load(root).pixels() == good).all() and len(decodes) == 50
    file.write_bytes(file.read_bytes()[:300])
    load(root)
    file.with_name("skipped.json").unlink()
    load(root)
    assert len(decodes) == 100
    assert [p.name for p in file.parent.parent.iterdir()] == [file.parent.name]  # no leftovers


def test_a_cache_that_another_is_making_is_waited_for(load, root, monkeypatch) -> None:
    """Locks of two threads exclude one another as those of two processes do."""
    original, started, made = pixels._decode_all, threading.Event(), []

    def slow(*args):
        made.append(args)
        started.set()
        time.sleep(0.5)
        return original(*args)

    monkeypatch.setattr(pixels, "_decode_all", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(load, root)
        assert started.wait(30)
        second = pool.submit(load, root)
    assert (first.result().pixels() == second.result().pixels()).all()
    assert len(made) == 1


def test_what_a_killed_process_left_of_a_cache_is_replaced(load, root) -> None:
    file = load(root).pixels_file
    expected = file.read_bytes()
    unfinished = file.parent.with_name(f"{file.parent.name}.unfinished")
    file.parent.rename(unfinished)
    (unfinished / "pixels.npy").write_bytes(expected[:100])
    (unfinished / "other").write_text("")
    assert load(root).pixels_file.read_bytes() == expected
    assert [path.name for path in file.parent.parent.iterdir()] == [file.parent.name]


def test_pickle_is_small_and_the_map_is_shared(load) -> None:
    loaded = load("digits", image_size=16)
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 400_000
    copy = pickle.loads(pickled)
    assert copy.pixels() is loaded.pixels() and copy.fingerprint == loaded.fingerprint
    assert not loaded.pixels().flags.writeable


# Decoding


def test_grey_palette_and_cmyk() -> None:
    grey = Image.new("L", (8, 8), 77)
    assert (decode_image(grey, 8) == 77).all()
    palette = picture(0, (8, 8)).quantize(4)
    assert (decode_image(palette, 8) == np.asarray(palette.convert("RGB"))).all()
    assert (decode_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), 8)[0, 0] == [255, 0, 0]).all()
    assert (decode_image(Image.new("1", (8, 8), 1), 8) == 255).all()


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    pixels = decode_image(image, 8)
    assert pixels[0, 0].tolist() == [10, 20, 30] and (pixels[1:] == 255).all()
    assert (decode_image(Image.new("LA", (8, 8), (0, 0)), 8) == 255).all()
    stream = io.BytesIO()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(stream, "PNG", transparency=0)
    assert (decode_image(Image.open(stream), 8) == 255).all()


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_16_bit_grey_is_scaled(mode, suffix) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8)
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    stream = io.BytesIO()
    image.save(stream, suffix)
    pixels = decode_image(Image.open(stream), 8)
    assert np.abs(pixels[..., 0] - values / 257).max() <= 1


@pytest.mark.parametrize("bright", [0.9, 1.0, 1.1, 256.0, np.nan, -0.1])
def test_numbers_without_an_agreed_range_are_refused_and_others_keep_their_order(bright) -> None:
    """A range guessed from each image would make a dark one lighter than a bright one."""
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), bright, np.float32)).save(stream, "TIFF")
    if 0 <= bright <= 1:
        assert np.abs(decode_image(Image.open(stream), 8) - 255 * bright).max() <= 0.6
    else:
        with pytest.raises(ValueError, match="grey values of mode F are not from 0 to 1"):
            decode_image(Image.open(stream), 8)


def test_exif_rotation(tmp_path) -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))  # left half black
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn to the right: the left half is on top
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = decode_image(Image.open(tmp_path / "turned.png"), 16)
    assert (pixels[:8] == 0).all() and (pixels[8:] == 255).all()


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (1, 3000), (5, 5), (300, 200)])
def test_short_side_is_fitted_and_the_centre_kept(size) -> None:
    image = Image.new("RGB", size, "red")
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste("blue", (left, top, left + side, top + side))
    pixels = decode_image(image, 16)
    assert pixels.shape == (16, 16, 3)
    assert side < 5 or (pixels[4:12, 4:12] == [0, 0, 255]).all()


def test_right_size_is_untouched() -> None:
    image = picture(3, (8, 8))
    assert (decode_image(image, 8) == np.asarray(image)).all()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "bomb"])
def test_bad_image_stops_or_is_skipped(load, root, damage, monkeypatch, decodes) -> None:
    clean = load(root).examples
    bad = root / "cat" / "bad.png"
    contents = {"truncated": png(500)[:-60], "text": b"hello", "empty": b""}
    bad.write_bytes(contents.get(damage, b""))
    if damage == "bomb":
        picture(7, (40, 40)).save(bad)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    fails(load, root, "dataset=", "cat/bad.png cannot be decoded", "on_bad_image=skip")
    loaded = load(root, on_bad_image="skip")
    assert loaded.skipped == ("cat/bad.png",) and len(loaded.pixels()) == 25
    assert loaded.examples.equals(clean)
    count = len(decodes)
    again = load(root, on_bad_image="skip")
    assert len(decodes) == count and again.skipped == loaded.skipped
    fails(load, root, "cat/bad.png cannot be decoded")  # also with the cache of the run that skips
    assert (again.pixels() == load(root, on_bad_image="skip").pixels()).all()


def test_class_of_bad_images_is_empty(load, root) -> None:
    (root / "eel").mkdir()
    for i in range(3):
        (root / "eel" / f"{i}.jpg").write_bytes(b"no image" * i)
    fails(load, root, "and 2 others cannot be decoded")
    fails(load, root, "empty class 'eel'", on_bad_image="skip")


def test_all_bad(load, tmp_path) -> None:
    write_classes(tmp_path / "i", {"a": 4, "b": 4})
    for i, file in enumerate((tmp_path / "i").glob("*/*.png")):
        file.write_bytes(f"no image {i}".encode())
    fails(load, tmp_path / "i", "empty class 'a'", on_bad_image="skip")


# Batches and augmentation


def test_to_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    pixels.flags.writeable = False
    batch = to_batch(pixels, mean, std)
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert batch.shape == (4, 3, 5, 6) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(batch.numpy(), expected, atol=1e-6)
    assert torch.equal(batch, to_batch(torch.tensor(pixels), mean, std))


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "flip,crop"])
@pytest.mark.parametrize(("size", "pad"), [(8, 1), (16, 2), (1, 1)])
def test_augment_batch_equals_one_image_at_a_time(augment, size, pad) -> None:
    batch = torch.rand(32, 3, size, size + 1).contiguous(memory_format=torch.channels_last)
    drawn = draw_augmentation(32, augment, pad, torch.Generator().manual_seed(1))
    result = augment_batch(batch, drawn)
    assert result.is_contiguous(memory_format=torch.channels_last)
    mode = "reflect" if pad < size else "edge"
    for i, image in enumerate(batch.numpy()):
        if drawn.flips[i]:
            image = image[:, :, ::-1]
        p, y, x = drawn.pad, int(drawn.dy[i]), int(drawn.dx[i])
        padded = np.pad(image, [(0, 0), (p, p), (p, p)], mode=mode)
        assert (result[i].numpy() == padded[:, y : y + size, x : x + size + 1]).all()
    assert drawn.flips.any() == ("flip" in augment)
    assert (drawn.dy.max() > drawn.dy.min()) == ("crop" in augment)
    assert drawn.dy.min() >= 0 and drawn.dx.max() <= 2 * pad


def test_augmentation_stays_paired_when_examples_are_removed() -> None:
    batch = torch.rand(20, 3, 8, 8)
    drawn = draw_augmentation(20, "flip,crop", 1, torch.Generator().manual_seed(3))
    kept = np.array([1, 4, 5, 17, 3])
    assert torch.equal(augment_batch(batch[kept], drawn[kept]), augment_batch(batch, drawn)[kept])
    again = draw_augmentation(20, "flip,crop", 1, torch.Generator().manual_seed(3))
    assert torch.equal(again.dx, drawn.dx) and torch.equal(again.flips, drawn.flips)


# Real photographs


@pytest.mark.skipif(not FOOD.is_dir(), reason=f"no photographs at {FOOD}")
def test_real_photographs(load, decodes) -> None:
    loaded = load(FOOD, image_size=64, label_noise=0.1)
    assert len(loaded.class_names) == 10 and loaded.pixels().shape == (9986, 64, 64, 3)
    train, validation, test = sizes(loaded)
    assert test == 2500 and abs(validation - 0.2 * (train + validation)) <= 5
    assert loaded.examples["is_flipped"].sum() == round(0.1 * train)
    assert len(decodes) == 9986 and not loaded.skipped
    row = loaded.examples.iloc[123]
    expected = np.asarray(Image.open(FOOD / row["file_name"]).convert("RGB"))
    assert (loaded.pixels()[123] == expected).all()
    load(FOOD, image_size=64)
    assert len(decodes) == 9986


# Folders and files that somebody else has made


def claims(width: int, height: int, colour: int = 0) -> bytes:
    """A PNG of one colour, so well compressed that it is small however large the image is."""
    row = bytes(1 + (-(-width // 8) if colour == 0 else 3 * width))
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row * 100) for _ in range(-(-height // 100))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1 if colour == 0 else 8, colour, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


UNKNOWN = "no picture of a known format: JPEG, PNG"
UNDECODABLE = {
    "zero bytes": (b"", UNKNOWN),
    "a bomb": (claims(20_000, 20_000), "exceeds limit"),
    "a header that claims a bomb": (claims(1, 1)[:16] + b"\x7f" * 8, "no picture that can be decoded"),
    "cut off": (png(1)[:90], "no picture that can be decoded: image file is truncated"),
    "PostScript under another name": (eps(), UNKNOWN),
    "a table": (b"PAR1", UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), UNDECODABLE.values(), ids=UNDECODABLE)
def test_what_is_no_image_stops_the_run_or_is_skipped(load, root, content, says) -> None:
    (root / "cat" / "odd.png").write_bytes(content)
    for _ in range(2):  # what is remembered of the first time has the same reason
        fails(load, root, f"dataset={root}", "cat/odd.png", "on_bad_image=skip", says)
    loaded = load(root, on_bad_image="skip")
    assert loaded.skipped == ("cat/odd.png",) and len(loaded.examples) == 25


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 100)])
def test_sizes_that_nobody_expects(load, root, size) -> None:
    Image.new("RGB", size, (200, 100, 50)).save(root / "cat" / "odd.png")
    loaded = load(root)
    (row,) = np.flatnonzero(loaded.examples["file_name"] == "cat/odd.png")
    assert (loaded.pixels()[row] == [200, 100, 50]).all()


def test_a_program_is_not_started_for_a_picture(monkeypatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    with pytest.raises(InputError, match="no picture of a known format"):
        pixels.read_image(eps(), 8)
    assert not started


def test_large_images_are_decoded_one_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(pixels, "LARGE", 10)
    running, most, original = [], [], pixels.decode_image

    def counted(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()
        return original(*arguments)

    monkeypatch.setattr(pixels, "decode_image", counted)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: pixels.read_image(png(i), 8), range(12)))
    assert max(most) == 1 and len(most) == 12


BROKEN = {
    "a link to nowhere": (lambda f: f.symlink_to("/nowhere/x.png"), "link that leads nowhere"),
    "a link to itself": (lambda f: f.symlink_to(f), "link that leads nowhere"),
    "no UTF-8": (lambda f: write_bytes_name(f), "a name that is not UTF-8"),
    "an address": (lambda f: f.with_name("http::x.png").write_bytes(png(99)), "has '::'"),
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
    fails(load, root, "link that leads nowhere")


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


def test_a_folder_that_is_a_link_to_the_whole_is_an_empty_class(load, root) -> None:
    (root / "loop").symlink_to(root)
    fails(load, root, "empty class 'loop'")


@pytest.mark.parametrize(
    "name", ["a b", "new\nline", "é 😀", "\u202eevil", "-rf", "%s {x} $y$", "a.zip", "\x1b[31m"]
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


@pytest.mark.parametrize("path", ["/dev/zero", "../../../etc/passwd", "/nowhere", "\0", "", "/"])
def test_a_path_in_a_table_is_read_as_an_image_or_not_at_all(load, tmp_path, path) -> None:
    part = hub_dataset(0, [6, 6])
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(11)]
    part = part.remove_columns("image").add_column(
        "image", [*images, {"bytes": None, "path": path}]
    )
    folder = write_parquet(tmp_path / "hub", train=part)
    fails(load, folder, "cannot be decoded", image_column="image")
    loaded = load(folder, image_column="image", on_bad_image="skip")
    assert len(loaded.skipped) == 1 and len(loaded.examples) == 11


def test_a_file_too_large_for_an_image_is_not_read(load, tmp_path) -> None:
    from attribution.data import sources

    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(sources.MOST_BYTES + 1)
    assert sources.content({"bytes": None, "path": str(tmp_path / "large.png")}) == b""


def test_a_folder_in_hub_format_cannot_bring_code(load, tmp_path) -> None:
    folder = write_parquet(tmp_path / "hub", train=hub_dataset(0, [6, 6]))
    mark = tmp_path / "executed"
    (folder / "hub.py").write_text(f"open({str(mark)!r}, 'w')\n")
    fails(load, folder, f"dataset={folder}", "scripts are no longer supported")
    assert not mark.exists()
