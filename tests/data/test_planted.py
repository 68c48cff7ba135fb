"""attribution/data/planted.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_folders import sizes, write_classes

from attribution.data.splits import SPLITS


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
