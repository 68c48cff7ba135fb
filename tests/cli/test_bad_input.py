"""Bad input through the entry points: one line that names the parameter and its value, and no debris."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import COLOURS, SMALL, Place, Result, check_refusal, refused, run_id, write_images

from attribution.cli.main import run_command

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
NOTHING: dict[str, Any] = {"dataset": None, **dict.fromkeys(SMALL), "jobs": 1}


@pytest.fixture(scope="module")
def place(finished, new_place: Callable[..., Place]) -> Place:
    """A store with one finished run of finetune, trak and ablation each."""
    return new_place("bad", like=finished[0])


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"arms": "oracle"}, ["arms=oracle", "label_noise above 0"]),
        ({"arms": "balanced", "groups": "auto"}, ["arms=balanced", "use label or a column"]),
        ({"groups": "camera"}, ["groups=camera: no such column"]),
        ({"action": "keep"}, ["action=keep", "relabel"]),
        ({"shortcut": "path"}, ["shortcut=path", "patch"]),
        ({"shortcut": "patch", "image_size": 4}, ["image_size=4", "shortcut=patch"]),
    ],
)
def test_what_the_arms_lack_is_told_before_anything_is_trained(place, given, fragments) -> None:
    refused(place, "ablation", *fragments, **given, seed=9)  # whose checkpoints are not there yet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images that a test may spoil."""
    return write_images(tmp_path / "images", per_class=6)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("preset", "digit", "digits"),
        ("dataset", "missing/", "missing folder"),
        ("dataset", "/nowhere/at/all", "missing folder"),
        ("dataset", "nobody/nothing-at-all", "cannot be loaded"),
        ("model", "nobody/nothing-at-all", "cannot be loaded"),
        ("classes", "blue,gren", "did you mean green"),
        pytest.param("classes", "red", "at least 2"),
        ("image_size", "0", "at least 1"),
        ("label_noise", "1", "below 1"),
        ("data_seed", "-1", "at least 0"),
        ("epochs", "two", "a whole number"),
        ("epochs", "1.5", "a whole number"),
        ("learning_rate", "nan", "finite"),
        ("learning_rate", "0", "above 0"),
        ("learning_rate", "fast", "a number"),
        ("batch_size", "1", "at least 2"),
        ("subset_fraction", "1.1", "at most 1"),
        ("num_models", "0", "at least 1"),
        ("augment", "flop", "flip"),
        ("precision", "float16", "bfloat16"),
        ("on_bad_image", "ignore", "skip"),
        ("jobs", "-1", "at least 0"),
        ("backend", "rays", "did you mean ray"),
        ("gpus_per_task", "-0.5", "at least 0"),
        ("device", "gpu", "cuda"),
        ("device", "cuda:99", "device=cpu"),
    ],
)
def test_a_bad_value_of_a_data_or_training_parameter(place, name, value, says) -> None:
    shown = "classes=gren" if "gren" in value else f"{name}={value}"
    refused(place, "finetune", name, shown, says, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("frac", "0", "between 0 and 1"),
        ("frac", "1", "between 0 and 1"),
        ("frac", "-0.1", "between 0 and 1"),
        ("frac", "abc", "'abc'"),
        ("frac", "0.05,x", "'x'"),
        ("frac", "0.05,", "''"),
        ("frac", "nan", "between 0 and 1"),
        ("frac", "0.001", "removes none of the 24"),
        ("frac", "0.95", "use at most 0.75"),
        ("metric", "balanced", "balanced_accuracy"),
        ("contrasts", "harmful-los", "los is not compared"),
        ("num_seeds", "1", "at least 2"),
        ("arms", "harmfull", "did you mean harmful"),
        ("groups", "colour", "no such column"),
        ("groups", "is_flipped", "two values"),
        ("group_weights", "exploss", "exp_loss"),
        ("proj_dim", "0", "at least 1"),
        ("projector", "gauss", "sketch"),
        ("feature_precision", "float16", "bfloat16"),
        ("lambda_reg", "-1", "at least 0"),
    ],
)
def test_a_bad_value_of_a_trak_or_ablation_parameter(place, name, value, says) -> None:
    refused(place, "ablation", f"{name}={value}", says, **{name: value})


def test_features_longer_than_the_training_set_without_a_ridge(place) -> None:
    """Before anything is trained: 24 training examples cannot fill 25 dimensions."""
    given = {"lambda_reg": 0, "epochs": 3}
    for stage in ("trak", "ablation"):
        refused(place, stage, "proj_dim=25", "24 training", "lambda_reg=0", proj_dim=25, **given)
    assert not [run for run in place.runs("finetune") if run.data.params["epochs"] == "3"]


