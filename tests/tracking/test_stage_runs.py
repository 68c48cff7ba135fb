"""Runs found again and read back: with their upstream, with long parameters, in a store that can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from places import Place
from toy import toy_config, toy_data

from attribution.errors import InputError
from attribution.tracking import stage_runs
from attribution.tracking.artifacts import artifact_path
from attribution.tracking.database import open_store
from attribution.tracking.run_lifecycle import find_run, open_run


@pytest.fixture
def place(new_place: Callable[..., Place]) -> Iterator[Place]:
    """An empty store, which MLflow uses during the test."""
    place = new_place("runs")
    with place.active():
        yield place


def finished(**tags: str) -> str:
    with open_run(tags=tags) as run:
        mlflow.log_text("x", "suspects.csv")
        for name in ("scores.npy", "train.parquet", "targets.parquet", "metadata.json"):
            mlflow.log_text("x", f"scores/{name}")
    return run.info.run_id


def gone_for_good(place: Place, run_id: str) -> None:
    """As `mlflow gc` does."""
    from mlflow.tracking._tracking_service.utils import _get_store

    place.client().delete_run(run_id)
    _get_store()._hard_delete_run(run_id)


def in_the_bin(place: Place, run_id: str) -> None:
    place.client().delete_run(run_id)


@pytest.mark.parametrize("delete", [in_the_bin, gone_for_good])
def test_a_run_whose_upstream_is_gone_is_not_found_again(place, delete, tmp_path: Path) -> None:
    config, data = toy_config(), toy_data(tmp_path / "data")
    above = finished(stage="finetune")
    key = stage_runs.fingerprint("trak", config, data)
    trak = finished(stage="trak", fingerprint=key, finetune_run_id=above)
    with open_run():
        assert stage_runs.find_finished("trak", config, data) == trak
        assert stage_runs.lineage(trak) == {"trak": trak, "finetune": above}
        delete(place, above)
        assert stage_runs.find_finished("trak", config, data) is None
        assert stage_runs.lineage(trak) == {"trak": trak}
    assert find_run(above) is None and find_run(trak) is not None
    assert not stage_runs.is_whole("finetune", above, config)
    with pytest.raises(InputError, match=f"run {above}: "):
        artifact_path(above, "suspects.csv")


def test_a_finetune_run_is_whole_with_a_model_of_every_epoch_of_every_run(
    place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(stage_runs, "has_artifact", lambda run, path: not asked.append(path))
    config = toy_config(num_models=2, checkpoint_epochs="last:2")
    assert stage_runs.is_whole("finetune", finished(stage="finetune"), config)
    models = [f"checkpoint_{m:03d}/model.safetensors" for m in range(4)]
    assert asked == ["training/logits.npz", *models]


@pytest.mark.parametrize("length", [5999, 6000, 6001, 20_000])
def test_a_parameter_of_any_length_is_read_back_in_full(place, length: int) -> None:
    classes = ("a class," * 3000)[:length]
    config = toy_config(classes=classes)
    with open_run() as run:
        stage_runs.log_params(config.group("data"))
        stage_runs.log_environment("finetune", config)
    found = stage_runs.params_of(place.client().get_run(run.info.run_id))
    assert found["classes"] == classes
    assert found["dataset"] == config.dataset


@pytest.mark.parametrize("location", ["file", "foo://bucket/runs"])
def test_an_artifact_store_that_cannot_be_written_is_refused(place, location, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    where = str(tmp_path / "file") if location == "file" else location
    number = place.client().create_experiment("elsewhere", where)
    refused = pytest.raises(InputError, match="^artifact store .*: cannot be written")
    with refused, open_run(experiment_id=number):
        stage_runs.log_environment("finetune", toy_config())


def test_what_is_logged_is_there_at_once_also_where_mlflow_logs_later(place, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    open_store(place.cache)
    with open_run(tags={"stage": "finetune"}) as run:
        mlflow.set_tags({"fingerprint": "abc"})
        assert stage_runs.run_tags(run.info.run_id)["fingerprint"] == "abc"
