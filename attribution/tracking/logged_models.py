"""Checkpoints as MLflow models, which `mlflow.transformers` and `mlflow.pyfunc` load.

The from_pretrained folder itself is the model's artifact: it only gets the files beside the weights
that MLflow's transformers flavor looks for. So weights are stored once, and no model is built for that.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, DataType, Schema

from attribution.runtime.safe_files import read_json
from attribution.tracking.run_lifecycle import current_run

WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PACKAGES = ("mlflow", "torch", "torchvision", "transformers", "pillow")  # to load it elsewhere
SIGNATURE = ModelSignature(  # a picture's path or address; its classes with their scores
    inputs=Schema([ColSpec(DataType.string)]),
    outputs=Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")]),
)


@dataclass(frozen=True)
class TrainedModel:
    """A model to log.

    Attributes:
        folder: that from_pretrained loads, preprocessing included.
        metrics: equally named for all models of a run; they stand below `checkpoint/` in the run.
        tags: of the model.
    """

    folder: Path
    metrics: Mapping[str, float]
    tags: Mapping[str, str] = field(default_factory=dict)


def log_models(models: Mapping[str, TrainedModel]) -> None:
    """Log models by name to the active run, linked with its parameters and its data set."""
    client, active = mlflow.MlflowClient(), current_run()
    run: Any = client.get_run(active.run_id)
    data = run.inputs.dataset_inputs[0].dataset
    for step, (name, each) in enumerate(models.items()):
        model = client.create_logged_model(
            active.experiment_id,
            name,
            source_run_id=active.run_id,
            tags=dict(each.tags),
            params=run.data.params,
            model_type="image-classification",
        )
        _add_mlflow_files(each.folder, model)
        client.log_model_artifacts(model.model_id, str(each.folder))
        client.log_outputs(active.run_id, [LoggedModelOutput(model.model_id, step)])
        client.finalize_logged_model(model.model_id, "READY")
        shown = {f"checkpoint/{key}": value for key, value in each.metrics.items()}
        mlflow.log_metrics(shown, step, run_id=active.run_id, model_id=model.model_id, dataset=data)


def _add_mlflow_files(folder: Path, model: LoggedModel) -> None:
    """Turn a from_pretrained folder into an MLflow model, in place."""
    components = folder / "components" / "image_processor"
    components.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / PREPROCESSOR, components / PREPROCESSOR)
    (folder / "requirements.txt").write_text(
        "".join(f"{name}=={version(name)}\n" for name in PACKAGES)
    )
    described = Model(
        model_id=model.model_id,
        model_uuid=model.model_id,
        run_id=model.source_run_id,
        artifact_path=model.artifact_location,
        signature=SIGNATURE,
    )
    described.add_flavor(
        "transformers",
        task="image-classification",
        instance_type="ImageClassificationPipeline",
        pipeline_model_type=read_json(folder / "config.json")["architectures"][0],
        model_binary=".",
        components=["image_processor"],
        image_processor_type=read_json(folder / PREPROCESSOR)["image_processor_type"],
    )
    mlflow.pyfunc.add_to_model(described, loader_module="mlflow.transformers")
    described.save(str(folder / "MLmodel"))
