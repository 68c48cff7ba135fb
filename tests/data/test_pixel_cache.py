"""attribution/data/pixel_cache.py."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from image_folders import fails, picture, png, write_classes
from PIL import Image

from attribution.data import dataset, pixel_cache, sources
from attribution.data.decoding import decode_image


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
    original, started, made = pixel_cache._decode_all, threading.Event(), []

    def slow(*args):
        made.append(args)
        started.set()
        time.sleep(0.5)
        return original(*args)

    monkeypatch.setattr(pixel_cache, "_decode_all", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(load, root)
        assert started.wait(30)
        second = pool.submit(load, root)
    assert (first.result().pixels() == second.result().pixels()).all()
    assert len(made) == 1


def test_what_a_killed_process_left_of_a_cache_is_replaced(load, root) -> None:
    file = load(root).pixels_file
    expected = file.read_bytes()
    # Some images are decoded, and the list of skipped ones is not written yet or cut off.
    for skipped in (None, "", "{"):
        file.write_bytes(expected[:300] + bytes(len(expected) - 300))
        file.with_name("skipped.json").unlink()
        if skipped is not None:
            file.with_name("skipped.json").write_text(skipped)
        unfinished = file.parent.with_name(f".{file.parent.name}.abc") / file.parent.name
        unfinished.mkdir(parents=True)
        (unfinished / "pixels.npy").write_bytes(expected[:300])
        assert load(root).pixels_file.read_bytes() == expected
        assert sorted(path.name for path in file.parent.iterdir()) == ["pixels.npy", "skipped.json"]
        assert [path.name for path in file.parent.parent.iterdir()] == [file.parent.name]


def test_a_file_that_changes_while_it_is_read_is_named(load, root, tmp_path, monkeypatch) -> None:
    list_data = dataset.list_data

    def then_changed(config: Any) -> Any:
        listing = list_data(config)
        sorted(root.rglob("*.png"))[0].write_bytes(png(12345))
        return listing

    monkeypatch.setattr(dataset, "list_data", then_changed)
    fails(load, root, sorted(root.rglob("*.png"))[0].name, "changed while it was read")
    monkeypatch.setattr(dataset, "list_data", list_data)
    assert load(root).pixels().shape[0]


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


@pytest.mark.parametrize("most", [0, 1 << 30], ids=["forks", "threads"])
def test_rows_close_up_where_images_are_damaged(load, root, monkeypatch, most: int) -> None:
    """The first, the last and several neighbours in the order of the digests, by forks and threads."""
    monkeypatch.setattr(sources, "MANY", most)
    files = sorted(root.rglob("*.png"), key=lambda file: sources.digest(file.read_bytes()))
    bad = [files[i] for i in (0, 7, 8, 24)]
    for i, file in enumerate(bad):
        file.write_bytes(file.read_bytes()[: 60 + i])
    fails(load, root, "and 3 others cannot be decoded")
    loaded = load(root, on_bad_image="skip")
    assert loaded.skipped == tuple(sorted(str(file.relative_to(root)) for file in bad))
    assert loaded.pixels_file.stat().st_size == 128 + 21 * 8 * 8 * 3
    for row in loaded.examples.itertuples():
        expected = decode_image(Image.open(root / row.file_name), 8)
        assert (loaded.pixels()[row.Index] == expected).all()


@pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")
def test_a_disk_that_takes_no_more_is_told_by_forks_too(load, root, monkeypatch) -> None:
    import resource

    monkeypatch.setattr(sources, "MANY", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        fails(load, root, "cache_dir=", "cannot be written (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_changed_file_is_named_by_forks_too(load, root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MANY", 0)
    test_a_file_that_changes_while_it_is_read_is_named(load, root, tmp_path, monkeypatch)
