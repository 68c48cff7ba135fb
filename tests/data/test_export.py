"""A data set is written as `labels` and `keep` leave it, and read again as the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from image_folders import hub_dataset, picture, write_classes

from attribution.config import Config, resolve
from attribution.data import export
from attribution.data.dataset import ImageData, load_data
from attribution.data.decisions import LEFT_OUT
from attribution.data.splits import SPLITS
from attribution.errors import InputError


@pytest.fixture
def settle(tmp_path: Path, root: Path) -> Callable[..., tuple[Config, ImageData]]:
    """The parameters and the data of an export to the folder `out`."""

    def run(**given: Any) -> tuple[Config, ImageData]:
        fixed = {"dataset": str(root), "image_size": 8, "cache_dir": str(tmp_path / "cache")}
        config = resolve({**fixed, "export": str(tmp_path / "out"), **given})
        return config, load_data(config)

    return run


def flat(folder: Path) -> str:
    write_classes(folder, {"cat": 10, "dog": 15})
    return str(folder)


def nested(folder: Path) -> str:
    """Two classes are called small, so that the folders above are part of their names."""
    counts = {"cat/small": 6, "dog/small": 6, "dog/large": 6}
    write_classes(folder, counts)
    return str(folder)


def parts(folder: Path) -> str:
    first = write_classes(folder / "Training", {"cat": 8, "dog": 8})
    write_classes(folder / "test_set", {"cat": 3, "dog": 3}, first)
    return str(folder)


def table(folder: Path) -> str:
    (folder / "images").mkdir(parents=True)
    for i in range(20):
        picture(i).save(folder / "images" / f"{i}.png")
    rows = [{"file": f"{i}.png", "label": ["a b", "c"][i % 2]} for i in range(20)]
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return str(folder)


def saved(folder: Path) -> str:
    hub_dataset(0, [9, 9]).save_to_disk(folder)
    return str(folder)


def digits(_: Path) -> str:
    return "digits"


@pytest.mark.parametrize("kind", ["folder", "hf"])
@pytest.mark.parametrize(
    "make", [flat, nested, parts, table, saved, digits], ids=lambda f: f.__name__
)
def test_what_is_read_again_has_the_same_images_labels_and_splits(
    settle, tmp_path, make, kind
) -> None:
    given = {"classes": "3,8", "label_noise": 0.0} if make is digits else {}
    config, data = settle(dataset=make(tmp_path / "made"), export_format=kind, **given)
    export.check(config, data)
    written = export.write(config, data)
    again = load_data(
        resolve({"dataset": config.export, "image_size": 8, "cache_dir": config.cache_dir})
    )
    names = data.class_names if kind == "hf" else tuple(sorted(data.class_names))
    assert again.class_names == names and len(written) == len(data.examples)
    assert contents(again) == contents(data)


def contents(data: ImageData) -> list[tuple[bytes, str, str]]:
    own = zip(data.pixels(), data.examples["label_name"], data.examples["split"])
    return sorted((pixels.tobytes(), label, split) for pixels, label, split in own)


@pytest.fixture
def corrected(settle, tmp_path: Path) -> dict[str, str]:
    """Flags: one image of each split gets the other label, and another one is left out."""
    before = settle()[1].examples
    changed = before[before["label_name"] == "dog"].groupby("split").head(1)
    left_out = before[before["label_name"] == "dog"].groupby("split").nth(1)
    kept = before[~before["example_id"].isin(left_out["example_id"])]
    kept[["example_id", "split"]].to_csv(tmp_path / "keep.csv", index=False)
    changed.assign(label="cat")[["example_id", "label"]].to_csv(tmp_path / "l.csv", index=False)
    return {"keep": str(tmp_path / "keep.csv"), "labels": str(tmp_path / "l.csv")}


def test_a_folder_holds_what_is_kept_under_its_new_labels_and_old_names(
    settle, root, corrected
) -> None:
    config, data = settle(**corrected)
    written = export.write(config, data)
    folder, examples = Path(config.export), data.examples
    expected = {
        f"{split}/{label}/{Path(name).name}": (root / name).read_bytes()
        for split, label, name in zip(
            examples["split"], examples["label_name"], examples["file_name"]
        )
        if split != LEFT_OUT
    }
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}
    assert found == expected and len(found) == 22
    held = pd.read_csv(folder / export.TABLE)
    assert held.equals(written.reset_index(drop=True)) and set(held["filepath"]) == set(found)
    relabelled = held[held["is_label_issue"]]
    assert len(relabelled) == 3 and set(relabelled["split"]) == set(SPLITS)
    assert set(relabelled["given_label"]) == {"dog"} and set(relabelled["label"]) == {"cat"}
    again = load_data(
        resolve({"dataset": config.export, "image_size": 8, "cache_dir": config.cache_dir})
    )
    assert contents(again) == [each for each in contents(data) if each[2] != LEFT_OUT]


def test_a_table_names_every_image_and_what_a_person_found(settle, root, corrected) -> None:
    config, data = settle(**corrected, export_format="csv")
    export.write(config, data)
    assert os.listdir(config.export) == [export.TABLE]
    held = pd.read_csv(Path(config.export) / export.TABLE)
    assert len(held) == 25 and all(Path(path).is_file() for path in held["filepath"])
    assert (~held["is_kept"]).sum() == 3 and held["is_label_issue"].sum() == 6
    assert set(held["split"]) == set(SPLITS)


def test_datasets_loads_images_and_class_labels(settle, corrected) -> None:
    config, data = settle(**corrected, export_format="hf")
    export.write(config, data)
    loaded = datasets.load_from_disk(config.export)
    assert {name: len(part) for name, part in loaded.items()} == {
        s: len(data.rows(s)) for s in SPLITS
    }
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    assert loaded["test"][0]["image"].size == (12, 9)
    labels = np.concatenate([loaded[split]["label"] for split in SPLITS])
    assert sorted(labels) == sorted(np.concatenate([data.labels(split) for split in SPLITS]))


def test_files_of_one_name_stay_apart(settle, tmp_path) -> None:
    for i, name in enumerate(["a", "b"] * 9):
        folder = tmp_path / "made" / name / str(i)
        folder.mkdir(parents=True)
        picture(i).save(folder / ("x.png" if i % 3 else "X.png"))
    config, data = settle(dataset=str(tmp_path / "made"), class_depth=1)
    export.write(config, data)
    assert len(list(Path(config.export).rglob("*.png"))) == 18


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "overlaps with dataset="), ("inside", "overlaps"), ("..", "overlaps")],
)
def test_the_data_set_itself_is_no_place_to_write_to(settle, root, name, says) -> None:
    config, _ = settle(export=str(root / name))
    with pytest.raises(InputError, match=f"^export={config.export}: {says}"):
        export.target(config)


def test_a_folder_that_is_not_empty_is_left_alone(settle, tmp_path) -> None:
    config, data = settle()
    out = Path(config.export)
    out.mkdir()
    export.write(config, data)  # an empty folder is as good as none
    (out / "train" / "cat" / "mine.png").touch()
    with pytest.raises(InputError, match="is not empty; name another folder, or add --overwrite"):
        export.write(config, data)
    replacing, _ = settle(overwrite="yes")
    export.write(replacing, data)
    assert not (out / "train" / "cat" / "mine.png").exists()
    (out / "notes.txt").touch()
    with pytest.raises(InputError, match="holds something else than an earlier export"):
        export.write(replacing, data)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".out")]


def test_a_file_is_no_folder(settle, tmp_path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="is a file; name a folder"):
        export.target(settle()[0])


@pytest.mark.parametrize("name", ["AC/DC", ".hidden", "a//b", "../up", "/top"])
def test_a_class_that_would_be_read_as_another_one_is_refused(settle, tmp_path, name) -> None:
    part = hub_dataset(0, [9, 9]).cast_column("label", datasets.ClassLabel(names=[name, "x"]))
    part.save_to_disk(tmp_path / "made")
    config, data = settle(dataset=str(tmp_path / "made"))
    with pytest.raises(InputError, match=f"class '{name}' cannot be a folder's name"):
        export.check(config, data)
    config, data = settle(dataset=str(tmp_path / "made"), export_format="hf")
    export.check(config, data)


def test_a_disk_that_fails_leaves_nothing(settle, tmp_path, monkeypatch) -> None:
    config, data = settle()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", fail)
    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(InputError, match=f"^export={config.export}: cannot be written .*No space"):
        export.write(config, data)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_files_are_copied_where_they_cannot_be_linked(settle, root, monkeypatch) -> None:
    config, data = settle()
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device")))
    export.write(config, data)
    assert len(list(Path(config.export).rglob("*.png"))) == 25
    assert all(file.stat().st_nlink == 1 for file in Path(config.export).rglob("*.png"))


def test_data_that_changed_meanwhile_is_refused(settle, root) -> None:
    config, data = settle()
    next(root.rglob("*.png")).unlink()
    with pytest.raises(InputError, match=f"dataset={root} has changed meanwhile"):
        export.write(config, data)
