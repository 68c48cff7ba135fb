"""The note of an ablation's run."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from attribution.reporting import ablation_record
from attribution.reporting.ablation_record import MOST_ARMS


@pytest.mark.parametrize("count", [3, 300])
def test_the_note_of_very_many_arms_is_whole(count: int) -> None:
    none = {
        "arm": "none",
        "action": "remove",
        "frac": 0.0,
        "n_removed": 0,
        "metric": "accuracy",
        "verdict": "",
    }
    arms = [{**none, "frac": i / 1000, "accuracy_mean": i / count} for i in range(count)]
    runs = [f"{i:032x}" for i in range(count)]
    job = SimpleNamespace(experiment_id="7", run_id="b" * 32, run_ids={"trak": "a" * 32})
    note = ablation_record._note(job, SimpleNamespace(table=pd.DataFrame(arms)), runs)
    shown = min(count, MOST_ARMS)
    assert len(note) < 8000
    assert all((run in note) == (i >= count - shown) for i, run in enumerate(runs))
    assert "a" * 32 in note and "b" * 32 in note