def test_an_unknown_flag_is_answered_with_the_nearest(place) -> None:
    result = refused(place, "trak", "--epoch", "--epochs", epoch=3)
    assert not result.runs
    refused(place, "finetune", "--frac", "no such parameter", frac=0.1)  # of another stage


def test_the_command_line_tool_exits_with_2_and_one_line(place: Place) -> None:
    """In a process of its own, where it costs no slow import."""
    import subprocess
    import sys

    from places import ROOT, child_environment

    command = [sys.executable, "-m", "scripts.ablation", "--num_seeds", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(place), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: num_seeds=1: must be at least 2\n"


# -- data ------------------------------------------------------------------------------------------


def test_too_few_images(place: Place, folder: Path) -> None:
    for file in sorted((folder / "red").iterdir())[2:]:
        file.unlink()
    given = {"dataset": folder, "small_classes": "stop"}
    refused(place, "finetune", f"dataset={folder}", "'red' has 2", "3", **given)


def test_a_folder_without_images(place: Place, tmp_path: Path) -> None:
    refused(place, "finetune", f"dataset={tmp_path}", "class subfolders", dataset=tmp_path)


def test_a_file_in_place_of_a_folder(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "images.zip"
    file.write_bytes(b"")
    refused(place, "finetune", f"dataset={file}", "is a file", dataset=file)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_a_damaged_image_stops_the_run_or_is_skipped_and_counted(
    place: Place, folder: Path, damage: str
) -> None:
    file = folder / "green" / "02.png"
    content = {"text": b"not an image", "truncated": file.read_bytes()[:200], "empty": b""}
    file.write_bytes(content[damage])
    refused(place, "finetune", f"dataset={folder}", "02.png", "on_bad_image=skip", dataset=folder)
    if damage == "truncated":
        result = place.done("finetune", dataset=folder, on_bad_image="skip")
        assert "1 undecodable files skipped" in result.err
        [entry] = result.runs[0].inputs.dataset_inputs
        assert json.loads(entry.dataset.profile)["num_rows"] == 3 * 6 - 1


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_an_unknown_column(place: Place, tmp_path: Path, option: str) -> None:
    import datasets

    files = sorted(write_images(tmp_path / "files", 4).glob("*/*.png"))
    rows = {
        "picture": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "kind": [i // 4 for i in range(len(files))],
    }
    kinds = datasets.ClassLabel(names=list(COLOURS))
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / "t.parquet")
    near = {"image_column": "picture", "label_column": "kind"}[option]
    given = {"dataset": tmp_path / "hub", option: f"{near}s"}
    refused(place, "finetune", f"{option}={near}s", f"did you mean {near}", **given)


# -- what turns out while computing ----------------------------------------------------------------


def test_images_too_small_for_the_strides(place: Place, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 4, "hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))
    model.save_pretrained(tmp_path / "model")
    refused(place, "finetune", "image_size=16", "strides", model=tmp_path / "model")


@pytest.mark.parametrize("stage", ["finetune", "ablation"])
def test_diverging_training(place: Place, stage: str) -> None:
    result = refused(place, stage, "learning_rate=", "smaller", learning_rate=1e9)
    assert len(result.runs) == {"finetune": 1, "ablation": 2}[stage]


def test_a_singular_gram_matrix_and_the_same_again(place: Place, tmp_path: Path) -> None:
    """As many features as training examples, of which some are the same."""
    images = write_images(tmp_path / "images")
    for folder in images.iterdir():
        for i in range(1, 6):
            shutil.copy(folder / "00.png", folder / f"{i:02d}.png")
    given = {"dataset": images, "lambda_reg": 0, "proj_dim": 24}
    place.done("finetune", dataset=images)
    for _ in range(2):  # what the first call left must not change the answer
        result = place.run("trak", **given)  # the features are finished, and kept
        check_refusal(result, "singular with lambda_reg 0", "use a larger lambda_reg")
        assert not result.made()


# -- runs built on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "upstream"), [("ablation", "trak"), ("trak", "finetune")])
def test_an_upstream_run_that_cannot_be_built_on(place: Place, stage: str, upstream: str) -> None:
    name, client = f"{upstream}_run_id", place.client()
    experiment = client.get_experiment_by_name(place.experiment).experiment_id
    refused(place, stage, f"{name}=0123", "no such run", **NOTHING | {name: "0123"})
    unfinished = client.create_run(experiment, tags={"stage": upstream}).info.run_id
    refused(place, stage, f"{name}={unfinished}", "not FINISHED", **NOTHING | {name: unfinished})
    client.set_terminated(unfinished, "FAILED")
    refused(place, stage, f"{name}={unfinished}", "is FAILED", **NOTHING | {name: unfinished})
    other = run_id(place, {"trak": "finetune", "finetune": "trak"}[upstream])
    refused(place, stage, f"{name}={other}", f"not {upstream}", **NOTHING | {name: other})
    pointer = place.done(upstream).run_id
    refused(place, stage, f"{name}={pointer}", "only points to", **NOTHING | {name: pointer})


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("ablation", "frac", 0.001),
        ("finetune", "subset_fraction", 0.01),
        ("evaluate", "alpha", 0.01),
    ],
)
def test_a_share_that_comes_to_nothing_is_refused_before_anything_is_trained(
    place: Place, stage: str, name: str, value: float
) -> None:
    def finished() -> set[str]:
        runs = place.runs("finetune")
        return {run.info.run_id for run in runs if run.info.status == "FINISHED"}

    before = finished()
    refused(place, stage, f"{name}={value:g}:", "or more", **{name: value, "seed": 77})
    assert finished() == before


def test_a_parameter_that_contradicts_the_run_built_on(place: Place) -> None:
    named = NOTHING | {"trak_run_id": run_id(place, "trak")}
    refused(place, "ablation", "epochs=3", "epochs=2", **named | {"epochs": 3})
    refused(place, "ablation", "proj_dim=33", "proj_dim=32", **named | {"proj_dim": 33})
    named = NOTHING | {"finetune_run_id": run_id(place, "finetune")}
    refused(place, "trak", "seed=5", "seed=0", **named | {"seed": 5})


def test_a_folder_that_changed_since_the_run_built_on(place: Place, folder: Path) -> None:
    from PIL import Image

    made = place.done("trak", dataset=folder)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "red" / "00.png")
    named = NOTHING | {"trak_run_id": made.run_id}
    refused(place, "ablation", f"trak_run_id={made.run_id}", "other data", **named)
    named = NOTHING | {"finetune_run_id": made.tags["finetune_run_id"]}
    refused(place, "trak", "finetune_run_id=", "other data", **named)


