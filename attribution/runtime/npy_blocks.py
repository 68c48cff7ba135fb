"""Matrices too large for memory: read and written as .npy files in blocks of rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np

from attribution.errors import InputError
from attribution.runtime.safe_files import regular

BLOCK_ROWS = 4096  # at most: enough for a product of matrices to run at full speed
BLOCK_BYTES = 1 << 27
PIECE_BYTES = 1 << 20  # what stays in a core's cache, and malloc need not ask the system for


def row_slices(n: int, columns: int, limit: int = 0) -> Iterator[slice]:
    """Divide n rows of so many float32 columns into blocks of bounded size, in order.

    Args:
        limit: bytes of a block, where that is not BLOCK_BYTES.
    """
    rows = max(1, min(BLOCK_ROWS, (limit or BLOCK_BYTES) // (4 * max(1, columns))))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def row_blocks(*matrices: np.ndarray, columns: int = 0) -> Iterator[np.ndarray]:
    """The rows of matrices (n, columns) that lie one below the other, a block at a time.

    Args:
        columns: of what is made of a block, where that is wider than the block.
    """
    for matrix in matrices:
        for rows in row_slices(len(matrix), max(matrix.shape[1], columns)):
            yield read_rows(matrix, rows)


def pieces(block: np.ndarray) -> Iterator[np.ndarray]:
    """A block's rows, so few at a time that what is computed of them alone costs no memory traffic."""
    return (block[rows] for rows in row_slices(len(block), block.shape[1], PIECE_BYTES))


def ahead(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same blocks, the next one made in another thread while the last one is used."""
    iterator = iter(blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, iterator, None)
            yield block


def read_rows(matrix: np.ndarray, rows: slice) -> np.ndarray:
    """Rows of a matrix (n, columns); those of a memory-mapped file are read into new memory.

    Every page of a map that was looked at would stay in this process's memory.
    """
    if not _is_whole_file(matrix):
        return matrix[rows]
    width = matrix.shape[1]
    values = np.fromfile(
        str(matrix.filename),
        matrix.dtype,
        count=(rows.stop - rows.start) * width,
        offset=matrix.offset + rows.start * width * matrix.itemsize,
    )
    return values.reshape(-1, width)


def _is_whole_file(matrix: np.ndarray) -> TypeGuard[np.memmap]:
    """Whether row i of the matrix is row i of its file: not so of a slice of a map."""
    return (
        isinstance(matrix, np.memmap)
        and matrix.filename is not None
        and matrix.mode != "c"  # its changes are in memory alone
        and matrix.flags.c_contiguous
        and matrix.offset + matrix.nbytes == os.path.getsize(matrix.filename)
    )


def open_matrix(file: Path) -> np.ndarray:
    """Memory map of a .npy file, read only; never an archive or a pickle, unlike np.load.

    Raises:
        Exception: of many kinds, where it is not one, or shorter than its header says.
    """
    return np.lib.format.open_memmap(regular(file), mode="r")


def reserve(files: Iterable[Path]) -> None:
    """Let the disk set room aside for files that are to be written through memory maps.

    Raises:
        OSError: there is none; a write into such a map would end the process.
    """
    for file in files:
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.path.getsize(file))


def write_matrix(
    file: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int], dtype: str = "<f4"
) -> None:
    """Write rows as they come, by default as float32; the file appears whole or not at all.

    Args:
        blocks: arrays (rows, columns) in order, each used before the next is asked for.
        shape: of the whole matrix.
        dtype: as numpy spells it in a file.

    Raises:
        InputError: a value that the type cannot hold, or not finite. The file is not there then.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as out:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            n = sum(_write_block(out, block, file.stem, shape[1], dtype) for block in blocks)
        if n != shape[0]:
            raise ValueError(f"{file.name}: {n} rows came, of {shape[0]}")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_block(out: BinaryIO, block: np.ndarray, name: str, columns: int, dtype: str) -> int:
    with np.errstate(over="ignore"):  # what the type cannot hold becomes inf, and is refused
        block = np.ascontiguousarray(block, dtype=dtype)
    if block.shape[1:] != (columns,):
        raise ValueError(f"{name}: a block of shape {block.shape}, not (rows, {columns})")
    if not np.isfinite(block).all():
        raise InputError(
            f"{name}: not all are finite; raise lambda_reg, and look for a diverged checkpoint"
        )
    out.write(block.data)
    return len(block)
