"""A kept part of the training set: what `keep` reads, what `export_arm` writes, and what is trained on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import Place, refused, write_images
from toy import toy_config

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.data.decisions import LEFT_OUT, read_decisions
from attribution.data.splits import SPLITS
from attribution.errors import InputError
from attribution.experiments.arms import Trial, export_files, kept_table
from attribution.scores.alignment import check_groups

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def load(tmp_path_factory, images: Path) -> Callable[..., ImageData]:
    cache = tmp_path_factory.mktemp("cache")

    def run(**given: Any) -> ImageData:
        fixed = {"dataset": str(images), "image_size": 16, "cache_dir": str(cache)}
        return load_data(resolve(fixed | given))

    return run


def write_list(file: Path, ids) -> str:
    file.write_text("".join(f"{example_id}\n" for example_id in ids))
    return str(file)


def read_ids(file: str) -> list[str]:
    return read_decisions(f"keep={file}", file)["example_id"].tolist()


# -- what is read ----------------------------------------------------------------------------------

IDS = st.lists(
    st.text("0123456789abcdef-", min_size=1).filter(lambda s: s != "example_id"), min_size=1
)


@settings(max_examples=30, deadline=None)
@given(IDS, st.sampled_from(["", "\ufeff"]), st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n"]))
def test_a_list_is_read_as_it_was_written(tmp_path_factory, ids, mark, end) -> None:
    file = tmp_path_factory.mktemp("list") / "keep.txt"
    file.write_bytes((mark + "".join(example_id + end for example_id in ids)).encode())
    assert read_ids(str(file)) == ids


@settings(max_examples=30, deadline=None)
@given(
    IDS, st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.integers(0, 2), st.booleans()
)
def test_a_table_is_read_wherever_its_column_is(tmp_path_factory, ids, name, at, marked) -> None:
    table = pd.DataFrame({"file_name": name, "label": 'a, "b"\n'[:5]}, index=range(len(ids)))
    table.insert(at, "example_id", ids)
    file = tmp_path_factory.mktemp("table") / "keep.csv"
    table.to_csv(file, index=False, encoding="utf-8-sig" if marked else "utf-8")
    assert read_ids(str(file)) == ids


def test_what_is_a_line_to_python_alone_is_a_part_of_a_name(tmp_path) -> None:
    """As `export_arm` writes it: csv quotes neither of these."""
    file = tmp_path / "keep.csv"
    table = pd.DataFrame({"label_name": ["x\u2028y", "a\x0cb\x85c"], "example_id": ["abc", "def"]})
    table.to_csv(file, index=False)
    assert read_ids(str(file)) == ["abc", "def"]


@pytest.mark.parametrize("content", ["", "\n \n", "example_id\n", "example_id,label\n"])
def test_a_file_without_ids_is_refused(tmp_path, content) -> None:
    file = tmp_path / "keep.csv"
    file.write_text(content)
    with pytest.raises(InputError, match=f"^keep={file}: holds no example_ids$"):
        read_ids(str(file))


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "long"])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, kind) -> None:
    file = tmp_path / "keep.csv"
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(b"\xff\xfe\x00" if kind == "binary" else b'"' + b"x" * 200_000)
    with pytest.raises(InputError, match=f"^keep={file}: cannot be read") as caught:
        read_ids(str(file))
    assert "\n" not in str(caught.value)


# -- what is kept ----------------------------------------------------------------------------------


def kept_ids(data: ImageData, every: int = 3) -> list[str]:
    """All but each third training example."""
    ids = data.table("train")["example_id"]
    return [example_id for i, example_id in enumerate(ids) if i % every]


@pytest.mark.parametrize("noise", [0, 0.3])
def test_the_training_split_is_what_is_named_and_nothing_else_changes(
    load, tmp_path, noise
) -> None:
    whole = load(label_noise=noise)
    ids = kept_ids(whole)
    keep = write_list(tmp_path / "keep.txt", reversed(ids))  # in whatever order
    part = load(label_noise=noise, keep=keep)
    assert part.table("train")["example_id"].tolist() == ids
    chosen = whole.examples["example_id"].isin(ids) | (whole.examples["split"] != "train")
    assert (part.examples["split"] == np.where(chosen, whole.examples["split"], LEFT_OUT)).all()
    columns = [name for name in whole.examples if name != "split"]
    pd.testing.assert_frame_equal(part.examples[columns], whole.examples[columns])
    assert part.pixels_file == whole.pixels_file  # nothing is decoded again
    for split in SPLITS:
        rows = [i for i in whole.rows(split) if chosen[i]]
        assert part.rows(split).tolist() == rows
        assert part.labels(split).tolist() == whole.examples["label"][rows].tolist()


def test_the_fingerprint_is_of_what_is_kept_and_not_of_the_file(load, tmp_path) -> None:
    whole = load()
    ids = whole.table("train")["example_id"].tolist()
    files = {
        "all": write_list(tmp_path / "all.txt", ids),
        "some": write_list(tmp_path / "some.txt", ids[1:]),
        "again": write_list(tmp_path / "again.csv", ["example_id", *ids[:0:-1]]),
        "others": write_list(tmp_path / "others.txt", ids[:-1]),
    }
    found = {name: load(keep=file).fingerprint for name, file in files.items()}
    assert found["all"] == whole.fingerprint and found["some"] == found["again"]
    assert len({found["all"], found["some"], found["others"]}) == 3


def test_unknown_ids_are_counted_and_one_is_named(load, tmp_path) -> None:
    data = load()
    ids = data.table("train")["example_id"].tolist()
    keep = write_list(tmp_path / "keep.txt", [*ids, "nonsense", "more"])
    with pytest.raises(
        InputError, match=f"^keep={keep}: 2 of its 26 rows .* 'nonsense' in line 25"
    ):
        load(keep=keep)


def test_a_plain_list_names_training_examples_alone(load, tmp_path) -> None:
    data = load()
    ids = data.table("train")["example_id"].tolist()
    target = data.table("validation")["example_id"][0]
    keep = write_list(tmp_path / "keep.txt", [*ids, target])
    with pytest.raises(
        InputError, match="line 25 names a validation image as one of split 'train'"
    ):
        load(keep=keep)
    other = write_list(tmp_path / "other.txt", load(data_seed=1).table("train")["example_id"])
    with pytest.raises(InputError, match="another data_seed"):
        load(keep=other)


def test_a_class_that_nothing_is_left_of_is_named(load, tmp_path) -> None:
    train = load().table("train")
    keep = write_list(tmp_path / "keep.txt", train["example_id"][train["label_name"] != "green"])
    with pytest.raises(InputError, match=f"^keep={keep}: no training example of class 'green'"):
        load(keep=keep)


def test_what_is_left_out_cannot_spoil_the_groups(load, tmp_path) -> None:
    data = load()
    keep = write_list(tmp_path / "keep.txt", kept_ids(data))
    part = load(keep=keep)
    camera = np.where(part.examples["split"] == LEFT_OUT, "lost", np.array(["a", "b"])[
        np.arange(len(part.examples)) % 2
    ])  # fmt: skip
    check_groups(part.examples.assign(camera=camera), "camera")
    trains = part.examples.assign(camera=np.where(part.examples["split"] == "train", "x", camera))
    with pytest.raises(InputError, match="^groups=camera"):
        check_groups(trains, "camera")


# -- the whole pipeline ----------------------------------------------------------------------------


def in_parts(folder: Path, without: set[str] = frozenset()) -> Path:
    """Images with official parts: nothing is carved, so that what trains can go without a trace."""
    for seed, (part, count) in enumerate((("train", 8), ("validation", 3), ("test", 3))):
        write_images(folder / part, count, seed)
    for name in without:
        (folder / "train" / name).unlink()
    return folder


LEFT = {"blue/01.png", "blue/05.png", "green/00.png", "red/07.png"}


@pytest.fixture(scope="module")
def kept(new_place, tmp_path_factory) -> tuple[Place, dict[str, Any], Any]:
    """A place, the settings that keep all images but LEFT, and the ablation of those."""
    place, folder = new_place("kept"), in_parts(tmp_path_factory.mktemp("parts") / "images")
    with place.active():
        data = load_data(resolve({"dataset": str(folder), "image_size": 16}))
    names = data.table("train")["file_name"].str.removeprefix("train/")
    ids = data.table("train")["example_id"][~names.isin(LEFT)]
    assert len(ids) == 20
    given = {"dataset": folder, "keep": write_list(folder.parent / "keep.txt", ids)}
    return place, given, place.done("ablation", arms="harmful,negative", frac=0.15, **given)


def files_of(place: Place, result: Any) -> list[bytes]:
    trak = place.artifacts(result.tags["trak_run_id"])
    own = place.artifacts(result.run_id)
    return [
        (trak / "scores" / "scores.npy").read_bytes(),
        (trak / "suspects.csv").read_bytes(),
        (own / "comparison.csv").read_bytes(),
        (own / "per_class.csv").read_bytes(),
    ]


@pytest.mark.slow
def test_a_kept_part_is_as_good_as_a_folder_that_never_had_the_rest(
    kept, new_place, tmp_path
) -> None:
    """Checkpoints, scores and comparison have the same bits."""
    place, given, result = kept
    assert "4 images left out by keep" in result.err and "20 train" in result.err
    other = new_place("never")
    folder = in_parts(tmp_path / "images", LEFT)
    again = other.done("ablation", arms="harmful,negative", frac=0.15, dataset=folder)
    assert files_of(place, result) == files_of(other, again)


@pytest.mark.slow
def test_every_artifact_is_of_the_kept_examples(kept) -> None:
    place, given, result = kept
    ids = read_ids(given["keep"])
    trak = place.artifacts(result.tags["trak_run_id"])
    train = pd.read_parquet(trak / "scores" / "train.parquet")
    assert sorted(train["example_id"]) == sorted(ids)
    assert np.load(trak / "scores" / "scores.npy").shape == (20, 9)
    for run in place.children(result.run_id):
        if run.data.params["arm"] != "none":
            removed = pd.read_parquet(place.artifacts(run.info.run_id) / "removed.parquet")
            assert set(removed["example_id"]) <= set(ids)
    assert result.runs[0].data.params["keep"] == given["keep"]


@pytest.mark.slow
def test_another_kept_part_is_other_data(kept, tmp_path) -> None:
    place, given, result = kept
    ids = read_ids(given["keep"])
    same = place.done("finetune", **given | {"keep": write_list(tmp_path / "same.txt", ids[::-1])})
    assert not same.made()
    fewer = given | {"keep": write_list(tmp_path / "fewer.txt", ids[1:])}
    assert place.done("finetune", **fewer).made() == {"finetune"}
    whole = given | {"keep": None}
    assert place.done("finetune", **whole).made() == {"finetune"}


@pytest.mark.slow
def test_a_list_that_changed_is_not_what_a_run_was_built_on(kept, tmp_path) -> None:
    place, given, _ = kept
    keep = Path(shutil.copy(given["keep"], tmp_path / "keep.txt"))
    made = place.done("finetune", **given | {"keep": keep})
    run_id = made.tags.get("reused_run_id", made.run_id)
    named = dict.fromkeys(place.small) | {"dataset": None, "finetune_run_id": run_id, "jobs": 1}
    contradicted = named | {"keep": keep}
    refused(place, "trak", f"keep={keep}", "was made with", **contradicted)
    original = Path(given["keep"])
    content = original.read_text()
    try:
        original.write_text("".join(content.splitlines(keepends=True)[1:]))
        refused(place, "trak", f"finetune_run_id={run_id}", "other data", **named)
    finally:
        original.write_text(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no example_ids"),
        ("nonsense\n", "name no image of this data set"),
        (None, "No such"),
    ],
)
def test_a_bad_list_is_refused_before_anything_is_trained(kept, tmp_path, content, says) -> None:
    place, given, _ = kept
    file = tmp_path / "keep.txt"
    if content is not None:
        file.write_text(content)
    refused(place, "ablation", f"keep={file}", says, **given | {"keep": file, "seed": 9})


# -- exported arms ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(new_place, tmp_path_factory) -> tuple[Place, Path, Any]:
    """A place, a folder, and the ablation that exported an arm to it at two of three fracs' sizes."""
    place, folder = new_place("exported"), tmp_path_factory.mktemp("saved") / "cleaned"
    given = {"label_noise": 0.2, "arms": "harmful,negative,loss", "frac": "0.1,0.09,0.2"}
    # The scores alone are enough for the lists.
    early = place.done("ablation", **given, export_arm="harmful", output=folder.parent / "early")
    assert early.made() == {"trak", "finetune"}
    done = place.done("ablation", **given)
    place.done("ablation", **given, export_arm="harmful", output=folder)
    assert early.run_id == done.tags["trak_run_id"]
    for file in folder.glob("*.csv"):
        assert (folder.parent / "early" / file.name).read_bytes() == file.read_bytes()
        assert f"--keep {folder.parent / 'early' / file.name}" in early.err
    return place, folder, done