@pytest.mark.parametrize("how", ["value", "dtype", "shape"])
def test_tampered_scores(place: Place, new_place: Callable[..., Place], how: str) -> None:
    copy = new_place("tampered", like=place)
    file = copy.artifacts(run_id(copy, "trak")) / "scores" / "scores.npy"
    values = np.load(file)
    values[3, 2] = -values[3, 2]
    np.save(file, {"value": values, "dtype": values.astype("f8"), "shape": values[1:]}[how])
    refused(copy, "ablation", "scores=", "hash", frac=0.2)


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["finetune", "trak", "ablation", "explain"])
def test_a_cache_that_cannot_be_written(place: Place, tmp_path: Path, stage: str) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    refused(place, stage, f"cache_dir={cache}", "cannot be written", cache_dir=cache)


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_a_file_store(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, scheme: str
) -> None:
    uri = f"{scheme}{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    code = run_command("finetune", place.argv("finetune"))
    said = capsys.readouterr()
    check_refusal(Result(code, said.out, said.err, []), f"MLFLOW_TRACKING_URI={uri}")
    assert not (tmp_path / "mlruns").exists()


def test_an_error_does_not_hide_a_later_success(place: Place, folder: Path) -> None:
    """The same command works once its cause is gone, and does not reuse the failed run."""
    given = {"dataset": folder, "data_seed": 3}
    file = folder / "blue" / "01.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    refused(place, "finetune", "cannot be decoded", **given)
    file.write_bytes(whole)
    assert place.done("finetune", **given).made() == {"finetune"}
    shutil.rmtree(folder)
    refused(place, "finetune", f"dataset={folder}", "missing folder", **given)


@pytest.mark.parametrize("n", [3, 7, 9, 23, 97, 1079, 5989, 123_457])
def test_the_smallest_share_that_is_advised_is_accepted(n: int) -> None:
    import re
    from types import SimpleNamespace

    from toy import toy_config

    from attribution.errors import InputError
    from attribution.experiments import evaluation
    from attribution.experiments.arms import check_fracs
    from attribution.models.checkpoints import check_subset_fraction

    data, plain = SimpleNamespace(rows=lambda _: range(n)), {"brittleness_targets": 0}
    checks = [
        lambda share: check_fracs([share], np.zeros(n, np.int64)),
        lambda share: evaluation.check(toy_config(alpha=share, **plain), data),
        lambda share: check_subset_fraction(toy_config(subset_fraction=share), n),
    ]
    for check in checks:
        with pytest.raises(InputError) as caught:
            check(1e-7)
        check(float(re.search(r"use (\S+) or more", str(caught.value))[1]))
