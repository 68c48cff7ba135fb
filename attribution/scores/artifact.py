"""The score artifact: a matrix and two tables on disk, checked by hash and schema when read."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile

from attribution.errors import InputError, reason
from attribution.runtime.npy_blocks import checked_matrix, row_blocks
from attribution.runtime.safe_files import check_hash, link_or_copy, read_json, sha256
from attribution.scores.gallery import Gallery, gallery

SCHEMA_VERSION = 2
SIGN = "positive = helpful: the example's presence in training raises the target's margin"
REQUIRED_COLUMNS = {
    "train.parquet": {
        "position", "example_id", "label", "label_name", "alignment", "row_weight", "trust",
        "self_influence", "loss",
    },
    "targets.parquet": {"position", "example_id", "label", "label_name", "loss"},
}  # fmt: skip
# Content of the columns that a table has: another type would fail or mislead later.
KINDS = {
    "whole numbers": ("position", "label", "true_label", "predicted_label"),
    "finite numbers": (
        "alignment", "row_weight", "trust", "self_influence", "loss", "label_quality",
    ),
    "texts": ("example_id", "label_name", "file_name"),
    "truth values": ("is_flipped",),
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """TRAK scores with tables of the examples they are about.

    Attributes:
        values: (n_train, n_targets) float32, a memory map. values[i, j] is the effect of training
            example i on the margin (log-odds) of target j's label; positive = helpful.
        train: training examples, one per row of `values`, in order.
        targets: targets, one per column of `values`, in order.
        metadata: schema version, sign, estimator settings, fingerprints, hashes of the files.
    """

    values: np.ndarray
    train: pd.DataFrame
    targets: pd.DataFrame
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        n, targets = self.values.shape
        return f"<Scores of {n:,} training examples on {targets:,} targets; positive = helpful>"

    def _repr_html_(self) -> str:
        """The ten training examples with the lowest trust, for a notebook."""
        columns = ["example_id", "file_name", "label_name", "trust", "alignment", "loss"]
        shown = self.train.sort_values("trust").head(10)
        table = shown[[name for name in columns if name in shown]].to_html(index=False)
        return f"<p>{html.escape(repr(self))}. The least trusted training examples:</p>{table}"

    def top(self, target: int, k: int = 10) -> pd.DataFrame:
        """The k training examples most helpful to a target, with a `score` column, best first.

        Raises:
            InputError: an unknown target, k below 1, or a score that is not finite.
        """
        return self._ranked(target, k, sign=-1)

    def bottom(self, target: int, k: int = 10) -> pd.DataFrame:
        """The k training examples most harmful to a target, with a `score` column, worst first.

        Raises:
            InputError: an unknown target, k below 1, or a score that is not finite.
        """
        return self._ranked(target, k, sign=1)

    def show(self, examples: pd.DataFrame | Sequence[str]) -> Gallery:
        """Pictures of examples in a notebook: `scores.show(scores.top(17))`, or by example_id.

        Args:
            examples: rows of `train`, `targets`, `top` or `bottom`, or a list of example_ids.

        Raises:
            InputError: an unknown id, or as gallery does.
        """
        if isinstance(examples, pd.DataFrame):
            return gallery(examples, self.metadata)
        known = pd.concat([self.train, self.targets]).set_index("example_id", drop=False)
        if unknown := [name for name in examples if name not in known.index]:
            raise InputError(f"example_id={unknown[0]}: was not scored, and is no target")
        return gallery(known.loc[list(examples)], self.metadata)

    def select(self, targets: list[int]) -> Scores:
        """The scores of some targets, in memory, read in one pass over the file."""
        blocks = [block[:, targets] for block in row_blocks(self.values)]
        table = self.targets.iloc[targets].reset_index(drop=True)
        return Scores(np.concatenate(blocks), self.train, table, self.metadata)

    def _ranked(self, target: int, k: int, sign: int) -> pd.DataFrame:
        if not 0 <= target < self.values.shape[1]:
            raise InputError(f"target={target}: must be from 0 to {self.values.shape[1] - 1}")
        if k < 1:
            raise InputError(f"k={k}: must be at least 1")
        column = np.asarray(self.values[:, target])
        if not np.isfinite(column).all():
            raise InputError(f"target={target}: one of its scores is not finite")
        order = np.argsort(sign * column, kind="stable")[:k]
        return self.train.iloc[order].assign(score=column[order])


def write_scores(folder: Path, matrix: Path, scores: Scores) -> None:
    """Write the artifact into a folder. metadata.json is written last and makes it complete.

    Args:
        matrix: file of the scores' values, by write_matrix. It is linked into the folder (copied on
            another file system) and stays in its place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scores.npy"
    link_or_copy(matrix, file)
    scores.train.to_parquet(folder / "train.parquet", index=False)
    scores.targets.to_parquet(folder / "targets.parquet", index=False)
    document = {
        "schema_version": SCHEMA_VERSION,
        "sign": SIGN,
        "shape": list(scores.values.shape),
        "sha256": sha256(file),
        "sha256_tables": {name: sha256(folder / name) for name in REQUIRED_COLUMNS},
        **scores.metadata,
    }
    (folder / "metadata.json").write_text(json.dumps(document, indent=2) + "\n")


