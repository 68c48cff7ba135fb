"""`--num_splits`: one ablation for each split below one run, with the split as the unit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from places import Place, Result, refused, write_images
from scipy import stats

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def place(finished: tuple[Place, Result], new_place: Callable[..., Place]) -> Place:
    return new_place("splits", like=finished[0])


def test_the_summary_follows_from_the_metrics_of_each_split_s_run(place: Place) -> None:
    first = place.runs("ablation")[0].info.run_id  # of data_seed 0, which a command had made before
    result = place.done("ablation", num_splits=2)
    parent = result.runs[0]
    assert parent.data.tags["stage"] == "splits" and parent.info.status == "FINISHED"
    below = place.children(parent.info.run_id)
    assert len(below) == 2
    assert below[0].data.tags["reused_run_id"] == first
    ids = [first, below[1].info.run_id]
    each = []
    for run_id in ids:
        arms = {run.data.params["arm"]: run for run in place.children(run_id)}
        harmful, random = (
            [
                m.value
                for m in place.client().get_metric_history(arms[arm].info.run_id, "seed/accuracy")
            ]
            for arm in ("harmful", "random")
        )
        each.append(np.mean(np.subtract(harmful, random)))
    table = pd.read_csv(place.artifacts(parent.info.run_id) / "splits.csv").set_index("arm")
    row = table.loc["harmful"]
    assert row["accuracy_vs_random"] == pytest.approx(np.mean(each))
    if np.ptp(each) > 0:
        assert row["accuracy_vs_random_p"] == pytest.approx(stats.ttest_1samp(each, 0).pvalue)
    rows = json.loads((place.artifacts(parent.info.run_id) / "by_split.json").read_text())
    assert set(ids) == {row[rows["columns"].index("run_id")] for row in rows["data"]}
    assert "over 2 splits" in result.out and all(run_id in result.out for run_id in ids)


def test_what_is_of_one_split_is_refused(place: Place, tmp_path: Path) -> None:
    words = "is of one split; leave it out"
    refused(place, "ablation", f"output={tmp_path}", words, num_splits=2, output=tmp_path)


def test_a_data_set_with_parts_of_its_own_has_one_split(place: Place, tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "val", "test")):
        write_images(tmp_path / part, 4, seed)
    refused(place, "ablation", "num_splits=2", "--resplit", dataset=tmp_path, num_splits=2)
