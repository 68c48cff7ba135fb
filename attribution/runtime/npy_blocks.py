"""Read and write matrices that are larger than memory, as .npy files in blocks of rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np

from attribution.errors import InputError
from attribution.runtime.safe_files import atomic, check_hash, regular

BLOCK_ROWS = 4096  # enough for a matrix product to run at full speed
BLOCK_BYTES = 1 << 27
PIECE_BYTES = 1 << 20  # fits in a core's cache, and malloc reuses it


def row_slices(n: int, columns: int, limit: int = 0) -> Iterator[slice]:
    """Divide n rows of float32 values into blocks of bounded size, in order.

    Args:
        limit: bytes of a block; 0 means BLOCK_BYTES.
    """
    rows = max(1, min(BLOCK_ROWS, (limit or BLOCK_BYTES) // (4 * max(1, columns))))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def row_blocks(*matrices: np.ndarray, columns: int = 0) -> Iterator[np.ndarray]:
    """Yield the rows of matrices (n, columns) that are stacked vertically, in blocks.

    Args:
        columns: of the result computed from a block, if it is wider than the block.
    """
    for matrix in matrices:
        for rows in row_slices(len(matrix), max(matrix.shape[1], columns)):
            yield read_rows(matrix, rows)


def pieces(block: np.ndarray) -> Iterator[np.ndarray]:
    """Divide a block into pieces that fit in a core's cache together with results of their size."""
    return (block[rows] for rows in row_slices(len(block), block.shape[1], PIECE_BYTES))


def ahead(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the same blocks; the next one is computed in a thread while the last one is used."""
    iterator = iter(blocks)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, iterator, None)
        while (block := following.result()) is not None:
            following = thread.submit(next, iterator, None)
            yield block


def read_rows(matrix: np.ndarray, rows: slice) -> np.ndarray:
    """Rows of a matrix (n, columns), copied if it is a memory-mapped file.

    Pages of a memory map would stay in this process's memory after their use.
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
    """Whether a matrix is the memory map of a whole file, and not a slice of one."""
    return (
        isinstance(matrix, np.memmap)
        and matrix.filename is not None
        and matrix.mode != "c"  # copy-on-write: changes are not in the file
        and matrix.flags.c_contiguous
        and matrix.offset + matrix.nbytes == os.path.getsize(matrix.filename)
    )


def open_matrix(file: Path) -> np.ndarray:
    """Memory map of a .npy file, read-only; refuses archives and pickles, unlike np.load.

    Raises:
        Exception: of many types, if it is not such a file or is shorter than its header says.
    """
    return np.lib.format.open_memmap(regular(file), mode="r")


def checked_matrix(file: Path, promised: str, dtype: type, shape: Sequence[int] = ()) -> np.ndarray:
    """Memory map of a matrix that must have this SHA-256, type and shape; by default any matrix's shape.

    Raises:
        Exception: of many types, if the file is anything else.
    """
    check_hash(file, promised)
    matrix = open_matrix(file)
    fits = matrix.shape == tuple(shape) if shape else matrix.ndim == 2 and matrix.size > 0
    if matrix.dtype != dtype or not fits:
        wanted = f"{dtype.__name__} {tuple(shape) or '(n, k)'}"
        raise ValueError(f"{file.name} is {matrix.dtype} {matrix.shape}, not {wanted}")
    return matrix


def reserve(files: Iterable[Path]) -> None:
    """Reserve the disk space of files that are written through memory maps.

    Raises:
        OSError: the disk is full. Without this, a write to the map would kill the process.
    """
    for file in files:
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.path.getsize(file))


def write_matrix(
    file: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int], dtype: str = "<f4"
) -> None:
    """Write a matrix from its blocks of rows, whole or not at all.

    Args:
        blocks: arrays (rows, columns) in order; each is written before the next is computed.
        shape: of the whole matrix.
        dtype: numpy's name for it in a file; by default float32.

    Raises:
        InputError: a value is not finite, or too large for the type.
    """
    with atomic(file) as unfinished:
        with unfinished.open("wb") as out:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            n = sum(_write_block(out, block, file.stem, shape[1], dtype) for block in blocks)
        if n != shape[0]:
            raise ValueError(f"{file.name}: expected {shape[0]} rows, got {n}")


def _write_block(out: BinaryIO, block: np.ndarray, name: str, columns: int, dtype: str) -> int:
    with np.errstate(over="ignore"):  # a value that is too large becomes inf, and is refused below
        block = np.ascontiguousarray(block, dtype=dtype)
    if block.shape[1:] != (columns,):
        raise ValueError(f"{name}: expected a block of shape (rows, {columns}), got {block.shape}")
    if not np.isfinite(block).all():
        raise InputError(
            f"{name}: some values are not finite; raise lambda_reg, and look for a diverged checkpoint"
        )
    out.write(block.data)
    return len(block)
