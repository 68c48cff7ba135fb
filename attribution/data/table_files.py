"""Read a table of texts from a file of any kind that people write tables in."""

from __future__ import annotations

import codecs
import csv
import json
import os
from typing import Any

import pandas as pd

WINDOWS = "cp1252"  # the encoding of tables that are not UTF-8


def load_table(file: str, notes: list[str], **options: Any) -> pd.DataFrame | None:
    """A table of texts; None if the file holds something else.

    Args:
        notes: gets a line about an encoding that was guessed.
        options: of pandas.read_csv, for a text table.
    """
    try:
        frame = _any_table(file, notes, options)
    except (ValueError, OSError, KeyError, TypeError):  # pandas' own errors are ValueErrors
        return None
    if frame is None or frame.columns.empty:
        return None
    frame.columns = [str(column).strip() for column in frame]
    frame = frame.loc[
        :, [not c.startswith("Unnamed:") for c in frame] & ~frame.columns.duplicated()
    ]
    texts = frame.convert_dtypes().astype("string").fillna("")
    return texts.apply(lambda column: column.str.strip()).astype(object)


def _any_table(file: str, notes: list[str], options: dict[str, Any]) -> pd.DataFrame | None:
    suffix = os.path.splitext(file)[1].lower()
    if suffix == ".parquet":
        return _parquet(file)
    if suffix == ".jsonl":
        return pd.read_json(file, lines=True, dtype=False, convert_dates=False)
    if suffix == ".json":
        with open(file, encoding="utf-8-sig") as text:
            held = json.load(text)
        if isinstance(held, dict) and all(isinstance(v, str | int) for v in held.values()):
            return pd.DataFrame({"file": list(held), "label": list(held.values())})
        is_rows = isinstance(held, list) and all(isinstance(row, dict) for row in held)
        return pd.DataFrame(held) if is_rows else None
    encoding = _encoding_of(file)
    if encoding == WINDOWS:
        notes.append(f"{os.path.basename(file)} is not UTF-8 and is read as {WINDOWS}")
    return _text_table(file, suffix, encoding, options)


def _text_table(
    file: str, suffix: str, encoding: str, options: dict[str, Any]
) -> pd.DataFrame | None:
    """A text table. Of two columns, the second one may hold the delimiter, as in `1.png big dog`."""
    with open(file, encoding=encoding, errors="replace") as text:
        first = text.readline()
    delimiter = delimiter_of(first)
    if first.count(delimiter) == 0 and suffix == ".txt":
        delimiter = " "
    shape = {"sep": delimiter, "dtype": str, "keep_default_na": False, "skipinitialspace": True}
    shape |= {"encoding": encoding, "encoding_errors": "replace", **options}
    try:
        frame = pd.read_csv(file, **shape)
        if isinstance(frame.index, pd.RangeIndex):  # else rows have one field more than the heading
            return frame
    except pd.errors.ParserError:
        pass
    if first.count(delimiter) != 1:
        return None
    with open(file, encoding=encoding, errors="replace", newline="") as text:
        found = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
        rows = [
            [fields[0], delimiter.join(fields[1:]).rstrip(delimiter)] for fields in found if fields
        ]
    return pd.DataFrame(rows) if options else pd.DataFrame(rows[1:], columns=rows[0])


def _encoding_of(file: str) -> str:
    """The encoding of a text: UTF-8, or one of those that spreadsheets write on Windows."""
    with open(file, "rb") as content:
        start = content.read(2)
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        try:
            codecs.decode(start + content.read(), "utf-8")
            return "utf-8-sig"
        except UnicodeDecodeError:
            return WINDOWS


def delimiter_of(heading: str) -> str:
    """The mark between the columns of a text table, a comma where there is one column."""
    return max(",;\t|", key=heading.count)


def _parquet(file: str) -> pd.DataFrame | None:
    """A parquet file without images in it: those are hub_format's."""
    import pyarrow  # takes a third of a second, and few data sets need it
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(file)
    plain = all(not (pyarrow.types.is_nested(f.type) or "binary" in str(f.type)) for f in schema)
    return pd.read_parquet(file) if plain else None
