"""The record of an ablation: its note must stay within what MLflow shows."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from attribution.reporting.ablation_record import MOST_ARMS, _note

RUN, TRAK = "a" * 32, "b" * 32


@pytest.mark.parametrize("count", [3, 300])
def test_the_note_of_very_many_arms_names_the_best_and_is_not_cut_off(count: int) -> None:
    none = {"arm": "none", "action": "remove", "frac": 0.0, "n_removed": 0}
    arms = [{**none, "frac": i / 1000, "accuracy_mean": i / count} for i in range(count)]
    children = [f"{i:032x}" for i in range(count)]
    job = SimpleNamespace(experiment_id="0", run_id=RUN, run_ids={"trak": TRAK})
    note = _note(job, SimpleNamespace(table=pd.DataFrame(arms)), children)
    shown = min(count, MOST_ARMS)
    assert len(note) < 8000  # MLflow cuts off what is longer
    assert RUN in note and TRAK in note
    assert all((run in note) == (i >= count - shown) for i, run in enumerate(children))
    assert note.count("\n- **none") == shown
    assert ("and 260 more" in note) == (count == 300)
