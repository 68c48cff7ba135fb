"""Why this prediction: explanations against the scores they are read from, and the command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import Place, Result, refused, run_id
from toy import toy_config, toy_data

from attribution.config import convert
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models.ensemble import Ensemble
from attribution.reporting.terminal import explanation_lines, print_explanations
from attribution.scores import explanation, stored_features
from attribution.scores.explanation import Explanation, confident_mistakes, explain
from attribution.scores.scored import Scored, score_training_set
from attribution.scores.stored_features import StoredFeatures

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED = {"num_models": 2, "proj_dim": 16, "num_blocks": 2, "lambda_reg": 0.1}


# -- which mistakes --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 4), st.integers(0, 14))
def test_confident_mistakes_are_all_mistakes_in_falling_order(seed, n, classes, count) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n).round(1)  # rounded: some are equal
    labels = rng.integers(0, classes, n)
    found = confident_mistakes(p, labels, count)
    wrong = [i for i in range(n) if list(p[i]).index(max(p[i])) != labels[i]]
    assert found == sorted(wrong, key=lambda i: (-max(p[i]), i))[:count]


# -- what is explained -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(ensemble, tmp_path_factory) -> Scored:
    data, finetuned = ensemble
    work = tmp_path_factory.mktemp("work")
    return score_training_set(toy_config(**TRAINED), data, finetuned, work, {})


@pytest.fixture
def features(scored: Scored) -> StoredFeatures:
    """Stored features of the scores."""
    return scored.features


def picture_of(data: ImageData, target: int, folder: Path) -> Path:
    """The pixels of a target in a file outside of the data set."""
    file = folder / "mine.png"
    Image.fromarray(np.array(data.pixels()[data.rows("validation")[target]])).save(file)
    return file


def check_side(shown: pd.DataFrame, column: np.ndarray, train: pd.DataFrame, k: int) -> None:
    """The rows of one side are the k extremes of the column that have its sign, in order."""
    side = shown["side"].iloc[0]
    sign = 1 if side == "helpful" else -1
    order = sorted(range(len(column)), key=lambda i: (-sign * column[i], i))
    expected = [i for i in order if sign * column[i] > 0][:k]
    assert shown["position"].tolist() == expected
    assert shown["rank"].tolist() == list(range(1, len(expected) + 1))
    np.testing.assert_allclose(shown["score"], column[expected], rtol=1e-6)
    for name in ("example_id", "file_name", "label_name", "is_flipped"):
        assert shown[name].tolist() == train[name].iloc[expected].tolist()


@pytest.mark.parametrize("k", [4, 32])
def test_named_targets_are_the_columns_of_the_scores(ensemble, scored, k) -> None:
    """Asked for all examples, neither side borrows from the other."""
    data, finetuned = ensemble
    config = toy_config(target="5,3,5", num_examples=k)
    found = explain(config, data, scored.scores, finetuned.members)
    assert [each.name for each in found] == ["target 5", "target 3"]
    p = finetuned.members.probabilities("validation")
    for each, target in zip(found, (5, 3), strict=True):
        own = each.table()
        assert set(own["explained_label"]) == {scored.scores.targets["label_name"][target]}
        assert set(own["predicted"]) == {("dark", "bright")[p[target].argmax()]}
        assert set(own["probability"]) == {p[target].max()}
        np.testing.assert_array_equal(each.pixels, data.pixels()[data.rows("validation")[target]])
        for _, shown in own.groupby("side"):
            check_side(shown, scored.scores.values[:, target], scored.scores.train, k)
        assert own["position"].is_unique and (len(own) == 32) == (k == 32)


def test_a_picture_with_a_target_s_pixels_and_label_has_its_scores(
    ensemble, scored, features, tmp_path
) -> None:
    data, finetuned = ensemble
    values, p = scored.scores.values, finetuned.members.probabilities("validation")[4]
    label = scored.scores.targets["label_name"][4]
    given = TRAINED | {"image": str(picture_of(data, 4, tmp_path)), "num_examples": 32}
    (found,) = explain(
        toy_config(**given, label=label),
        data,
        scored.scores,
        finetuned.members,
        features,
        finetuned.folders,
    )
    table = found.table()
    assert found.name == "mine.png" and found.label == label
    assert found.probability == pytest.approx(p.max(), abs=1e-4)
    column = values[table["position"], 4]
    bound = 2e-3 * np.abs(values[:, 4]).max() + 1e-7
    assert len(table) == 32 and np.abs(table["score"] - column).max() < bound
    # Without a label it is the predicted class. Another label asks another question.
    (default,) = explain(
        toy_config(**given), data, scored.scores, finetuned.members, features, finetuned.folders
    )
    assert default.label == default.predicted == data.class_names[p.argmax()]
    other = data.class_names[1 - p.argmax()]
    (asked,) = explain(
        toy_config(**given, label=other),
        data,
        scored.scores,
        finetuned.members,
        features,
        finetuned.folders,
    )
    assert asked.label == other and asked.predicted == default.predicted
    assert asked.label_probability == pytest.approx(1 - default.probability, abs=1e-6)
    one, two = (each.table().set_index("position")["score"] for each in (default, asked))
    assert not np.allclose(one, two[one.index])


def wrong_about(data: ImageData, members: Ensemble, wrong: list[int]) -> Ensemble:
    """An ensemble that is certain of every target but wrong about some, the first most."""
    labels = data.labels("validation")
    p = np.where(np.arange(2) == labels[:, None], 0.99, 0.01)
    for order, target in enumerate(wrong):
        p[target, 1 - labels[target]] = 0.95 - 0.05 * order
        p[target, labels[target]] = 0.05 + 0.05 * order
    logits = np.stack([np.log(p)] * 2).astype(np.float32)
    return replace(members, validation_logits=logits)


def names(found: list[Explanation]) -> list[str]:
    return [each.name for each in found]


def test_without_a_wish_it_explains_six_mistakes_the_most_confident_first(ensemble, scored) -> None:
    data, finetuned = ensemble
    wrong = [7, 2, 8, 0, 5, 1, 3]
    mistaken = wrong_about(data, finetuned.members, wrong)

    def explained(**given: Any) -> list[Explanation]:
        return explain(toy_config(**given), data, scored.scores, mistaken)

    expected, found = [f"target {target}" for target in wrong], explained()
    assert names(found) == expected[:6] and not any(each.is_right for each in found)
    assert names(explained(errors=2, target="9")) == ["target 9", *expected[:2]]
    assert names(explained(target="6")) == ["target 6"]  # no mistakes unless asked for
    assert names(explained(errors=1, target="7")) == ["target 7"]  # a mistake too, shown once


def test_no_mistakes_at_all(ensemble, scored) -> None:
    data, finetuned = ensemble
    right = wrong_about(data, finetuned.members, [])
    with pytest.raises(InputError, match="^errors=3: .*makes no mistake.*target=0"):
        explain(toy_config(errors=3), data, scored.scores, right)
    found = explain(toy_config(errors=3, target="1"), data, scored.scores, right)
    assert names(found) == ["target 1"]


def test_a_target_out_of_range_is_refused_by_the_library(ensemble, scored) -> None:
    data, finetuned = ensemble
    for target in (-1, 16):
        with pytest.raises(InputError, match=f"^target={target}: must be from 0 to 15"):
            explain(toy_config(target=f"0,{target}"), data, scored.scores, finetuned.members)


# -- what is refused before anything is trained ----------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"target": "16"}, ["target=16", "from 0 to 15"]),
        ({"target": "3,-1"}, ["target=-1", "from 0 to 15"]),
        ({"target": "three"}, ["target=three", "whole numbers"]),
        ({"target": "1.5"}, ["target=1.5", "whole numbers"]),
        ({"image": "/nowhere/cat.png"}, ["image=/nowhere/cat.png", "No such file"]),
        ({"errors": "-1"}, ["errors=-1", "at least 0"]),
        ({"num_examples": "0"}, ["num_examples=0", "at least 1"]),
        ({"label": "brigh", "target": "1"}, ["label=brigh", "did you mean bright"]),
        ({"label": "bright", "target": "1"}, ["label=bright", "image"]),
        ({"image": "MINE", "label": "brigh"}, ["label=brigh", "did you mean bright"]),
        ({"image": "MINE", "keep_features": "no"}, ["keep_features=no", "image"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_parameters_that_cannot_be_explained_are_refused(
    ensemble, tmp_path, given, fragments
) -> None:
    data, _ = ensemble
    mine = str(picture_of(data, 4, tmp_path))
    texts = {name: mine if value == "MINE" else value for name, value in given.items()}
    with pytest.raises(InputError) as caught:
        given = {name: convert(name, text) for name, text in texts.items()}
        explanation.check(toy_config(**given), data)
    assert all(fragment in str(caught.value) for fragment in fragments)


UNREADABLE = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "PostScript": lambda f: f.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "loop": lambda f: f.symlink_to(f),
    "text": lambda f: f.write_bytes(b"not an image"),
    "empty": lambda f: f.write_bytes(b""),
    "truncated": lambda f: (
        Image.new("RGB", (16, 16)).save(f),
        f.write_bytes(f.read_bytes()[:50]),
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_picture_that_is_none_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a picture.png"
    UNREADABLE[kind](file)
    with pytest.raises(InputError, match=f"^image={file}: cannot be read") as caught:
        explanation.read_picture(toy_config(image=str(file)))
    assert "\n" not in str(caught.value)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(finished, new_place: Callable[..., Place]) -> Place:
    """A store with one finished trak run: 24 training examples, 9 targets, two checkpoints."""
    return new_place("explain", like=finished[0])


def explained(place: Place, result: Result) -> pd.DataFrame:
    table = pd.read_csv(place.artifacts(result.run_id) / "explanation.csv")
    as_json = json.loads((place.artifacts(result.run_id) / "explanation.json").read_text())
    assert as_json["columns"] == list(table) and len(as_json["data"]) == len(table)
    return table


@pytest.fixture
def picture(place: Place, tmp_path: Path) -> Path:
    """The pixels of target 4 in a file outside of the data set."""
    scores = place.artifacts(run_id(place, "trak")) / "scores"
    name = pd.read_parquet(scores / "targets.parquet")["file_name"][4]
    file = tmp_path / "somewhere" / "mine.png"
    file.parent.mkdir()
    Image.open(place.dataset / name).convert("RGB").save(file)
    return file


@pytest.mark.slow
def test_the_run_has_page_pictures_and_table_and_output_saves_them(place, tmp_path) -> None:
    folder = tmp_path / "new" / "folder"
    given = {"target": "5,3,5", "num_examples": 4, "output": folder}
    result = place.done("explain", **given)
    assert result.made() == {"explain"} and result.tags["trak_run_id"] == run_id(place, "trak")
    assert result.tags["finetune_run_id"] == run_id(place, "finetune")
    assert explained(place, result)["explained"].drop_duplicates().tolist() == [
        "target 5", "target 3",
    ]  # fmt: skip
    artifacts = place.artifacts(result.run_id)
    pictures = {"explanation-target-3.png", "explanation-target-5.png"}
    saved = {"explanation.html", "explanation.csv", *pictures}
    assert {f.name for f in artifacts.iterdir()} == {
        *saved, "explanation.json", "environment.json",
    }  # fmt: skip
    assert all(min(Image.open(artifacts / name).size) > 100 for name in pictures)
    lines = [line for line in result.out.splitlines() if line.split()[:1] == ["target"]]
    # In the table, and before what its checkpoints say.
    assert [line.split()[1] for line in lines] == ["5:", "3:", "5:", "3:"]
    assert all("checkpoint" in line for line in lines[2:])
    assert f"explain run: {result.run_id}" in result.out
    assert {f.name for f in folder.iterdir()} == saved
    for name in saved:
        assert (folder / name).read_bytes() == (artifacts / name).read_bytes()
    assert str(folder / "explanation.html") in result.err
    before = {f: f.read_bytes() for f in folder.iterdir()}
    refused(place, "explain", f"output={folder}", "exists", "--overwrite", **given)
    assert {f: f.read_bytes() for f in folder.iterdir()} == before
    again = place.done("explain", **given, overwrite="yes")  # saved, though nothing is made
    assert not again.made() and again.tags["reused_run_id"] == result.run_id
    assert str(folder / "explanation.html") in again.err


@pytest.mark.slow
def test_saving_leaves_other_files_alone(place, picture, tmp_path, monkeypatch) -> None:
    mine = picture.with_name("explanation-mine.png")
    mine.write_text("mine")
    before = picture.read_bytes()
    result = place.run("explain", image=picture, output=picture.parent)
    assert result.code == 2 and result.errors == result.err.splitlines()[-1:]
    assert f"output={mine}: exists" in result.errors[0]
    assert {f.name for f in picture.parent.iterdir()} == {mine.name, picture.name}
    assert mine.read_text() == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    place.done("explain", image=picture, output="~/somewhere", overwrite="yes")
    assert mine.read_bytes()[:4] == b"\x89PNG" and picture.read_bytes() == before
    assert (picture.parent / "explanation.html").is_file()
    refused(place, "explain", "exists", image=picture, output="~/somewhere")


@pytest.mark.slow
def test_a_finished_explanation_is_reused_until_the_picture_changes(place, picture) -> None:
    first = place.done("explain", image=picture, num_examples=3)
    assert first.made() == {"explain"}
    again = place.done("explain", image=picture, num_examples=3)
    assert not again.made() and again.tags["reused_run_id"] == first.run_id
    assert again.out == first.out
    copy = Path(shutil.copy(picture, picture.with_name("other.png")))  # goes by its own name
    result = place.done("explain", image=copy, num_examples=3)
    assert "other.png" in result.out and "mine.png" not in result.out
    pixels = np.asarray(Image.open(picture)).copy()
    Image.fromarray(255 - pixels).save(picture)
    changed = place.done("explain", image=picture, num_examples=3)
    assert changed.made() == {"explain"}
    assert not explained(place, first).equals(explained(place, changed))


@pytest.mark.slow
def test_nothing_is_trained_for_what_cannot_be_explained_or_saved(place, picture, tmp_path) -> None:
    untrained = {"seed": 9}  # a seed whose checkpoints do not exist
    refused(place, "explain", "target=9", "from 0 to 8", target="9", **untrained)
    picture.write_bytes(b"not an image")
    refused(place, "explain", f"image={picture}", image=picture, **untrained)
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "folder"):
        refused(place, "explain", f"output={output}", target="1", output=output, **untrained)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_scores_without_features_are_refused_by_name(place, picture, monkeypatch) -> None:
    monkeypatch.setattr(stored_features, "AUTO_BYTES", 10)
    made = place.done("trak", proj_dim=8)
    assert {f.name for f in place.artifacts(made.run_id).iterdir()} >= {"scores", "suspects.csv"}
    assert not (place.artifacts(made.run_id) / "features").exists()
    refused(
        place, "explain", f"trak_run_id={made.run_id}", "keep_features=yes",
        image=picture, proj_dim=8,
    )  # fmt: skip
    done = place.done("explain", image=picture, proj_dim=8, keep_features="yes")
    assert done.made() == {"trak", "explain"}
    newest = place.done("explain", target="1", proj_dim=8)
    assert newest.tags["trak_run_id"] == done.tags["trak_run_id"]
    targets = place.done("explain", target="1", proj_dim=8, trak_run_id=made.run_id)
    assert targets.tags["trak_run_id"] == made.run_id  # which has none and needs none


@pytest.mark.slow
def test_damaged_features_stop_the_command(place, new_place, picture) -> None:
    copy = new_place("damaged", like=place)
    file = copy.artifacts(run_id(copy, "trak")) / "features" / "001" / "train.npy"
    values = np.load(file)
    values[0] = -values[0]
    np.save(file, values)
    refused(copy, "explain", "features=", "001/train.npy", "hash", image=picture, errors=1)


@pytest.mark.parametrize("stage", ["explain", "ablation"])
def test_the_script_itself_looks_for_files_that_are_there(
    new_place, tmp_path, monkeypatch, capsys, stage
) -> None:
    import runpy
    import sys

    place = new_place("files")
    name = {"explain": "explanation.html", "ablation": "harmful_0.1.csv"}[stage]
    (tmp_path / name).write_text("mine")
    given = {"explain": {"target": "1"}, "ablation": {"export_arm": "harmful"}}[stage]
    argv = place.argv(stage, output=tmp_path, seed=9, **given)
    monkeypatch.setattr(sys, "argv", [stage, *argv])
    monkeypatch.delitem(sys.modules, f"scripts.{stage}", raising=False)
    monkeypatch.setattr("attribution.cli.main.end", sys.exit)  # the real one ends this process
    with place.active(), pytest.raises(SystemExit) as stop:
        runpy.run_module(f"scripts.{stage}", run_name="__main__")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.startswith(f"error: output={tmp_path / name}: exists")


@pytest.mark.slow
def test_class_names_that_look_like_numbers_or_nothing(new_place, tmp_path) -> None:
    """What is printed has been a .csv file in between."""
    names, folder = {"blue": "007", "green": "NA", "red": "1e5"}, tmp_path / "images"
    place = new_place("names")
    shutil.copytree(place.dataset, folder)
    for old, new in names.items():
        (folder / old).rename(folder / new)
    given = {"dataset": folder, "epochs": 1, "num_models": 1, "num_examples": 1}
    result = place.done("explain", **given, target="0,1,2,3,4,5,6,7,8")
    lines = [line for line in result.out.splitlines() if line.split()[:1] == ["target"]]
    shown = [line.split()[2] for line in lines if "checkpoint" not in line]
    targets = pd.read_parquet(
        place.artifacts(result.tags["trak_run_id"]) / "scores" / "targets.parquet"
    )
    assert shown == targets["label_name"].tolist() and set(shown) == set(names.values())


@pytest.mark.slow
def test_scores_go_with_the_checkpoints_that_they_were_made_from(
    finished, new_place, tmp_path
) -> None:
    """A newer run with the same settings may be of another number of threads, or another device."""
    place = new_place("own", like=finished[0])
    first, own = run_id(place, "trak"), run_id(place, "finetune")
    checkpoints, kept = place.checkpoints(own)[1], tmp_path / "kept"
    checkpoints.rename(kept)
    newer = place.done("finetune").run_id
    pictures = iter(sorted(place.dataset.rglob("*.png")))
    result = place.done("explain", image=next(pictures))
    assert result.tags["finetune_run_id"] == newer != own and "differ from" not in result.err
    logits = place.artifacts(own) / "training" / "logits.npz"
    arrays = dict(np.load(logits))
    arrays["train_logits"] = arrays["train_logits"] + 1
    np.savez(logits, **arrays)
    result = place.done("explain", image=next(pictures))
    assert f"trak run {first} scored" in result.err and "differ from" in result.err
    kept.rename(checkpoints)
    result = place.done("explain", image=next(pictures))
    assert result.tags["finetune_run_id"] == own and "differ from" not in result.err
    result = place.done("explain", image=next(pictures), finetune_run_id=newer)
    assert result.tags["finetune_run_id"] == newer and "differ from" in result.err


# -- what is shown ---------------------------------------------------------------------------------


def explanation_table(**changes: Any) -> pd.DataFrame:
    row = {
        "explained": "target 1", "explained_label": "cat", "predicted": "dog", "probability": 0.9,
        "side": "helpful", "rank": 1, "score": 1.5, "file_name": "a.png", "example_id": "id7",
        "label_name": "cat", "is_flipped": False, "agreement": "", "effect": "", "warnings": "",
    }  # fmt: skip
    return pd.DataFrame([row | changes])


@pytest.mark.parametrize("name", ["[red]", "[/x]", ":smile:", "a[b]c", "$x$"])
def test_names_are_printed_as_they_are(capsys, name: str) -> None:
    print_explanations(
        explanation_table(explained=name, explained_label=name, file_name=name, label_name=name)
    )
    assert capsys.readouterr().out.count(name) == 4


def test_three_on_each_side_are_printed(capsys) -> None:
    rows = [
        explanation_table(side=side, rank=rank, file_name=f"{side}{rank}.png", is_flipped=rank == 2)
        for side in ("helpful", "harmful")
        for rank in (1, 2, 3, 4)
    ]
    print_explanations(pd.concat([*rows, explanation_table(rank=2, file_name="")]))
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if ".png" in line]
    assert len(shown) == 6 and all(
        f"{side}4" not in "".join(lines) for side in ("helpful", "harmful")
    )
    assert ["flipped" in line for line in shown] == [False, True, False] * 2
    assert "raised it" in shown[0] and "lowered it" in shown[3]
    assert "target 1: cat" in shown[0] and "dog 0.90" in shown[0]
    assert "id7" in lines[-2]  # an example without a file


def made_up(name: str = "target 0", **changes: Any) -> Explanation:
    train = pd.DataFrame(
        {
            "position": [3, 5], "label_name": ["bright"] * 2, "is_flipped": [False, True],
            "true_label": [1, 0], "file_name": ["", "<b>.png"], "example_id": ["id3", "id5"],
            "score": [0.5, 0.25],
        }
    )  # fmt: skip
    values = {
        "pixels": np.full((16, 16, 3), 9, np.uint8), "label": "bright", "predicted": "dark",
        "probability": 0.75, "label_probability": 0.25, "helpful": train, "harmful": train[:1],
        "agreement": "7 of 9 checkpoints say dark", "warnings": ("inverted: <b>swapped</b>",),
        "in_margins": True,
    }  # fmt: skip
    return Explanation(name, **values | changes)


@pytest.mark.parametrize("empty", [(), ("helpful",), ("harmful",), ("helpful", "harmful")])
def test_a_side_may_be_empty(tmp_path, empty) -> None:
    from attribution.reporting import figures
    from attribution.reporting import html as pages

    data, none = toy_data(tmp_path / "data"), made_up().helpful[:0]
    found = made_up(**dict.fromkeys(empty, none))
    figures.save(figures.explanation(data, found), tmp_path / "found.png")
    assert min(Image.open(tmp_path / "found.png").size) > 100
    page = pages.explanations(data, [found], {"trak run": "0123"})
    assert page.count("<img") == 1 + 2 * ("helpful" not in empty) + ("harmful" not in empty)
    assert len(found.table()) == page.count("<img") - 1
    assert "7 of 9 checkpoints say dark" in page
    assert "inverted: &lt;b&gt;swapped&lt;/b&gt;" in page


def test_the_strongest_score_is_an_effect_on_the_margin_in_words() -> None:
    helpful, harmful = made_up().helpful, made_up().harmful
    assert made_up().effect.startswith("without training image id3, ")
    against = made_up(harmful=harmful.assign(score=-1.25, example_id="id9")).effect
    assert "id9" in against and against.endswith("would rise by about 1.2")
    assert made_up(helpful=helpful[:0], harmful=harmful[:0]).effect == ""
    assert made_up(in_margins=False).effect == ""


def test_agreement_effect_and_warnings_are_lines() -> None:
    other = made_up("a.png", warnings=(), in_margins=False)
    table = pd.concat([made_up().table(), other.table()])
    assert explanation_lines(table) == [
        "target 0: 7 of 9 checkpoints say dark",
        "target 0: without training image id3, the margin (log-odds) of bright would fall by about 0.5",
        "warning: target 0: inverted: <b>swapped</b>",
        "a.png: 7 of 9 checkpoints say dark",
    ]


def test_votes_are_those_of_the_checkpoints_and_doubt_is_relative_to_validation_images(
    ensemble, scored, features, tmp_path
) -> None:
    data, finetuned = ensemble
    given = TRAINED | {"image": str(picture_of(data, 4, tmp_path)), "target": "0,1,2,3,4"}
    picture, *targets = explain(
        toy_config(**given),
        data,
        scored.scores,
        finetuned.members,
        features,
        finetuned.folders,
    )
    for target, each in enumerate(targets):
        own = finetuned.members.validation_logits[:, target].argmax(1)
        predicted = data.class_names.index(each.predicted)
        votes = list(own).count(predicted)
        assert each.agreement == f"{votes} of 2 checkpoints say {each.predicted}"
        assert each.warnings == ()
    assert picture.agreement == targets[4].agreement
    (line,) = explanation._doubts(0.4, finetuned.members)
    assert line.startswith("low confidence: 0.40") and "100 % of the validation images" in line
    assert not explanation._doubts(0.9999999, finetuned.members)


def test_right_and_wrong_predictions_are_told_apart() -> None:
    assert not made_up().is_right and made_up(predicted="bright").is_right


@pytest.mark.slow
def test_a_command_that_names_no_data_takes_the_scores_that_are_there(
    finished, new_place, tmp_path
) -> None:
    place = new_place("no data", like=finished[0])
    nothing = {"dataset": None, **dict.fromkeys(place.small), "jobs": 1}
    done = place.done("explain", **nothing, target="2")
    trak = place.runs("trak")[0].info.run_id
    assert done.made() == {"explain"} and done.tags["trak_run_id"] == trak
    assert f"takes dataset={place.dataset} and the parameters of trak run {trak}" in done.err
    (tmp_path / "keep.txt").write_text("nobody\n")
    asked = place.run("finetune", **nothing, keep=tmp_path / "keep.txt")
    assert "name no image of this data set" in asked.errors[0] and "--dataset" in asked.errors[0]
