"""The whole way from images to a comparison in MLflow: each entry point, lineage, reuse, resuming, signs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from places import (
    ROOT,
    SMALL,
    Place,
    child_environment,
    unreadable_artifacts,
    write_images,
)
from scipy.stats import spearmanr

from attribution.config import resolve
from attribution.reporting.ablation_record import HEADLINE
from attribution.tracking import stage_runs

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

METRICS = ("accuracy", "log_loss", "mean_margin", "worst_class_accuracy")
STAGES = ("finetune", "trak", "ablation")
NewPlace = Callable[..., Place]


def comparison(place: Place, run_id: str) -> pd.DataFrame:
    return pd.read_csv(place.artifacts(run_id) / "comparison.csv")


def steps(place: Place, run_id: str, metric: str) -> dict[int, float]:
    return {m.step: m.value for m in place.client().get_metric_history(run_id, metric)}


def tag(place: Place, run_id: str, name: str) -> str | None:
    return place.client().get_run(run_id).data.tags.get(name)


def listing(folder: Path) -> set[str]:
    return {str(file) for file in folder.rglob("*")} if folder.exists() else set()


def beside_the_code() -> tuple[set[str], list[int]]:
    """What a run would change in the project's folder if it used the default store."""
    database = ROOT / "mlflow.db"
    return listing(ROOT / "mlruns"), [database.stat().st_mtime_ns] if database.exists() else []


BEFORE = beside_the_code()

# -- every entry point, through MLproject ----------------------------------------------------------


@pytest.fixture(scope="module")
def projects(new_place: NewPlace) -> tuple[Place, dict[str, str]]:
    """Run ids by entry point in one store; main by `mlflow run`, which takes longer."""
    place, run_ids = new_place("projects"), {}
    given = {"seed": 3, "learning_rate": "1e-3"}
    own = {
        "finetune": {},
        "trak": {},
        "ablation": {"arms": "none,random,helpful,harmful,negative,loss"},
        "evaluate": {"num_subsets": 10, "num_repeats": 1},
        "explain": {"target": 2},
    }
    for entry_point, more in own.items():
        run_ids[entry_point] = place.done(entry_point, **given, **more).run_id
    # What is not said comes from the run that is named.
    main = {name: SMALL[name] for name in ("num_seeds", "arms", "jobs")}
    main |= {"cache_dir": place.cache, "frac": "0.2", "trak_run_id": run_ids["trak"]}
    run_ids["main"] = mlflow_run(place, "main", main)
    return place, run_ids


