"""The note of an ablation's run."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest

from scripts.ablation import NOTED, describe


@pytest.mark.parametrize("count", [3, 300])
def test_the_note_of_very_many_arms_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    none = {"arm": "none", "action": "remove", "frac": 0.0, "n_removed": 0}
    arms = [{**none, "frac": i / 1000, "accuracy_mean": i / count} for i in range(count)]
    with mlflow.start_run():
        runs = []
        for arm in arms:
            with mlflow.start_run(nested=True) as run:
                mlflow.log_metric("accuracy_mean", arm["accuracy_mean"])
                runs.append(run.info.run_id)
        note = describe(pd.DataFrame(arms), "a" * 32)
    shown = min(count, NOTED)
    assert len(note) < 8000
    assert all((run in note) == (i >= count - shown) for i, run in enumerate(runs))
    assert note.count("\n- **none") == shown
    assert ("and 260 more" in note) == (count == 300)
