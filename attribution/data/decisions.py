"""Files in which a person has written which examples to keep, and which labels are right."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config, nearest
from attribution.data.splits import check_every_class
from attribution.data.table_files import delimiter_of
from attribution.errors import InputError

LEFT_OUT = "left out"  # the split of examples that `keep` does not name
KEYS = ("example_id", "file_name")  # columns that name an image


def read_decisions(shown: str, file: str) -> pd.DataFrame:
    """Read a table, or a list of example_ids, as a person or a spreadsheet may have saved it.

    Args:
        shown: the parameter and its value, for messages.

    Returns:
        Texts by column, and the number of each row's line in column `line`. Commas, semicolons,
        tabs or bars divide the columns. A file without a heading that names one of KEYS is a list.

    Raises:
        InputError: the file cannot be read, or holds no rows.
    """
    try:
        # utf-8-sig: spreadsheets start a saved table with a byte order mark.
        with Path(file).expanduser().open(encoding="utf-8-sig", newline="") as text:
            delimiter = delimiter_of(text.readline())
            text.seek(0)
            lines = csv.reader(text, delimiter=delimiter)
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{shown}: cannot be read ({error})") from None
    rows = [(number, cells) for number, cells in rows if any(cells)]
    heading = ["example_id"]
    if rows and set(KEYS) & set(rows[0][1]):
        heading = rows.pop(0)[1]
    if not rows:
        raise InputError(f"{shown}: holds no example_ids")
    empty = dict.fromkeys(heading, "")
    return pd.DataFrame([{**empty, **dict(zip(heading, cells)), "line": n} for n, cells in rows])


def named_rows(table: pd.DataFrame, examples: pd.DataFrame, shown: str) -> np.ndarray:
    """The row of `examples` that each row of a table is about: by example_id, else by file_name.

    A spreadsheet may have turned an id into a number; the file name then still says which it is.

    Raises:
        InputError: a row names no example.
    """
    found = np.full(len(table), -1)
    for key in KEYS:
        if key in table:
            known = {name: row for row, name in enumerate(examples[key]) if name}
            rows = table[key].map(known).fillna(-1).to_numpy(np.int64)
            found = np.where(found < 0, rows, found)
    unknown = table[found < 0]
    if len(unknown):
        first = unknown.iloc[0]
        name = next(first[key] for key in KEYS if key in table)
        raise InputError(
            f"{shown}: {len(unknown)} of its {len(table)} rows name no image of this data set, e.g. "
            f"{name[:40]!r} in line {first['line']}; were they written for other data (name it with "
            "--dataset), or did a spreadsheet change the ids?"
        )
    return found


def kept_splits(examples: pd.DataFrame, names: list[str], config: Config) -> np.ndarray:
    """The split of every example, LEFT_OUT for those that `keep` does not name.

    A table with the column `split` may name examples of every split. A split that it does not name
    stays whole. Without that column it names training examples.

    Raises:
        InputError: a row names no example, or one of another split; or a class has no example left.
    """
    shown = f"keep={config.keep}"
    table = read_decisions(shown, config.keep)
    rows = named_rows(table, examples, shown)
    split = examples["split"].to_numpy(object).copy()
    table = table.assign(split=table.get("split", "train"), here=split[rows])
    moved = table[table["split"] != table["here"]]
    if len(moved):
        first = moved.iloc[0]
        raise InputError(
            f"{shown}: line {first['line']} names a {first['here']} image as one of split "
            f"{first['split']!r}; was it written with another data_seed?"
        )
    is_named = np.isin(np.arange(len(examples)), rows)
    split[np.isin(split, table["split"]) & ~is_named] = LEFT_OUT
    check_every_class(examples.assign(split=split), names, shown)
    return split


def relabelled(examples: pd.DataFrame, names: list[str], config: Config) -> pd.DataFrame:
    """The examples with the labels that parameter `labels` gives; they count as true.

    Raises:
        InputError: the file cannot be read, names an example or a class that does not exist, or leaves
            a class without examples in a split.
    """
    shown = f"labels={config.labels}"
    table = read_decisions(shown, config.labels)
    if "label" not in table:
        raise InputError(f"{shown}: needs the columns example_id (or file_name) and label")
    rows = named_rows(table, examples, shown)
    wrong = table[~table["label"].isin(names)]
    if len(wrong):
        name, line = wrong.iloc[0][["label", "line"]]
        raise InputError(f"{shown}: no such class {name!r} (line {line}); {nearest(name, names)}")
    new = examples["label_name"].to_numpy(object).copy()
    new[rows] = table["label"]  # of two rows for one image the last counts
    is_named = np.isin(np.arange(len(examples)), rows)
    number = {name: label for label, name in enumerate(names)}
    label = np.where(is_named, [number[name] for name in new], examples["label"])
    examples = examples.assign(
        label=label,
        label_name=new,
        true_label=np.where(is_named, label, examples["true_label"]),
        is_flipped=examples["is_flipped"] & ~is_named,
    )
    check_every_class(examples, names, shown)
    return examples
