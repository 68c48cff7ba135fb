"""attribution/data/splits.py."""

from __future__ import annotations

import contextlib

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import fails, sizes, with_column, write_classes, write_parquet

from attribution.config import resolve
from attribution.data import splits
from attribution.data.splits import SPLITS
from attribution.errors import InputError


@pytest.mark.slow
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
    table = pd.DataFrame(rows, columns=["digest", "label", "role"]).assign(
        unit=lambda t: t["digest"]
    )
    config = resolve({"data_seed": seed})
    split = splits.carve(table, config)
    assert (split == splits.carve(table, config)).all()
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
    assert (splits.carve(shuffled, config) == shuffled["split"]).all()


@pytest.mark.parametrize("sizes", [[1, 1, 8], [8, 1, 1], [5, 5, 5], [1, 1, 1], [9, 1, 9, 1]])
def test_many_copies_leave_an_image_for_every_split(sizes) -> None:
    rows = [(f"{image}", 0, "pool") for image, copies in enumerate(sizes) for _ in range(copies)]
    table = pd.DataFrame(rows, columns=["digest", "label", "role"]).assign(
        unit=lambda t: t["digest"]
    )
    assert set(splits.carve(table, resolve({}))) == set(SPLITS)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 60)), min_size=1),
    st.integers(0, 99),
    st.sampled_from([(0.2, 0.2), (0.1, 0.3), (0.45, 0.5)]),
)
def test_no_group_lies_on_two_sides(images, seed, fractions) -> None:
    table = pd.DataFrame(images, columns=["patient", "label", "image"])
    table = table.assign(role="pool", digest=table["image"].astype(str), file_name="", name="x")
    given = {"split_by": "patient", "data_seed": seed}
    config = resolve(given | dict(zip(("val_fraction", "test_fraction"), fractions)))
    table["unit"] = splits.units(table, list(table["patient"]), config)
    table["split"] = splits.carve(table, config)
    assert set(table["split"]) <= set(SPLITS)
    for together in ("patient", "image", "unit"):
        assert (table.groupby(together)["split"].nunique() == 1).all()
    names = [str(label) for label in range(4)]
    complete = all(set(table["label"][table["split"] == split]) == {0, 1, 2, 3} for split in SPLITS)
    with contextlib.nullcontext() if complete else pytest.raises(InputError, match="split_by"):
        splits.check_every_class(table, names, "split_by=patient")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=8), min_size=2), st.integers(0, 9))
def test_three_groups_of_a_class_are_enough(classes, seed) -> None:
    rows = [
        (label, f"{label}-{unit}", "pool")
        for label, sizes in enumerate(classes)
        for unit, size in enumerate(sizes)
        for _ in range(size)
    ]
    table = pd.DataFrame(rows, columns=["label", "unit", "role"])
    table["split"] = splits.carve(table, resolve({"split_by": "unit", "data_seed": seed}))
    assert (table.groupby("label")["split"].nunique() == 3).all()


def test_fractions_are_kept(load, root) -> None:
    assert sizes(load(root, val_fraction=0.4, test_fraction=0.1)) == [12, 10, 3]
    with pytest.raises(InputError, match="val_fraction=0.5: .* below 1"):
        resolve({"val_fraction": 0.5, "test_fraction": 0.5})


def units_of(loaded) -> pd.Series:
    return loaded.examples["file_name"].str.extract(r"(patient\d+)_")[0]


def test_file_names_say_which_images_belong_together(load, root) -> None:
    for i, file in enumerate(sorted(root.rglob("*.png"))):
        file.rename(file.with_name(f"patient{i % 6}_{i}.png"))  # each has both classes
    loaded = load(root, split_by=r"(patient\d+)_")
    by_unit = loaded.examples.groupby(units_of(loaded))["split"]
    assert len(by_unit) == 6 and (by_unit.nunique() == 1).all()
    assert set(loaded.examples["split"]) == set(SPLITS)
    fails(load, root, "split_by=(", "not a regular expression", split_by="(")
    fails(load, root, "no column", "group in parentheses", split_by="patient")
    fails(load, root, "10 of 25 images have no value", "cat/", split_by=r"dog/(\w+)")
    fails(load, root, "class 'cat' has 1 units", "at least 3", split_by=r"(cat|dog)")


def test_a_column_says_which_images_belong_together(load, tmp_path) -> None:
    part = with_column(0, [12, 12], video=lambda i: f"v{i % 12 // 3}", lists=lambda i: [i])
    folder = write_parquet(tmp_path / "hub", train=part)
    loaded = load(folder, split_by="video")
    video = loaded.examples["file_name"].str.removesuffix(".png").astype(int) % 12 // 3
    assert (loaded.examples.groupby(video)["split"].nunique() == 1).all()
    fails(load, folder, "column lists holds lists", split_by="lists")


def test_official_parts_that_do_not_fit_are_cut_anew(load, tmp_path) -> None:
    root = tmp_path / "images"
    seed = write_classes(root / "train", {"a": 9, "b": 9, "c": 9})
    write_classes(root / "test", {"a": 6}, seed)
    fails(load, root, "the test part lacks the classes 'b', 'c'", "--resplit")
    loaded = load(root, resplit="yes")
    assert sizes(loaded) == [19, 7, 7] and loaded.dropped_duplicates == 0
    write_classes(root / "test", {"b": 2, "c": 2}, seed + 6)
    assert sizes(load(root))[2] == 10
    fails(load, root, "test_fraction=0.1", "add --resplit", test_fraction=0.1)
    fails(load, root, "of its values, such as '2'", "--resplit", split_by=r"/(\d)\d?\.png")
    assert (
        sizes(load(root, resplit="yes", split_by=r"/(\d+)\.png"))
        == sizes(load(root, resplit="yes"))
        == [23, 7, 7]
    )


def test_splits_depend_on_data_seed(load, root) -> None:
    first, again, other = load(root), load(root), load(root, data_seed=1)
    assert first.examples.equals(again.examples) and first.fingerprint == again.fingerprint
    assert set(first.table("test")["example_id"]) != set(other.table("test")["example_id"])
    assert other.fingerprint != first.fingerprint
