"""Checkpoints as MLflow models: they load and predict as the checkpoint, are stored once, and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from places import Place
from scipy.special import softmax

from attribution.tracking import artifacts
from attribution.tracking.logged_models import WEIGHTS, TrainedModel
from attribution.tracking.record import Record, log_record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logged(new_place: Any, ensemble: Any) -> Any:
    """A place, a run with two models, and the data and checkpoints that they are of."""
    place: Place = new_place("models")
    data, finetuned = ensemble
    with place.active(), mlflow.start_run() as run:
        table = mlflow.data.from_pandas(data.examples[["label"]], name="toys", digest="d1")
        mlflow.log_input(table)
        mlflow.log_param("epochs", 3)
        folders = enumerate(finetuned.folders)
        models = {f"checkpoint_{m:03d}": TrainedModel(f, {"accuracy": m / 4}) for m, f in folders}
        log_record(Record(models=models))
        yield place, run.info.run_id, data, finetuned


def picture(data: Any, folder: Path) -> str:
    file = folder / "x.png"
    Image.fromarray(np.array(data.pixels()[data.rows("validation")[0]])).save(file)
    return str(file)


def test_each_model_predicts_a_picture_file_as_its_checkpoint_does(logged, tmp_path) -> None:
    place, run_id, data, finetuned = logged
    file = picture(data, tmp_path)
    for m, model in enumerate(place.models(run_id)):
        p = softmax(finetuned.members.validation_logits[m][0])
        expected = dict(zip(data.class_names, p, strict=True))
        for uri in (f"models:/{model.model_id}", f"runs:/{run_id}/checkpoint_{m:03d}"):
            pipeline = mlflow.transformers.load_model(uri)
            found = {each["label"]: each["score"] for each in pipeline(file)}
            assert found == pytest.approx(expected, abs=1e-5)
        answer = mlflow.pyfunc.load_model(uri).predict(file)
        found = {each["label"]: each["score"] for each in answer.iloc[0]}
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_model_has_its_metrics_its_data_set_and_the_parameters_of_its_run(logged) -> None:
    place, run_id, *_ = logged
    for m, model in enumerate(place.models(run_id)):
        [metric] = model.metrics
        assert (metric.key, metric.value, metric.step) == ("checkpoint/accuracy", m / 4, m)
        assert (metric.dataset_name, metric.dataset_digest) == ("toys", "d1")
        assert model.params == {"epochs": "3"} and model.status == "READY"
    outputs = place.client().get_run(run_id).outputs.model_outputs
    assert {each.model_id for each in outputs} == {m.model_id for m in place.models(run_id)}


def test_weights_are_stored_once_and_deleted_with_their_model(logged) -> None:
    place, run_id, _, finetuned = logged
    stored = [file.read_bytes() for file in (place.root / "artifacts").rglob(WEIGHTS)]
    assert sorted(stored) == sorted((f / WEIGHTS).read_bytes() for f in finetuned.folders)
    assert artifacts.has_artifact(run_id, f"checkpoint_001/{WEIGHTS}")
    assert not artifacts.has_artifact(run_id, f"checkpoint_002/{WEIGHTS}")
    assert artifacts.delete_models(run_id, ["checkpoint_001", "checkpoint_002"]) == 1
    assert [model.name for model in place.models(run_id)] == ["checkpoint_000"]
    assert len(list((place.root / "artifacts").rglob(WEIGHTS))) == 1
    assert not artifacts.has_artifact(run_id, f"checkpoint_001/{WEIGHTS}")