def load_scores(source: str | Path) -> Scores:
    """Read a score artifact from a folder, or from a run as 'runs:/RUN_ID/scores'.

    Safe for artifacts by strangers: nothing is unpickled, and no file may claim to be larger than
    it is.

    Raises:
        InputError: a file is missing or damaged, or its content is not what metadata.json says.
    """
    folder = local_folder(str(source))
    with _reading(source, "metadata.json"):
        metadata = _read_metadata(folder / "metadata.json")
    with _reading(source, "scores.npy"):
        file, promised = folder / "scores.npy", metadata["sha256"]
        values = checked_matrix(file, promised, np.float32, metadata["shape"])
        if not all(np.isfinite(block).all() for block in row_blocks(values)):
            raise ValueError("it has values that are not finite")
    tables = []
    for name, length in zip(REQUIRED_COLUMNS, values.shape, strict=True):
        with _reading(source, name):
            check_hash(folder / name, metadata["sha256_tables"][name])
            tables.append(_read_table(folder / name, length))
    train, targets = tables
    return Scores(values, train, targets, metadata)


def local_folder(source: str, parameter: str = "scores") -> Path:
    """A folder given by its path, or as an artifact of a run ('runs:/RUN_ID/PATH').

    Raises:
        InputError: the artifact cannot be downloaded.
    """
    if "://" not in source and not source.startswith("runs:"):
        return Path(source)
    import mlflow  # a second, which a folder on this disk need not wait for

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        if found := re.fullmatch(r"runs:/+(\w+)/scores", source):
            # Of an ablation, an evaluation or an explanation: the scores that it was made from.
            trak_id = mlflow.get_run(found[1]).data.tags.get("trak_run_id", found[1])
            source = f"runs:/{trak_id}/scores"
        return Path(mlflow.artifacts.download_artifacts(source))
    except Exception as error:  # each artifact store raises its own kind
        raise InputError(f"{parameter}={source}: cannot be downloaded ({reason(error)})") from None


@contextmanager
def _reading(source: str | Path, name: str) -> Iterator[None]:
    """Turn every error in the block into an InputError that names the source and the file."""
    try:
        yield
    except Exception as error:  # numpy, json and pyarrow raise many kinds on broken files
        raise InputError(f"scores={source}: {name} cannot be used: {reason(error)}") from None


def _read_metadata(file: Path) -> dict[str, Any]:
    metadata = read_json(file)
    if not isinstance(metadata, dict) or metadata.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"it does not have schema_version {SCHEMA_VERSION}")
    shape = metadata.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(side) is int and side > 0 for side in shape)
        and isinstance(metadata.get("sha256"), str)
        and isinstance(metadata.get("sha256_tables"), dict)
        and REQUIRED_COLUMNS.keys() <= metadata["sha256_tables"].keys()
    ):
        raise ValueError("it lacks a valid shape or hashes")
    return metadata


def _read_table(file: Path, length: int) -> pd.DataFrame:
    parquet = ParquetFile(file)
    rows = parquet.metadata.num_rows
    if rows != length:  # before decoding: few bytes may claim many rows
        raise ValueError(f"it has {rows} rows, not {length}")
    decoded = parquet.read()
    decoded.validate(full=True)  # also that texts are UTF-8
    table = decoded.to_pandas().reset_index(drop=True)
    if len(table) != length:
        raise ValueError(f"it has {len(table)} rows, not {length}")
    missing = REQUIRED_COLUMNS[file.name] - set(table.columns)
    if missing:
        raise ValueError(f"it lacks the columns {sorted(missing)}")
    if not table.columns.is_unique:
        raise ValueError("it has two columns of one name")
    for kind, names in KINDS.items():
        for name in names:
            if name in table and not _is_of(kind, table[name]):
                raise ValueError(f"its column {name} does not hold {kind}")
    if (table["position"] != range(length)).any():
        raise ValueError("it is not in order of position")
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
