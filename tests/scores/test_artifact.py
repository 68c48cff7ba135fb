"""The score artifact: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from places import Place, Result, check_refusal, run_id
from safetensors.numpy import load_file, save_file

from attribution.errors import InputError
from attribution.runtime.npy_blocks import write_matrix
from attribution.scores.artifact import (
    REQUIRED_COLUMNS,
    SCHEMA_VERSION,
    Scores,
    load_scores,
    write_scores,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=FINITE)
NAMES = ("train.parquet", "targets.parquet")


def tables(n_train: int, n_targets: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    def table(n: int, prefix: str) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "position": np.arange(n),
                "example_id": [f"{prefix}{i}" for i in range(n)],
                "label": np.arange(n) % 3,
                "label_name": "a name",
                "loss": np.linspace(0, 1, n),
            }
        )

    train = table(n_train, "a").assign(alignment=0.5, row_weight=0.1, trust=5.0, self_influence=1.0)
    return train, table(n_targets, "b")


def write(folder: Path, values: np.ndarray, **metadata) -> Path:
    file = folder.with_name("matrix.npy")
    write_matrix(file, [values], values.shape)
    write_scores(folder, file, Scores(values, *tables(*values.shape), metadata))
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "scores", np.arange(12, dtype=np.float32).reshape(4, 3) / 7)


def edit_metadata(folder: Path, **changes) -> None:
    file = folder / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def bless(folder: Path, name: str) -> None:
    """Give a changed table the hash that metadata.json promises."""
    hashes = json.loads((folder / "metadata.json").read_text())["sha256_tables"]
    hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit_metadata(folder, sha256_tables=hashes)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_scores(folder)
    message = str(caught.value)
    assert message.startswith("scores=") and len(message.splitlines()) == 1, message
    return message


@pytest.mark.slow
@settings(deadline=None)
@given(values=MATRICES)
def test_a_matrix_is_read_back_bit_for_bit(values: np.ndarray, tmp_path_factory) -> None:
    scores = load_scores(write(tmp_path_factory.mktemp("scores"), values))
    assert scores.values.dtype == np.float32
    assert scores.values.tobytes() == values.tobytes()


def test_a_transposed_view_is_read_back_with_its_rows_as_rows(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(load_scores(write(tmp_path, values)).values, values)


def test_the_matrix_is_memory_mapped_and_cannot_be_changed(artifact: Path) -> None:
    values = load_scores(artifact).values
    assert isinstance(values, np.memmap) and not values.flags.writeable


def test_the_tables_are_read_back_as_they_were(artifact: Path) -> None:
    scores = load_scores(artifact)
    train, targets = tables(4, 3)
    pd.testing.assert_frame_equal(scores.train, train)
    pd.testing.assert_frame_equal(scores.targets, targets)


def test_metadata_holds_schema_sign_and_what_the_caller_added(tmp_path: Path) -> None:
    metadata = load_scores(write(tmp_path, np.ones((2, 2)), lambda_reg=0.5)).metadata
    assert metadata["schema_version"] == SCHEMA_VERSION
    assert metadata["sign"].startswith("positive = helpful")
    assert metadata["lambda_reg"] == 0.5


def test_the_matrix_can_be_read_with_numpy_alone(artifact: Path) -> None:
    values = np.load(artifact / "scores.npy", mmap_mode="r", allow_pickle=False)
    assert values.shape == (4, 3) and values.dtype == np.float32


@given(values=MATRICES, k=st.integers(1, 12), data=st.data())
def test_top_and_bottom_are_those_of_a_brute_force_sort(values, k, data) -> None:
    train, targets = tables(*values.shape)
    scores = Scores(values, train, targets, {})
    target = data.draw(st.integers(0, values.shape[1] - 1))
    column = [float(v) for v in values[:, target]]
    best = sorted(range(len(column)), key=lambda i: (-column[i], i))[:k]
    worst = sorted(range(len(column)), key=lambda i: (column[i], i))[:k]
    assert scores.top(target, k)["position"].tolist() == best
    assert scores.bottom(target, k)["position"].tolist() == worst
    assert scores.top(target, k)["score"].tolist() == [column[i] for i in best]


def test_equal_scores_come_in_order_of_position() -> None:
    scores = Scores(np.zeros((50, 1), np.float32), *tables(50, 1), {})
    assert scores.top(0, 50)["position"].tolist() == list(range(50))
    assert scores.bottom(0, 50)["position"].tolist() == list(range(50))


def test_scores_are_one_line_in_a_terminal_and_a_table_in_a_notebook(tmp_path: Path) -> None:
    scores = load_scores(write(tmp_path, np.zeros((30, 6))))
    assert repr(scores) == "<Scores of 30 training examples on 6 targets; positive = helpful>"
    shown = scores._repr_html_()
    assert shown.count("<tr") == 11 and "&lt;Scores of 30" in shown and "trust" in shown


def test_selected_targets_rank_as_in_the_whole(tmp_path: Path) -> None:
    scores = load_scores(write(tmp_path, np.random.default_rng(0).normal(size=(30, 6))))
    few = scores.select([4, 1])
    assert few.targets["example_id"].tolist() == ["b4", "b1"]
    for i, target in enumerate([4, 1]):
        pd.testing.assert_frame_equal(few.top(i, 5), scores.top(target, 5))
        pd.testing.assert_frame_equal(few.bottom(i, 5), scores.bottom(target, 5))


def test_a_file_of_scores_becomes_the_artifact_s_and_stays_until_that_is_safe(
    tmp_path: Path,
) -> None:
    values, file = np.arange(6, dtype=np.float32).reshape(2, 3), tmp_path / "work.npy"
    write_matrix(file, [values[:1], values[1:]], (2, 3))
    write_scores(tmp_path / "scores", file, Scores(values, *tables(2, 3), {}))
    assert file.exists()
    np.testing.assert_array_equal(load_scores(tmp_path / "scores").values, values)


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_out_of_range_is_refused(artifact: Path, target: int) -> None:
    with pytest.raises(InputError, match=f"target={target}: must be from 0 to 2"):
        load_scores(artifact).top(target)


def test_a_k_below_one_is_refused(artifact: Path) -> None:
    with pytest.raises(InputError, match="k=0"):
        load_scores(artifact).bottom(0, k=0)


def test_any_changed_byte_of_the_matrix_file_is_refused(artifact: Path) -> None:
    file = artifact / "scores.npy"
    original = file.read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 0x1
        file.write_bytes(changed)
        refusal(artifact)


def test_a_changed_header_that_numpy_cannot_parse_is_refused(artifact: Path) -> None:
    file = artifact / "scores.npy"
    original = file.read_bytes()
    end = original.index(b"\n")
    file.write_bytes(original[:end] + b"[" + original[end + 1 :])
    refusal(artifact)


@pytest.mark.parametrize("length", [0, 5, 64, 130, -1])
def test_a_truncated_matrix_file_is_refused(artifact: Path, length: int) -> None:
    file = artifact / "scores.npy"
    file.write_bytes(file.read_bytes()[:length])
    refusal(artifact)


def test_bytes_after_the_matrix_are_refused(artifact: Path) -> None:
    with (artifact / "scores.npy").open("ab") as file:
        file.write(b"\0")
    refusal(artifact)


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def replace_matrix(folder: Path, values: np.ndarray, **options) -> None:
    """Put another matrix in place, with the hash that belongs to it."""
    from hashlib import sha256

    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    (folder / "scores.npy").write_bytes(buffer.getvalue())
    edit_metadata(folder, sha256=sha256(buffer.getvalue()).hexdigest())


def test_a_matrix_of_pickled_objects_is_refused_and_not_unpickled(artifact: Path) -> None:
    mark = artifact / "unpickled"
    replace_matrix(artifact, np.full((4, 3), Trap(mark), dtype=object), allow_pickle=True)
    refusal(artifact)
    assert not mark.exists()


def test_an_archive_in_place_of_the_matrix_is_refused(artifact: Path) -> None:
    from hashlib import sha256

    buffer = io.BytesIO()
    np.savez(buffer, values=np.zeros((4, 3), np.float32))
    (artifact / "scores.npy").write_bytes(buffer.getvalue())
    edit_metadata(artifact, sha256=sha256(buffer.getvalue()).hexdigest())
    refusal(artifact)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", ">f4"])
def test_a_matrix_of_another_dtype_is_refused(artifact: Path, dtype: str) -> None:
    replace_matrix(artifact, np.zeros((4, 3), dtype))
    assert "float32" in refusal(artifact)


@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), (5, 3), ()])
def test_a_matrix_of_another_shape_is_refused(artifact: Path, shape: tuple) -> None:
    replace_matrix(artifact, np.zeros(shape, np.float32))
    assert "(4, 3)" in refusal(artifact)


@pytest.mark.parametrize("name", ["scores.npy", "metadata.json", *NAMES])
def test_a_missing_file_is_refused_by_name(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    assert name in refusal(artifact)


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    assert f"scores={tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "column"),
    [(name, column) for name in NAMES for column in sorted(REQUIRED_COLUMNS[name])],
)
def test_a_table_without_a_required_column_is_refused_by_name(
    artifact: Path, name: str, column: str
) -> None:
    table = pd.read_parquet(artifact / name)
    table.drop(columns=column).to_parquet(artifact / name)
    bless(artifact, name)
    message = refusal(artifact)
    assert name in message and column in message


@pytest.mark.parametrize("name", NAMES)
def test_a_table_with_another_number_of_rows_is_refused(artifact: Path, name: str) -> None:
    table = pd.read_parquet(artifact / name)
    table.iloc[1:].to_parquet(artifact / name)
    bless(artifact, name)
    assert name in refusal(artifact)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_whose_rows_were_reordered_is_refused_by_its_hash(
    artifact: Path, name: str
) -> None:
    pd.read_parquet(artifact / name).iloc[::-1].to_parquet(artifact / name)
    assert name in refusal(artifact)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_table_is_refused(artifact: Path, name: str) -> None:
    (artifact / name).write_bytes(b"PAR1 and then nothing")
    assert name in refusal(artifact)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION), None, [1]])
def test_another_schema_version_is_refused(artifact: Path, version) -> None:
    edit_metadata(artifact, schema_version=version)
    assert "schema" in refusal(artifact)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"[]", b"[1, 2]", b"null", b"1", b"\xff\xfe", b"[" * 100_000],
)
def test_metadata_that_is_no_json_object_is_refused(artifact: Path, content: bytes) -> None:
    (artifact / "metadata.json").write_bytes(content)
    assert "metadata.json" in refusal(artifact)


@pytest.mark.parametrize(
    "shape",
    [None, "4,3", 4, [], [4], [4, 3, 1], ["4", "3"], [4.0, 3.0], [True, 3], [4, -3], [0, 3], {}, [[4], [3]]],
)  # fmt: skip
def test_a_shape_that_is_not_two_positive_whole_numbers_is_refused(artifact: Path, shape) -> None:
    edit_metadata(artifact, shape=shape)
    assert "shape" in refusal(artifact)


@pytest.mark.parametrize("sha256", [None, 1, "", "0" * 64, ["a"]])
def test_a_wrong_or_missing_hash_is_refused(artifact: Path, sha256) -> None:
    edit_metadata(artifact, sha256=sha256)
    refusal(artifact)


def test_an_address_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    source = (tmp_path / "nowhere").as_uri()
    assert source in refusal(source)


# Artifacts that somebody else has written, their hashes with them


def change_table(folder: Path, name: str, change) -> None:
    """Put another arrow table in place of one, without pandas' and arrow's own notes on it."""
    from pyarrow import parquet

    table = change(parquet.read_table(folder / name)).replace_schema_metadata()
    parquet.write_table(table, folder / name, store_schema=False)
    bless(folder, name)


def cells(column: str, values: list):
    """A change of one column."""
    import pyarrow as pa

    return lambda table: table.set_column(
        table.column_names.index(column), column, pa.array(values[: len(table)])
    )


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("position", [0, 2, 1, 3], "not in order of position"),
        ("position", [0.0, 1.0, 2.0, 3.0], "whole numbers"),
        ("label", [-1, 0, 0, 0], "whole numbers"),
        ("label", ["a", "b", "c", "d"], "whole numbers"),
        ("loss", [0.0, np.nan, 0.0, 0.0], "finite numbers"),
        ("loss", [None, 1.0, 2.0, 3.0], "finite numbers"),
        ("alignment", [0.0, np.inf, 0.0, 0.0], "finite numbers"),
        ("self_influence", [True] * 4, "finite numbers"),
        ("example_id", [1, 2, 3, 4], "texts"),
        ("label_name", ["a", None, "c", "d"], "texts"),
        ("label_name", [b"\xff"] * 4, "texts"),
        ("label_name", [["a"]] * 4, "texts"),
    ],
)
def test_a_column_of_another_kind_is_refused_by_name(artifact, column, values, says) -> None:
    change_table(artifact, "train.parquet", cells(column, values))
    message = refusal(artifact)
    assert "train.parquet" in message and says in message


def test_texts_that_are_no_utf_8_are_refused(artifact: Path) -> None:
    """Found by fuzzing: pandas decodes them when they are looked at, and no sooner."""
    import pyarrow as pa

    bad = pa.Array.from_buffers(pa.string(), 3, pa.array(["aa", "bb", "cc"]).buffers()[:2] + [pa.py_buffer(b"a\xff\xfebcc")])  # fmt: skip
    change_table(artifact, "targets.parquet", lambda t: t.set_column(1, "example_id", bad))
    assert "UTF8" in refusal(artifact)


def test_two_columns_of_one_name_are_refused(artifact: Path) -> None:
    change_table(artifact, "train.parquet", lambda t: t.append_column("loss", t["alignment"]))
    assert "two columns" in refusal(artifact)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_not_read(artifact: Path, bad: float) -> None:
    values = np.zeros((4, 3), np.float32)
    values[3, 1] = bad
    replace_matrix(artifact, values)
    assert "not finite" in refusal(artifact)


@pytest.mark.parametrize("shape", [(1 << 40, 3), (4, 1 << 40), (1 << 62, 1 << 62), (10**30, 3)])
def test_a_header_that_claims_terabytes_is_refused(artifact: Path, shape: tuple) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(48)
    (artifact / "scores.npy").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_metadata(artifact, sha256=digest, shape=list(shape))
    with np.errstate(over="ignore"):
        assert "scores.npy" in refusal(artifact)


@pytest.mark.parametrize("name", ["../train.parquet", "/etc/passwd", "../../scores.npy"])
def test_paths_in_the_metadata_lead_nowhere(artifact: Path, name: str) -> None:
    """Names of files come from the code alone; what else the metadata names is not opened."""
    hashes = json.loads((artifact / "metadata.json").read_text())["sha256_tables"]
    edit_metadata(artifact, sha256_tables={name: "0", "train.parquet": hashes["train.parquet"]})
    assert "hashes" in refusal(artifact)
    edit_metadata(artifact, sha256_tables=hashes | {name: "0"}, file=name)
    assert load_scores(artifact).values.shape == (4, 3)


@pytest.mark.parametrize("name", ["scores.npy", "metadata.json", *NAMES])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_refused(artifact: Path, name: str, kind: str) -> None:
    file = artifact / name
    file.unlink()
    {"pipe": os.mkfifo, "folder": Path.mkdir, "loop": lambda f: f.symlink_to(f)}[kind](file)
    assert name in refusal(artifact)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("largest", [True, False])
def test_the_best_of_scores_that_are_not_finite_are_refused(bad: float, largest: bool) -> None:
    values = np.zeros((9, 2), np.float32)
    values[5, 1] = bad
    scores = Scores(values, pd.DataFrame({"position": range(9)}), pd.DataFrame(index=range(2)), {})
    with pytest.raises(InputError, match="^target=1: one of its scores is not finite"):
        scores.top(1, 3) if largest else scores.bottom(1, 3)
    assert len(scores.top(0, 3)) == 3


# -- the commands ----------------------------------------------------------------------------------


def failed(place: Place, stage: str, **given: Any) -> Result:
    """A command that ends with exit code 2 and a FAILED run."""
    result = place.run(stage, **given)
    assert result.code == 2
    assert result.runs[0].info.status == "FAILED" and not result.made()
    return result


@pytest.mark.slow
def test_commands_refuse_artifacts_that_somebody_spoiled(finished, new_place) -> None:
    place = new_place("hostile", like=finished[0])
    scores, finetune = (place.artifacts(run_id(place, stage)) for stage in ("trak", "finetune"))
    file = scores / "scores" / "scores.npy"
    replace_matrix(scores / "scores", np.load(file).astype(object), allow_pickle=True)
    check_refusal(failed(place, "ablation", frac=0.2), "scores=", "scores.npy")
    check_refusal(failed(place, "explain"), "scores=", "scores.npy")
    weights = place.checkpoints(run_id(place, "finetune"))[1] / "model.safetensors"
    tensors = load_file(weights)
    tensors["resnet.embedder.embedder.convolution.weight"][:] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    check_refusal(failed(place, "trak", proj_dim=16), str(weights.parent), "is not finite")
    (finetune / "training" / "logits.npz").write_bytes(b"PK")
    check_refusal(failed(place, "trak", proj_dim=16), "logits=", "cannot be read")
