"""The score artifact: written once, then read as data, checked against its own hash and schema."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.errors import InputError, reason
from attribution.runtime.npy_blocks import open_matrix, row_blocks, write_matrix
from attribution.runtime.safe_files import read_json, sha256

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow
    from pyarrow.parquet import ParquetFile

SCHEMA_VERSION = 2
SIGN = "positive = helpful: the example's presence in training raises the target's margin"
REQUIRED_COLUMNS = {
    "train.parquet": {
        "position", "example_id", "label", "label_name", "alignment", "row_weight", "trust",
        "self_influence", "loss",
    },
    "targets.parquet": {"position", "example_id", "label", "label_name", "loss"},
}  # fmt: skip
# What a column holds, where a table has it: other types would fail, or mislead, far from here.
KINDS = {
    "whole numbers": ("position", "label", "true_label", "predicted_label"),
    "finite numbers": (
        "alignment",
        "row_weight",
        "trust",
        "self_influence",
        "loss",
        "label_quality",
    ),
    "texts": ("example_id", "label_name", "file_name"),
    "truth values": ("is_flipped",),
}
MOST_TABLE_BYTES = 1 << 30  # of a table, decoded


@dataclass(frozen=True)
class Scores:
    """TRAK scores with the examples that they are about.

    Attributes:
        values: (n_train, n_targets) float32, memory-mapped; values[i, j] is the effect of training
            example i on target j's margin, positive = helpful.
        train: one row a row of `values`, in the same order.
        targets: one row a column of `values`, in the same order.
        metadata: schema version, sign, estimator settings, fingerprints, sha256 of the matrix.
    """

    values: np.ndarray
    train: pd.DataFrame
    targets: pd.DataFrame
    metadata: dict[str, Any]

    def top(self, target: int, k: int = 10) -> pd.DataFrame:
        """The k training examples most helpful to a target, best first, with a `score` column.

        Raises:
            InputError: no such target, or k below 1.
        """
        return self._ranked(target, k, sign=-1)

    def bottom(self, target: int, k: int = 10) -> pd.DataFrame:
        """The k training examples most harmful to a target, worst first, with a `score` column.

        Raises:
            InputError: no such target, or k below 1.
        """
        return self._ranked(target, k, sign=1)

    def select(self, targets: list[int]) -> Scores:
        """The scores of a few targets alone, in memory, read in one pass over the file."""
        blocks = [block[:, targets] for block in row_blocks(self.values)]
        table = self.targets.iloc[targets].reset_index(drop=True)
        return Scores(np.concatenate(blocks), self.train, table, self.metadata)

    def top_per_target(self, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """`top` of every target, in one pass over the file: see top_k."""
        return top_k(self.values, k)

    def bottom_per_target(self, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """`bottom` of every target, in one pass over the file: see top_k."""
        return top_k(self.values, k, largest=False)

    def _ranked(self, target: int, k: int, sign: int) -> pd.DataFrame:
        if not 0 <= target < self.values.shape[1]:
            raise InputError(f"target={target}: must be from 0 to {self.values.shape[1] - 1}")
        if k < 1:
            raise InputError(f"k={k}: must be at least 1")
        column = np.asarray(self.values[:, target])
        if not np.isfinite(column).all():
            raise InputError(f"target={target}: a score of it is not finite")
        order = np.argsort(sign * column, kind="stable")[:k]
        return self.train.iloc[order].assign(score=column[order])


def top_k(values: np.ndarray, k: int, largest: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores of every target, in one pass over blocks of rows.

    Args:
        values: (n_train, n_targets), positive = helpful; may be a memory map.
        largest: or else the k lowest.

    Returns:
        Positions of the training examples, int64 (n_targets, k), and their scores, float32
        (n_targets, k): the best first, equal ones by position; fewer than k where n_train is.

    Raises:
        InputError: k below 1, or a score among the best that is not finite.
    """
    if k < 1:
        raise InputError(f"k={k}: must be at least 1")
    n, m = values.shape
    k, sign = min(k, n), 1 if largest else -1
    best = _Best(np.zeros((m, k), np.int64), np.full((m, k), -np.inf, np.float32))
    first = 0
    for block in row_blocks(values):
        best.add(block if largest else -block, first)
        first += len(block)
    if not np.isfinite(best.scores).all():
        raise InputError("scores: not all are finite")
    return best.rows, sign * best.scores