def removed_by(place: Place, result: Any, arm: str) -> dict[int, set[str]]:
    """example_ids by their number, of each of an arm's nested runs."""
    found = [run for run in place.children(result.run_id) if run.data.params["arm"] == arm]
    tables = [pd.read_parquet(place.artifacts(r.info.run_id) / "removed.parquet") for r in found]
    return {len(table): set(table["example_id"]) for table in tables}


def train_table(place: Place, result: Any) -> pd.DataFrame:
    trak = place.artifacts(result.tags["trak_run_id"])
    return pd.read_parquet(trak / "scores" / "train.parquet")


@pytest.mark.slow
def test_a_file_for_every_frac_holds_train_without_what_was_removed(exported) -> None:
    place, folder, result = exported
    names = {"harmful_0.09.csv": 2, "harmful_0.1.csv": 2, "harmful_0.2.csv": 5}
    assert {file.name for file in folder.iterdir()} == {*names, "report.html"}
    removed, train = removed_by(place, result, "harmful"), train_table(place, result)
    assert len(train) == 24 and set(removed) == {2, 5}
    for name, count in names.items():
        table = pd.read_csv(folder / name)
        left = train[~train["example_id"].isin(removed[count])]
        assert list(table) == ["example_id", "label_name", "file_name"]
        for column in table:
            assert table[column].tolist() == left[column].tolist()


