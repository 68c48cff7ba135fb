"""Matrices on disk: blocks cover every row once, and a file is whole or not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from attribution.errors import InputError
from attribution.runtime import npy_blocks
from attribution.runtime.npy_blocks import (
    ahead,
    open_matrix,
    pieces,
    read_rows,
    row_blocks,
    row_slices,
    write_matrix,
)


def example(n: int = 7, columns: int = 3) -> np.ndarray:
    return np.arange(n * columns, dtype=np.float32).reshape(n, columns) / 7


@given(n=st.integers(0, 300), columns=st.integers(1, 10**6), limit=st.integers(1, 1 << 20))
def test_slices_cover_every_row_once_in_bounded_blocks(n: int, columns: int, limit: int) -> None:
    with patch.object(npy_blocks, "BLOCK_BYTES", limit), patch.object(npy_blocks, "BLOCK_ROWS", 50):
        slices = list(row_slices(n, columns))
    assert [i for rows in slices for i in range(rows.start, rows.stop)] == list(range(n))
    for rows in slices:
        assert 1 <= rows.stop - rows.start <= 50
        assert (rows.stop - rows.start) * columns * 4 <= limit or rows.stop - rows.start == 1


@pytest.mark.parametrize("block_rows", [1, 2, 3, 7, 8])
def test_what_is_written_by_blocks_is_what_numpy_and_blocks_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(npy_blocks, "BLOCK_ROWS", block_rows)
    values, file = example(), tmp_path / "values.npy"
    write_matrix(file, row_blocks(values), values.shape)
    np.testing.assert_array_equal(np.load(file, allow_pickle=False), values)
    found = open_matrix(file)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    np.testing.assert_array_equal(np.concatenate(list(row_blocks(found))), values)


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v,
        lambda v: v[1:],
        lambda v: v[:-1],
        lambda v: v[::-1],
        lambda v: v[:, 1:],
        lambda v: v.T,
        lambda v: v[[3, 1]],
        lambda v: v * 2,
        lambda v: v.copy(),
        lambda v: v.reshape(3, 7),
    ],
)
def test_rows_of_any_view_of_a_map_are_those_of_the_view(tmp_path: Path, view) -> None:
    write_matrix(tmp_path / "values.npy", [example()], (7, 3))
    found = view(open_matrix(tmp_path / "values.npy"))
    np.testing.assert_array_equal(read_rows(found, slice(1, 2)), np.array(found)[1:2])


def test_changes_of_a_private_map_are_seen(tmp_path: Path) -> None:
    write_matrix(tmp_path / "values.npy", [example()], (7, 3))
    found = np.load(tmp_path / "values.npy", mmap_mode="c")
    found[1] = 5
    assert (read_rows(found, slice(1, 2)) == 5).all()


def test_rows_that_are_read_do_not_hold_the_file_in_memory(tmp_path: Path) -> None:
    from benchmarks.common import peak_memory_mib, reset_peak_memory

    n, columns = 1 << 15, 1 << 10  # 128 MiB
    file = tmp_path / "values.npy"
    with patch.object(npy_blocks, "BLOCK_BYTES", 1 << 22):
        blocks = (np.ones((rows.stop - rows.start, columns)) for rows in row_slices(n, columns))
        write_matrix(file, blocks, (n, columns))
        reset_peak_memory()
        before = peak_memory_mib()
        assert sum(float(block.sum()) for block in row_blocks(open_matrix(file))) == n * columns
    assert peak_memory_mib() - before < 32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_value_that_is_not_finite_in_float32_is_refused(tmp_path: Path, bad: float) -> None:
    block = np.zeros((2, 3))
    block[1, 2] = bad
    with pytest.raises(InputError, match="^scores: some values are not finite"):
        write_matrix(tmp_path / "scores.npy", [example(5), block], (7, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [[], [example(6)], [example(8)], [example(7, 2)]])
def test_blocks_that_do_not_make_the_matrix_are_an_error(tmp_path: Path, blocks) -> None:
    with pytest.raises(ValueError):
        write_matrix(tmp_path / "scores.npy", blocks, (7, 3))
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    def blocks():
        yield example(5)
        raise KeyboardInterrupt

    file = tmp_path / "scores.npy"
    write_matrix(file, [example()], (7, 3))
    with pytest.raises(KeyboardInterrupt):
        write_matrix(file, blocks(), (9, 3))
    np.testing.assert_array_equal(open_matrix(file), example())
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    program = """
import os, sys, numpy as np
from pathlib import Path
from attribution.runtime.npy_blocks import write_matrix
def blocks():
    yield np.zeros((1 << 16, 8))
    os._exit(9)
write_matrix(Path(sys.argv[1]), blocks(), (1 << 17, 8))
"""
    file = tmp_path / "scores.npy"
    done = subprocess.run([sys.executable, "-c", program, str(file)], cwd=ROOT)
    assert done.returncode == 9
    assert not file.exists() and list(tmp_path.iterdir())


def test_blocks_come_in_order_one_ahead_and_an_error_where_it_happens() -> None:
    made = []

    def blocks():
        for i in range(4):
            made.append(i)
            yield np.full((2, 3), i)
        raise InputError("the fifth")

    found = []
    with pytest.raises(InputError, match="the fifth"):
        for block in ahead(blocks()):
            found.append(int(block[0, 0]))
            assert len(made) <= len(found) + 1
    assert found == [0, 1, 2, 3]
    assert list(ahead([])) == []


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (700, 1000), (3, 2**20), (5, 0)])
def test_pieces_are_a_block_in_order_and_small(shape) -> None:
    block = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found = list(pieces(block))
    assert sum(map(len, found)) == len(block)
    assert all((a == b).all() for a, b in zip(np.concatenate([block[:0], *found]), block))
    assert all(len(piece) == 1 or piece.nbytes <= 1 << 20 for piece in found)