@dataclass
class _Best:
    """The k best of each column so far, both (m, k), the best first, equal ones by row."""

    rows: np.ndarray
    scores: np.ndarray

    def add(self, block: np.ndarray, first: int) -> None:
        """Take in rows (b, m), of which the topmost is row `first` of the matrix."""
        # A later row has to be better, not equal: ties go to the earlier row. NaN gets in, and is told.
        better = ~(block <= self.scores[:, -1])
        if len(block) > 1 and np.count_nonzero(better) > 4 * self.scores.size:
            half = len(block) // 2  # fewer will pass in the second half, once the first is in
            self.add(block[:half], first)
            self.add(block[half:], first + half)
            return
        rows, columns = np.divmod(np.flatnonzero(better), block.shape[1])
        m, k = self.scores.shape
        column = np.concatenate([np.repeat(np.arange(m), k), columns])
        row = np.concatenate([self.rows.ravel(), rows + first])
        score = np.concatenate([self.scores.ravel(), block[rows, columns]])
        score[np.isnan(score)] = np.inf
        order = np.lexsort((-score, column))  # stable, and equal scores are in order of rows
        counts = np.bincount(column, minlength=m)
        chosen = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)]
        self.rows, self.scores = row[chosen], score[chosen]


def write_scores(
    folder: Path,
    values: np.ndarray | Path,
    train: pd.DataFrame,
    targets: pd.DataFrame,
    metadata: dict[str, Any],
) -> Scores:
    """Write the artifact into a folder; metadata.json, written last, makes it whole.

    Args:
        values: (n_train, n_targets), positive = helpful, which is written by blocks; or the file
            that matrices.write_matrix made of it, which the folder gets as its own (linked, or copied).

    Returns:
        What was written, with the values in the folder and the whole metadata.

    Raises:
        InputError: a score is not finite, or the tables do not fit the matrix.
    """
    file = folder / "scores.npy"
    matrix = open_matrix(values) if isinstance(values, Path) else values
    if matrix.shape != (len(train), len(targets)):
        raise InputError(
            f"scores: shape {matrix.shape} does not fit {len(train)} examples, {len(targets)} targets"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(values, Path):
        try:
            os.link(values, file)  # the caller's stays until the artifact is safe
        except OSError:  # another file system
            shutil.copyfile(values, file)
    else:
        write_matrix(file, row_blocks(values), (len(train), len(targets)))
    train.to_parquet(folder / "train.parquet", index=False)
    targets.to_parquet(folder / "targets.parquet", index=False)
    document = {
        "schema_version": SCHEMA_VERSION,
        "sign": SIGN,
        "unit": "margin (log-odds of the target's label)",
        "shape": list(matrix.shape),
        "sha256": sha256(file),
        "sha256_tables": {name: sha256(folder / name) for name in REQUIRED_COLUMNS},
        **metadata,
    }
    (folder / "metadata.json").write_text(json.dumps(document, indent=2) + "\n")
    return Scores(open_matrix(file), train, targets, document)


def load_scores(source: str | Path) -> Scores:
    """Read a score artifact from a folder, or from a run as 'runs:/RUN_ID/scores'.

    Whoever wrote it: nothing is unpickled, and nothing read that is larger than its file.

    Raises:
        InputError: something is missing, or differs from what metadata.json promises; a score that
            is not finite; a column of another kind than it has to be.
    """
    folder = local_folder(str(source))
    metadata = _read_metadata(folder, source)
    matrix = folder / "scores.npy"
    try:
        has_hash = sha256(matrix) == metadata["sha256"]
        values = open_matrix(matrix)
    except Exception as error:  # numpy raises many kinds on a broken header
        raise InputError(f"scores={source}: scores.npy cannot be read ({reason(error)})") from None
    if not has_hash:
        raise InputError(f"scores={source}: scores.npy does not have the hash in metadata.json")
    if values.dtype != np.float32 or list(values.shape) != metadata["shape"]:
        raise InputError(
            f"scores={source}: scores.npy is {values.dtype} {values.shape}, "
            f"not float32 {tuple(metadata['shape'])} as metadata.json says"
        )
    if not all(np.isfinite(block).all() for block in row_blocks(values)):
        raise InputError(f"scores={source}: scores.npy holds values that are not finite")
    train, targets = (
        _read_table(folder / name, length, metadata["sha256_tables"][name], source)
        for name, length in zip(REQUIRED_COLUMNS, values.shape, strict=True)
    )
    return Scores(values, train, targets, metadata)


def local_folder(source: str, parameter: str = "scores") -> Path:
    """A folder that is named by its path, or as an artifact of a run ('runs:/RUN_ID/PATH').

    Raises:
        InputError: the artifact cannot be had.
    """
    if "://" not in source and not source.startswith("runs:"):
        return Path(source)
    import mlflow

    try:
        return Path(mlflow.artifacts.download_artifacts(source))
    except Exception as error:  # each artifact store raises its own kind
        raise InputError(f"{parameter}={source}: cannot be had ({reason(error)})") from None


def _read_metadata(folder: Path, source: str | Path) -> dict[str, Any]:
    try:
        metadata = read_json(folder / "metadata.json")
    except OSError:
        raise InputError(
            f"scores={source}: no metadata.json there; is it a scores folder?"
        ) from None
    except ValueError:
        raise InputError(f"scores={source}: metadata.json is not valid JSON") from None
    if not isinstance(metadata, dict) or metadata.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"scores={source}: metadata.json is not of schema {SCHEMA_VERSION}")
    shape = metadata.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(side) is int and side > 0 for side in shape)
        and isinstance(metadata.get("sha256"), str)
        and isinstance(metadata.get("sha256_tables"), dict)
        and REQUIRED_COLUMNS.keys() <= metadata["sha256_tables"].keys()
    ):
        raise InputError(f"scores={source}: metadata.json lacks a valid shape or hashes")
    return metadata


