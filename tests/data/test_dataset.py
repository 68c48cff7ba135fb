"""attribution/data/dataset.py."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from image_folders import (
    camera,
    fails,
    hub_dataset,
    png,
    sizes,
    with_column,
    write_classes,
    write_parquet,
)
from PIL import Image

FOOD = Path(__file__).resolve().parents[3] / "shared" / "data" / "food101-10"


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


@pytest.mark.parametrize("name", ["split", "file_name", "position"])
def test_a_column_that_has_the_name_of_ours_is_refused(load, tmp_path, name) -> None:
    """Groups would be of another thing than was asked for, and nothing would show it."""
    part = hub_dataset(0, [12, 12]).add_column(name, ["left", "right"] * 12)
    folder = write_parquet(tmp_path / "hub", train=part)
    assert load(folder, groups="label").examples.equals(load(folder).examples)
    fails(load, folder, f"groups={name}", "rename the data set's column", groups=name)


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


def test_pickle_is_small_and_has_the_same_pixels(load) -> None:
    loaded = load("digits", image_size=16)
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 400_000
    copy = pickle.loads(pickled)
    assert copy.fingerprint == loaded.fingerprint and (copy.pixels() == loaded.pixels()).all()
    assert isinstance(copy.pixels(), np.memmap) and not copy.pixels().flags.writeable


@pytest.mark.slow
@pytest.mark.skipif(not FOOD.is_dir(), reason=f"no photographs at {FOOD}")
def test_real_photographs(load, decodes) -> None:
    names = sorted(folder.name for folder in (FOOD / "train").iterdir())[:2]
    counts = [
        sum(len(list((FOOD / part / name).iterdir())) for name in names)
        for part in ("train", "test")
    ]
    given = {"image_size": 64, "classes": ",".join(names)}
    loaded = load(FOOD, **given, label_noise=0.1)
    assert list(loaded.class_names) == names
    assert loaded.pixels().shape == (sum(counts), 64, 64, 3)
    train, validation, test = sizes(loaded)
    assert test == counts[1] and abs(validation - 0.2 * (train + validation)) <= 5
    assert loaded.examples["is_flipped"].sum() == round(0.1 * train)
    assert len(decodes) == sum(counts) and not loaded.skipped
    row = loaded.examples.iloc[123]
    expected = np.asarray(Image.open(FOOD / row["file_name"]).convert("RGB"))
    assert (loaded.pixels()[123] == expected).all()
    load(FOOD, **given)
    assert len(decodes) == sum(counts)
