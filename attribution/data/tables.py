"""Labels in tables next to image files: metadata.csv, train.csv with ids, lists such as test.txt."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.columns import choose_images, choose_labels, parts_of, sorted_names
from attribution.data.folders import Files, FolderPath
from attribution.data.image_finder import ImageFinder, stem
from attribution.data.parts import role_of
from attribution.data.sources import Source, from_files, some
from attribution.data.table_files import load_table
from attribution.errors import InputError

UNKNOWN = ("", "-1", "nan", "null")  # labels of images without one
MOST_TEXTS = 20  # more .txt files than this are annotations, one for each image


@dataclass
class Labelled:
    """Rows of tables that name images.

    Attributes:
        rows: path, label ('' where unknown), part, table, and the tables' other columns; one row per
            image.
        used: the tables.
        notes: lines about what was chosen and left out.
        has_labels: False for mere lists of images.
        label_column: the column that the labels are from; empty where they are from several.
    """

    rows: pd.DataFrame
    used: list[FolderPath]
    notes: list[str]
    has_labels: bool
    label_column: str


@dataclass(eq=False)
class _Table:
    """What one table says of the images that it names.

    Attributes:
        rows: path, part, table, and the other columns.
        labels: of the rows; None if no column looks like labels.
        unclear: why, if several columns do.
    """

    path: FolderPath
    rows: pd.DataFrame
    labels: pd.Series | None = None
    unclear: InputError | None = None
    notes: list[str] = field(default_factory=list)


def read_tables(files: Files, config: Config, has_folders: bool = False) -> Labelled | None:
    """The rows of all tables that name images; None if there is none.

    Args:
        has_folders: whether class folders give labels too.

    Raises:
        InputError: several columns may hold the labels, or an image has several labels.
    """
    texts = [table for table in files.tables if table[-1].lower().endswith(".txt")]
    shown = [
        table
        for table in files.tables
        if not re.search("submission|sample_?sub", table[-1].lower())
        and not (len(texts) > MOST_TEXTS and table in texts)
    ]
    if not shown:
        return None
    finder = ImageFinder(files)
    found = [each for path in shown if (each := _read_one(path, finder, config))]
    labelled = [each for each in found if each.labels is not None]
    known = {path for each in labelled for path in each.rows["path"]}
    for each in found:
        if each.unclear and not known.issuperset(each.rows["path"]):
            hint = ", or --class_depth 1 for the class folders" if has_folders else ""
            raise InputError(f"{each.unclear}{hint}")
    chosen = labelled or [each for each in found if role_of(stem(each.path[-1]))]
    if not chosen:
        return None
    return _joined(chosen, [each.path for each in found if each not in chosen], files)


def with_table(
    files: Files, table: Labelled, folders: Source | None, config: Config
) -> Source | None:
    """The images as tables label them, or class folders with the parts that tables give.

    None if the tables add nothing to the folders.

    Raises:
        InputError: tables and folders give different classes.
    """
    rows = table.rows
    if folders is None or len(folders.class_names) < 2:
        return _from_rows(files, table) if table.has_labels else None
    cells = folders.cells(np.arange(len(folders.labels)))
    own = dict(zip((cell["path"] for cell in cells), folders.labels))
    pairs = pd.DataFrame({"own": rows["path"].map(own), "label": rows["label"]}).dropna()
    is_partial = len(pairs) < len(own) / 2 and table.has_labels
    if is_partial and not config.label_column:
        return None
    pairs = pairs.drop_duplicates()
    if table.has_labels and (pairs["own"].duplicated() | pairs["label"].duplicated()).any():
        if config.label_column:
            return _from_rows(files, table)
        names = some(["/".join(t) for t in table.used])
        column = table.label_column or "COLUMN"
        raise InputError(
            f"dataset={config.dataset}: the folders and {names} give different classes; add "
            f"--class_depth 1 for the folders, or --label_column {column} for the table"
        )
    roles = {role_of(part) for part in rows["part"]}
    if len(roles) < 2 and table.has_labels or len(set(folders.parts)) > 1:
        return None
    part = dict(zip(rows["path"], rows["part"]))
    other = "unlisted" if "train" in roles else "train"
    return replace(
        folders,
        parts=np.array([part.get(path, other) for path in own], object),
        notes=(
            *folders.notes,
            f"parts: from {some(['/'.join(t) for t in table.used])}",
            *files.notes(table.used),
        ),
    )


def _from_rows(files: Files, table: Labelled) -> Source:
    rows = table.rows
    unknown = rows["label"].str.lower().isin(UNKNOWN)
    if set(rows["label"]) == {"1", "-1"}:  # yes and no
        unknown[:] = False
    known = rows["label"].where(~unknown, None)
    source = from_files(
        files.root,
        list(zip(rows["path"], known, rows["part"], strict=True)),
        sorted_names(set(known.dropna())),
        [*table.notes, *files.notes(table.used)],
    )
    return replace(source, column=lambda name: list(rows[name]) if name in rows else None)


def _joined(chosen: list[_Table], unlabelled: list[FolderPath], files: Files) -> Labelled:
    """One row per image out of several tables."""
    notes = [note for each in chosen for note in each.notes]
    if unlabelled:
        notes.append(
            f"tables without labels are not used: {some(['/'.join(t) for t in unlabelled])}"
        )
    label = chosen[0].labels
    rows = pd.concat(
        [each.rows.assign(label="" if each.labels is None else each.labels) for each in chosen],
        ignore_index=True,
    )
    rows = rows.drop_duplicates(["path", "label"])
    twice = rows[rows["path"].duplicated(keep=False)]
    if len(twice):
        first = twice[twice["path"] == twice["path"].iloc[0]]
        raise InputError(
            f"dataset={files.root}: {twice['path'].nunique():,} images have several labels, such as "
            f"{os.path.basename(first['path'].iloc[0])} ({', '.join(first['label'].iloc[:2])}, in "
            f"{' and '.join(dict.fromkeys(first['table']))}); leave one row for each image"
        )
    total = sum(len(names) for names in files.images.values())
    if total > len(rows):
        notes.append(f"{total - len(rows):,} images are in no table with labels and are not used")
    used, column = [each.path for each in chosen], "" if label is None else str(label.name or "")
    return Labelled(rows.reset_index(drop=True), used, notes, label is not None, column)


def _read_one(path: FolderPath, finder: ImageFinder, config: Config) -> _Table | None:
    """What one table says; None if it names no images."""
    name, file = "/".join(path), finder.files.path(path[:-1], path[-1])
    notes: list[str] = []
    frame = load_table(file, notes)
    if frame is not None and any(finder.find(str(c), path) for c in frame):  # without a heading
        notes = []
        frame = load_table(file, notes, header=None)
    if frame is None or frame.empty:
        return None
    column = config.image_column
    if not column:
        column = choose_images(frame, name, lambda text: finder.find(text, path), notes)
    if column not in frame:
        return None
    images = [finder.find(text, path, strict=True) for text in frame[column]]
    is_found = np.array([image is not None for image in images])
    if not is_found.all():
        missing = frame[column][~is_found]
        notes.append(f"{len(missing):,} rows of {name} name no image, such as {missing.iloc[0]!r}")
    others = frame.drop(columns=column)
    parts = parts_of(others.drop(columns=config.label_column, errors="ignore"), name, notes)
    own = [_part_of(i, path, finder.files) for i in images] if parts is None else parts
    rows = others.assign(path=images, table=name, part=own)[is_found]
    try:
        given = others if parts is None else others.drop(columns=parts.name)
        labels = choose_labels(given, name, config, notes)
    except InputError as error:  # another table may be clear
        return _Table(path, rows, unclear=error, notes=notes)
    return _Table(path, rows, labels if labels is None else labels[is_found], notes=notes)


def _part_of(path: str | None, table: FolderPath, files: Files) -> str:
    """The part that the path of an image names, else its table's name."""
    folders = os.path.relpath(path, files.root).split(os.sep)[:-1] if path else []
    for name in (*folders, *table[:-1], stem(table[-1])):
        if role_of(name):
            return name
    return "train"