def _read_table(path: Path, length: int, promised: str, source: str | Path) -> pd.DataFrame:
    from pyarrow.parquet import ParquetFile

    def refused(what: str) -> InputError:
        return InputError(f"scores={source}: {path.name} {what}")

    try:
        if sha256(path) != promised:
            raise refused("does not have its hash")
        file = ParquetFile(path)
        rows = file.metadata.num_rows
        if rows != length:  # before a row is decoded: few bytes may claim many
            raise refused(f"has {rows} rows, not {length}")
        table = _decoded(file).to_pandas().reset_index(drop=True)
    except InputError:
        raise
    except Exception as error:  # pyarrow raises many kinds on a broken file
        raise refused(f"cannot be read ({reason(error)})") from None
    missing = REQUIRED_COLUMNS[path.name] - set(table.columns)
    if missing:
        raise refused(f"lacks the columns {sorted(missing)}")
    if len(table) != length:
        raise refused(f"has {len(table)} rows, not {length}")
    if not table.columns.is_unique:
        raise refused("has two columns of one name")
    for kind, names in KINDS.items():
        for name in names:
            if name in table and not _is_of(kind, table[name]):
                raise refused(f"has a column {name} that does not hold {kind}")
    if (table["position"] != range(length)).any():
        raise refused("is not in order of position")
    return table


def _decoded(file: ParquetFile) -> pyarrow.Table:
    """The rows of a file, some at a time: a long text that every row refers to is stored once.

    Raises:
        ValueError: they take too much memory, or are not what their types say.
    """
    import pyarrow

    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    size = sum(group.total_byte_size for group in groups)
    batches, taken = [], 0
    if size <= MOST_TABLE_BYTES:
        for batch in file.iter_batches(max(1, min(1 << 16, MOST_TABLE_BYTES // max(1, size)))):
            batches.append(batch)
            taken += batch.nbytes
            if taken > MOST_TABLE_BYTES:
                break
    if max(size, taken) > MOST_TABLE_BYTES:
        raise ValueError(f"larger than {MOST_TABLE_BYTES >> 20} MiB")
    table = pyarrow.Table.from_batches(batches, file.schema_arrow)
    table.validate(full=True)  # of texts, that they are UTF-8
    return table


def _is_of(kind: str, column: pd.Series) -> bool:
    if kind == "texts":
        return all(isinstance(value, str) for value in column)
    values = column.to_numpy()
    if kind == "truth values":
        return values.dtype == bool
    if kind == "whole numbers":
        return values.dtype.kind in "iu" and bool((values >= 0).all())
    return values.dtype.kind in "iuf" and bool(np.isfinite(values).all())