def mlflow_run(place: Place, entry_point: str, parameters: dict[str, Any]) -> str:
    """The id of the run of `mlflow run . -e ENTRY_POINT`."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        for name, value in child_environment(place).items():
            patch.setenv(name, value)
        submitted = mlflow.projects.run(
            str(ROOT),
            entry_point,
            parameters={name: str(value) for name, value in parameters.items()},
            env_manager="local",
            experiment_name=place.experiment,
        )
    assert submitted.get_status() == "FINISHED"
    return submitted.run_id


def test_every_entry_point_finishes_and_logs_resolved_parameters(projects) -> None:
    from attribution import stages
    from attribution.config import FIELDS

    place, run_ids = projects
    for entry_point, run_id in run_ids.items():
        run = place.client().get_run(run_id)
        stage = "ablation" if entry_point == "main" else entry_point
        assert run.info.status == "FINISHED"
        assert run.data.tags["stage"] == stage
        groups = (*stages.STAGES[stage].all_groups, "execution")
        expected = {name for name, f in FIELDS.items() if f.metadata["group"] in groups}
        assert expected <= run.data.params.keys()
        params = run.data.params
        assert params["epochs"] == "2" and params["image_size"] == "16"
        assert float(params["learning_rate"]) == 1e-3  # MLflow kept its own spelling
        assert params["batch_size"] == "8" and params["model"] == "resnet-mini"
        assert params["dataset"] == str(place.dataset)
        # Left to the preset (images) and to the machine: what they became.
        assert params["weight_decay"] == "0.0005" and params["subset_fraction"] == "0.5"
        assert params["precision"] in ("float32", "bfloat16") and params["device"] == "cpu"
    main = place.client().get_run(run_ids["main"]).data.params
    assert main["frac"] == "0.2" and main["num_seeds"] == "2" and main["lambda_reg"] == "0.1"


def test_a_benchmark_logs_its_table_to_its_own_run(
    projects, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.__main__ import main

    place, _ = projects
    words = ["features", "--settings", "mini-16", "--repeats", "1", "--log"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with place.active():
        main()
    [run] = [run for run in place.runs() if run.data.tags.get("stage") == "benchmark"]
    assert (place.artifacts(run.info.run_id) / "benchmark.json").is_file()


def test_mlflow_run_builds_each_stage_on_the_one_before(projects) -> None:
    place, run_ids = projects
    assert [len(place.runs(stage)) for stage in STAGES] == [1, 1, 2]
    assert tag(place, run_ids["trak"], "finetune_run_id") == run_ids["finetune"]
    for entry_point in ("ablation", "evaluate", "explain", "main"):
        assert tag(place, run_ids[entry_point], "trak_run_id") == run_ids["trak"]
    runs = [place.client().get_run(run_id) for run_id in run_ids.values()]
    assert len({run.data.tags["fingerprint"] for run in runs}) == len(run_ids) == 6
    assert len({run.data.tags["data_fingerprint"] for run in runs}) == 1
    assert all("mlflow.parentRunId" not in run.data.tags for run in runs)
    for run in runs:
        assert [i.dataset.digest for i in run.inputs.dataset_inputs] == [
            run.data.tags["data_fingerprint"][:8]
        ]


def test_checkpoints_are_folders_that_plain_transformers_loads(projects) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    place, run_ids = projects
    checkpoints = place.checkpoints(run_ids["finetune"])
    weights = []
    for checkpoint in checkpoints:
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        processor = AutoImageProcessor.from_pretrained(checkpoint)
        image = Image.open(place.dataset / "red" / "00.png")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 16, 16)
        with torch.no_grad():
            assert model.eval()(pixels).logits.shape == (1, 3)
        weights.append(model.classifier[1].weight.detach().numpy())
    assert not np.array_equal(*weights)
    for m in range(2):
        curve = steps(place, run_ids["finetune"], f"checkpoint_{m:03d}/train_loss")
        assert set(curve) == {0, 1}
    metrics = place.client().get_run(run_ids["finetune"]).data.metrics
    assert {"validation_accuracy_mean", "ensemble_validation_accuracy"} <= metrics.keys()


def test_the_score_artifact_of_mlflow_run(projects) -> None:
    from attribution import load_scores

    place, run_ids = projects
    folder = place.artifacts(run_ids["trak"]) / "scores"
    names = {path.name for path in folder.iterdir()}
    assert {"scores.npy", "train.parquet", "targets.parquet", "metadata.json"} <= names
    matrix = np.load(folder / "scores.npy", mmap_mode="r")
    assert matrix.dtype == np.float32 and matrix.flags.c_contiguous
    with place.active():
        scores = load_scores(f"runs:/{run_ids['trak']}/scores")
        again = load_scores(f"runs:/{run_ids['ablation']}/scores")  # of the run that it builds on
    assert np.array_equal(again.values, scores.values)
    assert np.array_equal(scores.values, matrix)
    assert matrix.shape == (len(scores.train), len(scores.targets)) == (24, 9)
    assert scores.metadata["finetune_run_id"] == run_ids["finetune"]
    assert scores.metadata["fingerprint"] == tag(place, run_ids["trak"], "fingerprint")
    assert scores.metadata["sign"].startswith("positive = helpful")
    top = scores.top(0, 5)
    assert list(top["score"]) == sorted(matrix[:, 0], reverse=True)[:5]
    assert {"alignment", "trust", "self_influence", "loss", "file_name", "true_label"} <= set(
        scores.train
    )


def test_the_comparison_of_mlflow_run_is_one_nested_run_for_each_arm(projects) -> None:
    place, run_ids = projects
    run_id = run_ids["ablation"]
    folder, table = place.artifacts(run_id), comparison(place, run_id)
    assert {path.name for path in folder.iterdir()} == {
        *("comparison.csv", "comparison.json", "comparison.png", "curves.png"),
        *("contrasts.csv", "contrasts.json", "per_class.csv", "per_class.json", "report.html"),
        "environment.json",
    }
    as_json = json.loads((folder / "comparison.json").read_text())
    assert as_json["columns"] == list(table) and len(as_json["data"]) == len(table)
    assert Image.open(folder / "comparison.png").size[0] > 400

    children = {run.info.run_name: run for run in place.children(run_id)}
    assert len(children) == len(table)
    assert {"none", "random", "helpful", "harmful", "negative", "loss"} == set(table["arm"])
    for row in table.to_dict("records"):
        name = row["arm"] if row["arm"] == "none" else f"{row['arm']} {row['frac']:.3g}"
        run = children[name]
        assert run.info.status == "FINISHED"
        assert run.data.params["arm"] == row["arm"]
        assert int(run.data.params["n_removed"]) == row["n_removed"]
        assert float(run.data.params["frac"]) == pytest.approx(row["frac"], abs=1e-5)
        check_metrics(place, run, row)
        check_removed(place.artifacts(run.info.run_id), row)


def check_metrics(place: Place, run: Any, row: dict[str, Any]) -> None:
    """A few figures of accuracy stand first, rounded; the rest lies below `more/`, seeds below `seed/`."""
    metrics = run.data.metrics
    summary = {name.removeprefix("more/"): value for name, value in metrics.items()}
    summary["accuracy_mean"] = summary["accuracy"]
    for metric in METRICS:
        per_seed = steps(place, run.info.run_id, f"seed/{metric}")
        assert sorted(per_seed) == [0, 1]
        mean = summary[f"{metric}_mean"]
        rounded = {"abs": 5.1e-5} if metric == "accuracy" else {}
        assert mean == pytest.approx(np.mean(list(per_seed.values())), **rounded)
        assert summary[f"{metric}_ci_low"] <= mean <= summary[f"{metric}_ci_high"]
        assert row[f"{metric}_mean"] == pytest.approx(mean, **rounded)
    for control in ("random", "none"):
        compared = row["arm"] not in ("none", control) and row["n_removed"] > 0
        names = [f"accuracy_vs_{control}{end}" for end in ("", "_ci_low", "_ci_high", "_p_holm")]
        assert all((name in summary) == compared for name in names)
        assert all((name in metrics) == (compared and control == "random") for name in names)
        if compared:
            low, high = summary[names[1]], summary[names[2]]
            assert low <= summary[names[0]] <= high and 0 <= summary[names[3]] <= 1
            rounded = {"abs": 5.1e-5} if control == "random" else {}
            assert row[names[0]] == pytest.approx(summary[names[0]], **rounded)
    first = [name for name in metrics if "/" not in name and not name.startswith("flips_")]
    assert set(first) <= {"accuracy", *(f"accuracy{end}" for end in HEADLINE)}


def check_removed(folder: Path, row: dict[str, Any]) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names - {"kept.csv"} == {"removed.parquet", "removed.png"}
    assert ("kept.csv" in names) == (row["arm"] not in ("none", "random"))
    removed = pd.read_parquet(folder / "removed.parquet")
    assert removed["position"].is_unique
    assert removed["seeds"].sum() == row["n_removed"] * row["n_seeds"]
    assert removed["seeds"].between(1, row["n_seeds"]).all()


def test_paired_differences_are_those_of_the_seeds(projects) -> None:
    place, run_ids = projects
    runs = place.children(run_ids["main"])
    by_arm = {run.data.params["arm"]: run for run in runs}
    assert set(by_arm) == {"none", "random", "harmful"}
    each = {arm: steps(place, run.info.run_id, "seed/log_loss") for arm, run in by_arm.items()}
    metrics = by_arm["harmful"].data.metrics
    for control in ("none", "random"):
        differences = [each["harmful"][s] - each[control][s] for s in (0, 1)]
        assert metrics[f"more/log_loss_vs_{control}"] == pytest.approx(np.mean(differences))


def test_nothing_is_written_beside_the_code(projects) -> None:
    place, _ = projects
    assert beside_the_code() == BEFORE
    assert listing(place.cache) and listing(place.root / "artifacts")


# -- reuse -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(finished, new_place: NewPlace) -> tuple[Place, Any]:
    """A copy of the place where `ablation` alone made everything, and that command's result."""
    source, first = finished
    place = new_place("chain", like=source)
    return place, replace(first, out=first.out.replace(str(source.root), str(place.root)))


