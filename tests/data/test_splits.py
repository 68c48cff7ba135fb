"""attribution/data/splits.py."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.data import splits
from attribution.data.splits import SPLITS


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
    table = pd.DataFrame(rows, columns=["digest", "label", "role"])
    split = splits.carve(table, seed)
    assert (split == splits.carve(table, seed)).all()
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
    assert (splits.carve(shuffled, seed) == shuffled["split"]).all()


@pytest.mark.parametrize("sizes", [[1, 1, 8], [8, 1, 1], [5, 5, 5], [1, 1, 1], [9, 1, 9, 1]])
def test_many_copies_leave_an_image_for_every_split(sizes) -> None:
    split = splits._divide({str(i): size for i, size in enumerate(sizes)}, ["test", "validation"])
    assert set(split.values()) == set(SPLITS)


def test_splits_depend_on_data_seed(load, root) -> None:
    first, again, other = load(root), load(root), load(root, data_seed=1)
    assert first.examples.equals(again.examples) and first.fingerprint == again.fingerprint
    assert set(first.table("test")["example_id"]) != set(other.table("test")["example_id"])
    assert other.fingerprint != first.fingerprint
