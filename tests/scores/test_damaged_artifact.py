"""Score artifacts with random damage, but fitting hashes: read as promised, or refused in one way."""

from __future__ import annotations

import contextlib
import io
import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from damage import edited, edits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from attribution.errors import InputError
from attribution.runtime.npy_blocks import write_matrix
from attribution.scores.artifact import REQUIRED_COLUMNS, Scores, load_scores, write_scores

COLUMNS = sorted(set.union(*REQUIRED_COLUMNS.values()))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 3, 4, -1, 2**31, 2**63])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
TYPES = ("'<f4'", "'>f4'", "'<f8'", "'<i4'", "'|O'", "'|b1'", "'<U9'", "'|V4'", "[('a', '<f4')]")
CELLS = (None, True, -1, 0, 1, 2**40, math.nan, math.inf, 0.5, "text", b"\xff", [1], {"a": 1})
QUICK = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def table(n: int) -> pd.DataFrame:
    columns = {name: np.arange(n) / n for name in COLUMNS}
    texts = {name: [f"{name} {i}" for i in range(n)] for name in ("example_id", "label_name")}
    return pd.DataFrame(columns | texts | {name: np.arange(n) for name in ("position", "label")})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undamaged artifact of 4 training examples and 3 targets."""
    folder = tmp_path_factory.mktemp("whole") / "scores"
    matrix = folder.with_name("matrix.npy")
    values = np.arange(12.0).reshape(4, 3)
    write_matrix(matrix, [values], (4, 3))
    write_scores(folder, matrix, Scores(values, table(4), table(3), {}))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read_or_refuse(folder: Path, whole: dict[str, bytes], name: str, content: bytes) -> None:
    """Replace one file and, in metadata.json, the hashes; then check what load_scores returns."""
    files = whole | {name: content}
    if name != "metadata.json":
        hashes = {file: sha256(files[file]).hexdigest() for file in files}
        tables = {file: hashes[file] for file in REQUIRED_COLUMNS}
        promised = json.loads(whole["metadata.json"])
        promised |= {"sha256": hashes["scores.npy"], "sha256_tables": tables}
        files["metadata.json"] = json.dumps(promised).encode()
    for file, bytes_ in files.items():
        (folder / file).write_bytes(bytes_)
    with contextlib.suppress(InputError):  # the documented refusal
        check(load_scores(folder))


def check(found: Scores) -> None:
    """Everything that load_scores promises of what it returns."""
    assert found.values.dtype == np.float32 and np.isfinite(found.values).all()
    assert found.values.shape == (len(found.train), len(found.targets))
    for name, table in zip(REQUIRED_COLUMNS, (found.train, found.targets), strict=True):
        assert REQUIRED_COLUMNS[name] <= set(table.columns)
        assert table["position"].tolist() == list(range(len(table)))
        assert np.isfinite(table["loss"].to_numpy(float)).all()
    assert len(found.top(0, 2)) == min(2, len(found.train))


@QUICK
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, whole: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(whole)))
    changes = data.draw(edits(len(whole[name])))
    read_or_refuse(tmp_path, whole, name, edited(whole[name], changes))


@QUICK
@given(
    descr=st.sampled_from(TYPES),
    shape=st.lists(st.sampled_from([0, 1, 3, 4, -1, 2**40, 2**62, 10**30]), max_size=3),
    fortran=st.booleans(),
    size=st.sampled_from([0, 4, 48]),
)
def test_false_headers(tmp_path, whole, descr: str, shape: list, fortran: bool, size: int) -> None:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {tuple(shape)}}}\n"
    start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    read_or_refuse(tmp_path, whole, "scores.npy", start + text.encode() + bytes(size))


@QUICK
@given(values=st.lists(st.floats(width=32), min_size=12, max_size=12))
def test_any_numbers(tmp_path, whole, values: list[float]) -> None:
    file = io.BytesIO()
    np.save(file, np.array(values, np.float32).reshape(4, 3))
    read_or_refuse(tmp_path, whole, "scores.npy", file.getvalue())


@QUICK
@given(data=st.data(), value=VALUES, gone=st.booleans())
def test_any_metadata(tmp_path, whole, data: st.DataObject, value: Any, gone: bool) -> None:
    promised = json.loads(whole["metadata.json"])
    key = data.draw(st.sampled_from(sorted(promised)))
    promised[key] = value
    if gone:
        del promised[key]
    read_or_refuse(tmp_path, whole, "metadata.json", json.dumps(promised).encode())


@QUICK
@given(
    name=st.sampled_from(sorted(REQUIRED_COLUMNS)),
    column=st.sampled_from([*COLUMNS, "is_flipped", "index"]),
    cells=st.none() | st.lists(st.sampled_from(CELLS), min_size=2, max_size=5),
    twice=st.booleans(),
)
def test_columns_changed_doubled_or_left_out(tmp_path, whole, name, column, cells, twice) -> None:
    table, out = parquet.read_table(io.BytesIO(whole[name])), io.BytesIO()
    if column in table.column_names and not twice:
        table = table.drop_columns([column])
    with contextlib.suppress(pa.ArrowException, TypeError, OverflowError):  # arrow cannot hold it
        if cells is not None:
            values = (cells * len(table))[: len(table)]
            table = table.append_column(column, pa.array(values))
        parquet.write_table(table, out)
        read_or_refuse(tmp_path, whole, name, out.getvalue())
