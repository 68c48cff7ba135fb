"""attribution/data/hub_format.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_folders import camera, fails, hub_dataset, png, sizes, with_column, write_parquet


def test_hub_format_with_train_and_validation(load, tmp_path) -> None:
    folder = write_parquet(
        tmp_path / "hub", train=hub_dataset(0, [10, 5]), validation=hub_dataset(50, [3, 2])
    )
    loaded = load(folder)
    assert loaded.class_names == ("pizza", "apple") and sizes(loaded) == [12, 5, 3]
    assert set(loaded.table("validation")["file_name"]) == {f"{i}.png" for i in range(50, 55)}


def test_unlabelled_test_part_is_not_used(load, tmp_path) -> None:
    folder = write_parquet(
        tmp_path / "hub",
        train=hub_dataset(0, [5, 5]),
        test=hub_dataset(30, [2, 2], labels=False),
        validation=hub_dataset(50, [3, 2]),
    )
    found = load(folder).table("validation")
    assert set(found["file_name"]) == {f"{i}.png" for i in range(50, 55)}


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
    assert load(tmp_path / "plain").class_names == ("a", "b")  # kind: price is no label
    write_parquet(tmp_path / "none", train=part.remove_columns(["label", "thumb", "kind"]))
    fails(load, tmp_path / "none", "label_column", "0 columns", "price")


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
    fails(load, tmp_path / "holes", "2 of 12 images have no label")


def test_labels_of_minus_one_are_explained(load, tmp_path) -> None:
    part = hub_dataset(0, [6, 6]).remove_columns("label").add_column("label", [-1, 1] * 6)
    folder = write_parquet(tmp_path / "hub", train=part)
    says = "6 of 12 images have no label", "-1 mean unlabelled"
    fails(load, folder, *says, label_column="label")


def test_a_null_is_an_image_that_cannot_be_decoded(load, tmp_path) -> None:
    import datasets

    part = hub_dataset(0, [8, 8])
    cells = part.with_format("arrow")[:]["image"].to_pylist()
    cells[3] = None
    part = datasets.Dataset.from_dict(
        {"image": cells, "label": part["label"]}, features=part.features
    )
    folder = write_parquet(tmp_path / "hub", train=part)
    fails(load, folder, "row 3 (train) cannot be decoded", "on_bad_image=skip", "empty")
    loaded = load(folder, on_bad_image="skip")
    assert loaded.skipped == ("row 3 (train)",) and len(loaded.examples) == 15


@pytest.mark.slow
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


def test_a_class_that_the_training_part_does_not_know_is_refused(load, tmp_path) -> None:
    import datasets

    train, test = hub_dataset(0, [12, 12]), hub_dataset(50, [5, 4])
    names = [*train.features["label"].names[:1], "another"]
    test = test.cast_column("label", datasets.ClassLabel(names=names))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    fails(load, tmp_path / "saved", "label_column=label", "'another'")


def test_a_column_that_some_part_lacks_is_not_taken(load, tmp_path) -> None:
    parts = {"train": with_column(0, [12, 12], camera=camera), "test": hub_dataset(50, [3, 3])}
    import datasets

    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert "camera" not in load(tmp_path / "saved", groups="camera").examples


def test_a_group_is_no_list_and_no_image(load, tmp_path) -> None:
    part = hub_dataset(0, [12, 12]).add_column("tags", [["a", "b"]] * 24)
    folder = write_parquet(tmp_path / "hub", train=part)
    for name in ("tags", "image"):
        fails(load, folder, f"column {name} holds", "number or a text", groups=name)


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


def test_a_folder_in_hub_format_cannot_bring_code(load, tmp_path) -> None:
    folder = write_parquet(tmp_path / "hub", train=hub_dataset(0, [6, 6]))
    mark = tmp_path / "executed"
    (folder / "hub.py").write_text(f"open({str(mark)!r}, 'w')\n")
    fails(load, folder, f"dataset={folder}", "scripts are no longer supported")
    assert not mark.exists()


def test_a_column_of_parts_divides_a_data_set_in_one_piece(load, tmp_path) -> None:
    part = with_column(0, [8, 8], split=lambda i: "test" if i % 4 == 0 else "train")
    loaded = load(write_parquet(tmp_path / "set", train=part))
    assert len(loaded.rows("test")) == 4 and sum(sizes(loaded)) == 16