def test_ablation_alone_makes_what_it_needs(chain) -> None:
    place, first = chain
    assert first.made() == set(STAGES)
    [finetune], [trak], [ablation] = (place.runs(stage)[:1] for stage in STAGES)
    assert ablation.info.run_id == first.run_id == first.runs[0].info.run_id
    assert first.tags["trak_run_id"] == trak.info.run_id
    assert trak.data.tags["finetune_run_id"] == finetune.info.run_id
    assert place.unfinished() == {f for f in place.unfinished() if f.startswith("retrainings")}


def test_the_same_command_again_is_answered_by_the_finished_run(chain) -> None:
    place, first = chain
    again = place.done("ablation", jobs=2, preset="images")  # neither changes the result
    assert again.tags["reused_run_id"] == first.run_id
    assert len(again.runs) == 1 and not again.made()
    assert first.run_id in again.err and "nothing has changed" in again.err
    assert again.out == first.out
    assert not place.artifacts(again.run_id).exists()


def test_another_frac_retrains_nothing_upstream(chain) -> None:
    place, first = chain
    other = place.done("ablation", frac=0.2)
    assert other.made() == {"ablation"}
    assert other.tags["trak_run_id"] == first.tags["trak_run_id"]
    assert "6 models, 4 of them to train" in other.err  # the two of `none` are shared
    ours, theirs = (comparison(place, run.run_id).set_index("arm") for run in (other, first))
    assert ours.loc["none", "accuracy_mean"] == theirs.loc["none", "accuracy_mean"]
    assert ours.loc["random", "n_removed"] == 5 and theirs.loc["random", "n_removed"] == 2


