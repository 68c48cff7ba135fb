"""Workers that start while the command still imports."""

from __future__ import annotations

import os

import pytest

from attribution.cli import workers
from attribution.cli.main import run_command
from attribution.runtime import parallel
from attribution.runtime.parallel import end_workers, start_workers


def test_early_workers_end_with_an_error_of_the_command(
    new_place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: set[int] = set()

    def start(*given) -> None:
        start_workers(*given)
        pids.update(parallel.reusable_executor._executor._processes)

    monkeypatch.setattr(parallel, "start_workers", start)
    end_workers()
    place = new_place("early")
    argv = place.argv("finetune", dataset="/nowhere", jobs=2)
    with place.active():
        assert run_command("finetune", argv, early_workers=True) == 2
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    "given", [{"jobs": 1}, {"backend": "ray", "jobs": 2}, {"device": "cuda", "jobs": 2}]
)
def test_no_worker_starts_early_if_tasks_run_elsewhere(
    given: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list = []
    monkeypatch.setattr(parallel, "start_workers", lambda *given: started.append(given))
    workers.start("finetune", given)
    assert not started
    workers.start("finetune", {"device": "cpu", "jobs": 2})
    assert len(started) == 1