@pytest.mark.slow
def test_a_reused_comparison_exports_too_and_replaces_nothing_unasked(exported, tmp_path) -> None:
    place, _, result = exported
    given = {"label_noise": 0.2, "arms": "harmful,negative,loss", "frac": "0.1,0.09,0.2"}
    given |= {"export_arm": "negative", "output": tmp_path}
    again = place.done("ablation", **given)
    assert not again.made() and again.tags["reused_run_id"] == result.run_id
    (file,) = tmp_path.glob("*.csv")
    (removed,) = removed_by(place, result, "negative").values()
    train = train_table(place, result)
    assert removed == set(train["example_id"][train["alignment"] < 0])
    assert set(pd.read_csv(file)["example_id"]) == set(train["example_id"]) - removed
    file.write_text("mine")
    for seed in (None, 9):  # whether or not there is a run to reuse
        refused(place, "ablation", f"output={file}: exists", "--overwrite", seed=seed, **given)
        assert file.read_text() == "mine"
    place.done("ablation", **given, overwrite="yes")
    assert set(read_ids(str(file))) == set(train["example_id"]) - removed


@pytest.mark.slow
def test_cleaned_is_the_folder_where_none_is_named(exported, tmp_path, monkeypatch) -> None:
    place, folder, result = exported
    monkeypatch.chdir(tmp_path)
    given = {"label_noise": 0.2, "arms": "harmful,negative,loss", "frac": "0.1,0.09,0.2"}
    place.done("ablation", **given, export_arm="harmful")
    for file in folder.glob("*.csv"):
        assert (tmp_path / "cleaned" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_an_exported_file_is_what_keep_takes(exported) -> None:
    place, folder, result = exported
    file = folder / "harmful_0.2.csv"
    made = place.done("trak", label_noise=0.2, keep=file)
    kept = pd.read_parquet(place.artifacts(made.run_id) / "scores" / "train.parquet")
    (removed,) = (ids for n, ids in removed_by(place, result, "harmful").items() if n == 5)
    whole = train_table(place, result)
    left = whole[~whole["example_id"].isin(removed)]
    for column in ("example_id", "label", "label_name", "true_label", "is_flipped", "file_name"):
        assert kept[column].tolist() == left[column].tolist()
    assert "5 images left out by keep" in made.err
    # Without the planted labels it names the same images.
    plain = place.done("finetune", keep=file)
    assert "5 images left out by keep" in plain.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"export_arm": "random"}, ["export_arm=random", "for every seed"]),
        ({"export_arm": "none"}, ["export_arm=none", "keeps every example"]),
        ({"export_arm": "balanced", "arms": "balanced"}, ["no one list"]),
        ({"export_arm": "loss"}, ["export_arm=loss", "not among arms=none,random,harmful"]),
        ({"export_arm": "harmfull"}, ["export_arm=harmfull", "not among arms"]),
        ({"export_arm": "harmful", "action": "relabel"}, ["action=relabel", "remove"]),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_an_arm_that_cannot_be_exported_is_refused_before_anything_is_trained(
    exported, tmp_path, given, fragments
) -> None:
    place, _, _ = exported
    refused(place, "ablation", *fragments, **given, output=tmp_path, seed=9)
    assert not list(tmp_path.iterdir())


def test_names_of_exported_files() -> None:
    assert export_files(toy_config(arms="harmful", export_arm="")) == {}
    harmful = {"arms": "harmful", "export_arm": "harmful"}
    names = export_files(toy_config(**harmful, frac="0.05,0.125", action="both"))
    assert names == {"harmful_0.05.csv": 0.05, "harmful_0.125.csv": 0.125}
    for arm in ("negative", "oracle"):
        assert export_files(toy_config(arms=arm, export_arm=arm)) == {f"{arm}.csv": None}


@settings(deadline=None)
@given(st.integers(1, 20), st.data())
def test_kept_and_removed_are_the_training_set_divided(n, data) -> None:
    removed = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))), np.int64)
    train = pd.DataFrame({"example_id": [f"id{i}" for i in range(n)], "label_name": "a"})
    train = train.assign(file_name="", alignment=0.0)
    table = kept_table(Trial("harmful", 0.1, (removed, removed)), train)
    assert table["example_id"].tolist() == [f"id{i}" for i in range(n) if i not in set(removed)]