@pytest.mark.parametrize(
    ("changed", "made"),
    [
        ({"proj_dim": 16}, {"trak", "ablation"}),
        ({"label_noise": 0.1}, {"finetune", "trak", "ablation"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_parameter_recomputes_what_depends_on_it(chain, changed, made) -> None:
    place, first = chain
    result = place.done("ablation", **changed)
    assert result.made() == made
    assert (result.tags["trak_run_id"] == first.tags["trak_run_id"]) == ("trak" not in made)
    again = place.done("ablation", **changed)
    assert again.tags["reused_run_id"] == result.run_id


def test_every_parameter_changes_the_fingerprint_of_the_stages_that_depend_on_it(tmp_path) -> None:
    from toy import toy_config, toy_data

    from attribution import stages
    from attribution.config import FIELDS
    from attribution.tracking.fingerprint import fingerprint

    data, plain = toy_data(tmp_path), toy_config()
    model, image = tmp_path / "model", tmp_path / "image.png"
    model.mkdir()
    image.write_bytes(b"any content")
    other = {
        "augment": "flip", "model": str(model), "epochs": 3, "learning_rate": 0.02,
        "batch_size": 4, "weight_decay": 0.1, "schedule": "cosine", "patience": 1,
        "precision": "bfloat16", "num_models": 3, "checkpoint_epochs": "last:1", "subset_fraction": 0.7, "seed": 1, "proj_dim": 8, "num_blocks": 2,
        "projector": "normal", "feature_precision": "bfloat16", "lambda_reg": 0.2, "loss_gradient_weight": "none", "train_layers": "head", "frac": "0.3",
        "checkpoints": str(model),
        "arms": "none", "action": "relabel", "metric": "macro_f1", "contrasts": "loss-none", "num_seeds": 3, "groups": "is_flipped", "group_weights": "loss",
        "num_subsets": 11, "num_repeats": 1, "alpha": 0.4, "bank": "folder", "methods": "trak",
        "brittleness_targets": 7, "brittleness_k": 3, "keep_features": "no", "cross_fit": "yes", "target": "1",
        "image": str(image), "label": "dark", "errors": 1, "exact": "yes", "num_examples": 2,
    }  # fmt: skip
    for name, f in FIELDS.items():
        group = f.metadata["group"]
        if group in ("training", "finetune", "trak", "ablation", "evaluate", "explain"):
            changed = toy_config(**{name: other[name]})
            for stage in (*STAGES, "evaluate", "explain"):
                same = fingerprint(stage, plain, data) == fingerprint(stage, changed, data)
                assert same == (group not in stages.STAGES[stage].all_groups), (name, stage)


def test_the_values_of_the_column_that_groups_change_the_ablation_alone(tmp_path) -> None:
    import dataclasses

    from toy import toy_config, toy_data

    from attribution.tracking.fingerprint import fingerprint

    plain, n = toy_data(tmp_path), 64

    def prints(config, **columns: list) -> list[str]:
        data = dataclasses.replace(plain, examples=plain.examples.assign(**columns))
        return [fingerprint(stage, config, data) for stage in ("finetune", "trak", "ablation")]

    grouped, values = toy_config(groups="camera"), ["a", "b"] * (n // 2)
    first = prints(grouped, camera=values)
    assert prints(grouped, camera=list(values)) == first
    assert prints(grouped, camera=values, other=[1] * n) == first
    changed = prints(grouped, camera=[*values[:-1], "a"])
    assert changed[:2] == first[:2] and changed[2] != first[2]
    moved = prints(grouped, camera=[*values[1:], values[0]])
    assert len({first[2], changed[2], moved[2]}) == 3
    by_label = toy_config()
    assert prints(by_label, camera=values) == prints(by_label, camera=values[::-1])


def test_changed_image_content_recomputes_everything(chain, tmp_path: Path) -> None:
    place, first = chain
    folder = tmp_path / "images"
    shutil.copytree(place.dataset, folder)
    copied = place.done("finetune", dataset=folder)
    assert not copied.made()  # the same images under another name
    file = folder / "red" / "03.png"
    before = file.stat()
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # its date says nothing
    changed = place.done("finetune", dataset=folder)
    assert changed.made() == {"finetune"}
    assert changed.tags["data_fingerprint"] != first.tags["data_fingerprint"]


@pytest.mark.parametrize("arms", ["none", "random"])
def test_arms_that_are_only_baselines(chain, arms: str) -> None:
    place, _ = chain
    result = place.done("ablation", arms=arms)
    assert list(comparison(place, result.run_id)["arm"]) == ["none", "random"]


def test_one_finished_stage_serves_commands_that_name_its_run(chain) -> None:
    place, first = chain
    trak_id = first.tags["trak_run_id"]
    small = dict.fromkeys(SMALL)  # everything comes from the named run
    small |= {"dataset": None, "jobs": 1, "num_seeds": 2, "frac": 0.3, "arms": "harmful"}
    result = place.done("ablation", trak_run_id=trak_id, **small)
    assert result.made() == {"ablation"} and result.tags["trak_run_id"] == trak_id
    params = result.runs[0].data.params
    assert params["epochs"] == "2" and params["proj_dim"] == "32" and params["frac"] == "0.3"
    finetune_id = tag(place, trak_id, "finetune_run_id")
    small = {name: None for name in SMALL} | {"dataset": None, "jobs": 1, "proj_dim": 24}
    result = place.done("trak", finetune_run_id=finetune_id, **small)
    assert result.made() == {"trak"} and result.tags["finetune_run_id"] == finetune_id


def lost(place: Place, run_id: str, what: str) -> None:
    path = place.artifacts(run_id) / what
    if what.startswith("checkpoint_"):
        path = place.checkpoints(run_id)[int(what[-3:])] / "model.safetensors"
    path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("trak", "."),
        ("trak", "scores/scores.npy"),
        ("finetune", "."),
        ("finetune", "checkpoint_001"),
    ],
)
def test_a_run_that_lost_an_artifact_is_not_whole(chain, new_place, stage, what) -> None:
    place = new_place("copy", like=chain[0])
    run_id, config = place.runs(stage)[0].info.run_id, resolve({"num_models": 2})
    with place.active():
        assert stage_runs.is_whole(stage, run_id, config)
        lost(place, run_id, what)
        assert not stage_runs.is_whole(stage, run_id, config)


@pytest.mark.parametrize(
    ("stage", "what", "made"),
    [
        ("trak", "scores/scores.npy", {"trak", "explain"}),
        ("finetune", "checkpoint_001", {"finetune", "trak", "explain"}),
    ],
)
def test_lost_upstream_artifacts_are_made_anew(chain, new_place, stage, what, made) -> None:
    """The scores of a lost finetune run are asked for with another proj_dim, which needs it."""
    source, _ = chain
    place = new_place("copy", like=source)
    upstream = {s: place.runs(s)[0].info.run_id for s in ("finetune", "trak")}
    lost(place, upstream[stage], what)
    changed = {} if stage == "trak" else {"proj_dim": 20}
    result = place.run("explain", target=1, **changed)
    assert result.code == 0, result.err
    assert result.made() == made


# -- the same again, and going on ------------------------------------------------------------------


def test_the_whole_chain_is_bit_identical_in_another_store(chain, new_place: NewPlace) -> None:
    """It fetches nothing back that it has just computed: no artifact can be read."""
    place, first = chain
    other = new_place("again")
    with unreadable_artifacts():
        second = other.done("ablation")
    assert second.made() == set(STAGES)
    assert other.unfinished() == {f for f in other.unfinished() if f.startswith("retrainings")}
    files = []
    for where, result in ((place, first), (other, second)):
        scores = where.artifacts(result.tags["trak_run_id"]) / "scores" / "scores.npy"
        table = where.artifacts(result.run_id) / "comparison.csv"
        files.append((scores.read_bytes(), table.read_bytes()))
    assert files[0] == files[1]


def test_a_killed_ablation_goes_on_and_ends_the_same(finished, new_place: NewPlace) -> None:
    undisturbed, first = finished
    place = new_place("killed", like=undisturbed)
    retrainings = place.cache / "work" / "retrainings"
    shutil.rmtree(retrainings)
    place.client().delete_run(first.run_id)
    command = [sys.executable, "-m", "scripts.ablation", *place.argv("ablation")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(retrainings.glob("[!.]*.npz")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    [killed] = place.runs("ablation")
    assert killed.info.status == "RUNNING"  # it could not say otherwise

    result = place.done("ablation")
    assert result.made() == {"ablation"}
    assert "6 models, 6 of them" not in result.err
    assert (
        place.client().get_run(killed.info.run_id).info.status == "KILLED"
    )  # said by the next one
    ours, theirs = (
        where.artifacts(run.run_id) / "comparison.csv"
        for where, run in ((place, result), (undisturbed, first))
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_interrupted_finetune_goes_on_with_the_next_checkpoint(
    chain, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attribution.models import checkpoints

    undisturbed, first = chain
    place, original, seeds = new_place("interrupted"), checkpoints.train, []

    def train(config, data, seed, *rest):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return original(config, data, seed, *rest)

    monkeypatch.setattr(checkpoints, "train", train)
    stopped = place.run("trak")
    assert stopped.code == 130 and "the same command continues" in stopped.err
    assert "Traceback" not in stopped.err
    assert stopped.runs[0].info.status == "KILLED"
    assert not any(run.info.status in ("FINISHED", "RUNNING") for run in stopped.runs)
    result = place.done("trak")
    assert len(seeds) == 3 and seeds[2] == seeds[1] != seeds[0]
    ours = place.artifacts(result.run_id) / "scores" / "scores.npy"
    theirs = undisturbed.artifacts(first.tags["trak_run_id"]) / "scores" / "scores.npy"
    assert ours.read_bytes() == theirs.read_bytes()


def test_interrupted_scoring_goes_on_and_ends_the_same(
    chain, new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 3 batches of 10. tests/scores/test_features.py stops at other moments."""
    from attribution.scores import features as featurization

    source, first = chain
    place = new_place("copy", like=source)
    finetune_id = tag(place, first.tags["trak_run_id"], "finetune_run_id")
    original, count = featurization.batches_of, 0

    def batches(*args):
        nonlocal count
        for batch in original(*args):
            if count == 3:
                count += 1
                raise KeyboardInterrupt
            count += 1
            yield batch

    monkeypatch.setattr(featurization, "feature_batch_size", lambda *_: 10)
    reference = place.done("trak", finetune_run_id=finetune_id, lambda_reg=0.5)
    scores = place.artifacts(reference.run_id) / "scores" / "scores.npy"
    expected = np.load(scores)
    place.client().delete_run(reference.run_id)
    monkeypatch.setattr(featurization, "batches_of", batches)
    stopped = place.run("trak", finetune_run_id=finetune_id, lambda_reg=0.5)
    assert stopped.code == 130
    result = place.done("trak", finetune_run_id=finetune_id, lambda_reg=0.5)
    assert result.made() == {"trak"}
    again = np.load(place.artifacts(result.run_id) / "scores" / "scores.npy")
    np.testing.assert_array_equal(again, expected)


# -- what the scores say ---------------------------------------------------------------------------


def planted(folder: Path, n_targets: int = 6) -> tuple[Any, list[int], list[int]]:
    """Data where target j < n_targets has a copy among the training examples: row j, its label
    right where j is even and wrong where it is odd."""
    from attribution.data.dataset import ImageData

    rng = np.random.default_rng(7)
    n_train, n_other, classes = 60, 12, 3
    label = np.arange(n_train + 2 * n_other) % classes
    colours = rng.integers(90, 165, (classes, 3))
    pixels = colours[label][:, None, None, :] + rng.integers(-80, 80, (len(label), 16, 16, 3))
    pixels[:n_targets] = pixels[n_train : n_train + n_targets]
    wrong = label.copy()
    wrong[1:n_targets:2] = (wrong[1:n_targets:2] + 1) % classes
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", np.clip(pixels, 0, 255).astype(np.uint8))
    names = np.array(["a", "b", "c"])
    examples = pd.DataFrame(
        {
            "example_id": [f"id{i}" for i in range(len(label))],
            "file_name": "",
            "split": ["train"] * n_train + ["validation"] * n_other + ["test"] * n_other,
            "label": wrong,
            "label_name": names[wrong],
            "true_label": label,
            "is_flipped": wrong != label,
        }
    )
    data = ImageData(folder / "pixels.npy", tuple(names), examples, "planted", (), 0)
    return data, list(range(0, n_targets, 2)), list(range(1, n_targets, 2))


@pytest.mark.parametrize("projector", ["sketch", "normal"])
@pytest.mark.parametrize("weight", ["mean", "none"])
def test_a_twin_helps_and_a_wrongly_labelled_twin_harms(
    tmp_path: Path, planted_checkpoints, projector: str, weight: str
) -> None:
    from toy import toy_config

    from attribution.scores.features import featurize
    from attribution.scores.trak import score

    data, right, wrong, checkpoints = planted_checkpoints
    config = toy_config(
        num_models=len(checkpoints),
        proj_dim=128,
        lambda_reg=0.1,
        projector=projector,
        loss_gradient_weight=weight,
    )
    stores = featurize(config, data, checkpoints, tmp_path / "work")
    values = score(config, stores, tmp_path / "scores.npy").values
    rank = (-values).argsort(axis=0).argsort(axis=0)  # 0 is the most helpful
    n = len(values)
    assert all(values[j, j] > 0 for j in right)
    assert all(values[j, j] < 0 for j in wrong)
    if weight == "none":  # 1 - p takes the weight from a twin that the model knows by heart
        assert all(rank[j, j] < 3 for j in right), rank.diagonal()
    assert all(rank[j, j] >= n - 3 for j in wrong), rank.diagonal()


@pytest.fixture(scope="module")
def planted_checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Three checkpoints trained on all of the planted data, until they know it by heart."""
    from toy import toy_config

    from attribution.models.checkpoints import train_checkpoints

    folder = tmp_path_factory.mktemp("planted")
    data, right, wrong = planted(folder)
    config = toy_config(num_models=3, epochs=20)
    masks = np.ones((3, len(data.rows("train"))), dtype=bool)
    found = train_checkpoints(config, data, masks, folder)
    assert all((c.logits["train"].argmax(1) == data.labels("train")).mean() > 0.8 for c in found)
    return data, right, wrong, [checkpoint.folder for checkpoint in found]


def exact_gradients(folder: Path, files: list[Path], labels: np.ndarray) -> tuple[Any, Any]:
    """Margin gradients (n, P) and 1 - p (n,) in float64, with nothing of this project."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).double().eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows, residuals = [], []
    for file, label in zip(files, labels, strict=True):
        image = processor(Image.open(file), return_tensors="pt")["pixel_values"].double()
        p = model(image).logits.softmax(1)[0, int(label)]
        gradients = torch.autograd.grad(torch.log(p / (1 - p)), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]).numpy())
        residuals.append(1 - float(p))
    return np.stack(rows), np.array(residuals)


@pytest.fixture(scope="module")
def precise(chain) -> tuple[Place, dict[str, Any]]:
    """Scores with a long sketch, and with a shorter one and traker's own path beside it."""
    place, _ = chain
    settings = {"precision": "float32", "epochs": 6, "lambda_reg": 0.1, "num_blocks": 1}
    runs = {
        "long": place.done("trak", proj_dim=4096, **settings),
        "sketch": place.done("trak", proj_dim=512, **settings),
        "normal": place.done("trak", proj_dim=512, projector="normal", **settings),
    }
    return place, runs


def test_scores_follow_the_exact_formula_in_the_order_of_their_tables(precise) -> None:
    """Every row and column is found again by file name, through plain transformers and autograd."""
    from attribution import load_scores

    place, runs = precise
    run = runs["long"]
    with place.active():
        scores = load_scores(f"runs:/{run.run_id}/scores")
    files = [
        [place.dataset / name for name in table["file_name"]]
        for table in (scores.train, scores.targets)
    ]
    checkpoints = place.checkpoints(run.tags["finetune_run_id"])
    artifacts = place.artifacts(run.tags["finetune_run_id"])
    masks = np.load(artifacts / "training" / "logits.npz")["masks"]
    weights = np.exp(scores.targets.groupby("label")["loss"].mean())
    labels = scores.train["label"].to_numpy()
    exact = self_influence = residual = trust = 0
    for folder, seen in zip(checkpoints, masks, strict=True):
        train, one_minus_p = exact_gradients(folder, files[0], scores.train["label"])
        targets, _ = exact_gradients(folder, files[1], scores.targets["label"])
        gram = train @ train.T
        ridge = 0.1 * np.trace(gram) / 4096 * np.eye(len(gram))
        exact = exact + np.linalg.solve(gram + ridge, train @ targets.T) / 2
        pairs = np.linalg.solve(gram + ridge, gram)
        self_influence = self_influence + np.diag(pairs) / 2
        others = pairs - np.diag(np.diag(pairs))
        for label, weight in (weights / weights.sum()).items():
            own = ~seen & (labels == label)
            trust = trust + weight * others[:, own].sum(1) / max(own.sum(), 1) / 2
        residual = residual + one_minus_p / 2
    exact *= residual[:, None]
    columns = [spearmanr(scores.values[:, j], exact[:, j])[0] for j in range(len(exact.T))]
    assert np.mean(columns) > 0.9, columns
    assert np.corrcoef(scores.values.ravel(), exact.ravel())[0, 1] > 0.95
    scale = np.polyfit(exact.ravel(), scores.values.ravel(), 1)[0]
    assert scale == pytest.approx(1, abs=0.15)  # in the margin's unit, not merely in order
    assert np.corrcoef(scores.train["self_influence"], self_influence)[0, 1] > 0.5
    assert np.corrcoef(scores.train["trust"], trust)[0, 1] > 0.9
    np.testing.assert_allclose(scores.train["row_weight"], residual, rtol=0.02)


def test_losses_and_alignment_in_the_tables_are_those_of_the_checkpoints(precise) -> None:
    place, runs = precise
    run = runs["long"]
    train = pd.read_parquet(place.artifacts(run.run_id) / "scores" / "train.parquet")
    targets = pd.read_parquet(place.artifacts(run.run_id) / "scores" / "targets.parquet")
    values = np.load(place.artifacts(run.run_id) / "scores" / "scores.npy")
    artifacts = place.artifacts(run.tags["finetune_run_id"])
    masks = np.load(artifacts / "training" / "logits.npz")["masks"]
    assert masks.shape == (2, 24) and (masks.sum(0) == 1).all()  # each half once
    losses, target_losses = [], 0
    for folder in place.checkpoints(run.tags["finetune_run_id"]):
        for table in (train, targets):
            files = [place.dataset / name for name in table["file_name"]]
            one_minus_p = exact_gradients(folder, files, table["label"])[1]
            if table is train:
                losses.append(-np.log1p(-one_minus_p))
            else:
                target_losses = target_losses - np.log1p(-one_minus_p) / 2
    out_of_sample = np.where(masks[0], losses[1], losses[0])
    np.testing.assert_allclose(train["loss"], out_of_sample, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(targets["loss"], target_losses, rtol=1e-3, atol=1e-4)
    by_label = targets.groupby("label")["loss"].mean()
    weights = np.exp(by_label) / np.exp(by_label).sum()
    alignment = sum(w * values[:, targets["label"] == c].mean(1) for c, w in weights.items())
    np.testing.assert_allclose(train["alignment"], alignment, rtol=1e-4, atol=1e-6)


def test_trakers_own_path_agrees_with_the_sketch(precise) -> None:
    place, runs = precise
    assert runs["normal"].made() == {"trak"}  # the checkpoints are shared
    sketch, normal = (
        np.load(place.artifacts(runs[name].run_id) / "scores" / "scores.npy")
        for name in ("sketch", "normal")
    )
    # Two independent projections: the many scores near zero are noise, the large ones agree.
    assert np.corrcoef(sketch.ravel(), normal.ravel())[0, 1] > 0.7


# -- a data set in Hub format and a pretrained model -----------------------------------------------


def test_a_hub_format_folder_with_the_food_preset(new_place: NewPlace, tmp_path: Path) -> None:
    import datasets
    from safetensors.torch import load_file
    from transformers import ResNetConfig, ResNetForImageClassification

    tiny = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    ResNetForImageClassification(tiny).save_pretrained(tmp_path / "model")
    names = ["pear", "plum", "quince"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for seed, part in enumerate(("train", "validation")):
        files = sorted(write_images(tmp_path / part, 10, seed).glob("*/*.png"))
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [i // 10 for i in range(len(files))],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(hub / "data" / f"{part}-00000-of-00001.parquet")
    place = new_place("hub")
    result = place.done(
        "finetune",
        preset="food101",
        dataset=hub,
        classes="quince,pear",
        model=tmp_path / "model",
        image_size=32,
        epochs=1,
    )
    params = result.runs[0].data.params
    assert params["preset"] == "food101" and params["patience"] == "3"
    assert params["augment"] == "flip,crop" and params["epochs"] == "1"
    examples = pd.read_parquet(place.artifacts(result.run_id) / "training" / "examples.parquet")
    # The official validation part is used for validation; the test split is carved from train.
    assert examples.groupby("split").size().to_dict() == {"train": 16, "validation": 20, "test": 4}
    assert set(examples["label_name"]) == {"pear", "quince"}
    checkpoint = place.checkpoints(result.run_id)[0]
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["id2label"] == {"0": "pear", "1": "quince"}
    weights = load_file(checkpoint / "model.safetensors")
    assert weights["classifier.1.weight"].shape == (2, 16)
