"""Labels in tables next to image files: metadata.csv, train.csv with ids, lists such as test.txt."""

from __future__ import annotations

import codecs
import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.folders import TABLES, Files, FolderPath
from attribution.data.parts import plain, role_of
from attribution.data.sources import Source, from_files, image_suffixes, some
from attribution.errors import InputError

LABEL_NAMES = (
    "label", "labels", "class", "target", "category", "fine_label", "class_name", "label_name",
)  # fmt: skip
IMAGE_NAMES = ("image", "img", "file", "filename", "path", "filepath")
UNKNOWN = ("", "-1", "nan", "null")  # labels of images without one
SPLIT_NAMES = ("split", "subset", "partition")
FLAGS = {"0", "1", "0.0", "1.0"}
WINDOWS = "cp1252"  # the encoding of tables that are not UTF-8
SAMPLE = 200  # rows that are looked at to find the column of the images
MOST_TEXTS = 20  # more .txt files than this are annotations, one for each image


@dataclass
class Labelled:
    """Rows of tables that name images.

    Attributes:
        rows: path, label ('' where unknown), part, table; one row per image.
        other: the tables' other columns.
        used: the tables.
        label_columns: the columns that the labels are from.
        notes: lines about what was chosen and left out.
        has_labels: False for mere lists of images.
    """

    rows: pd.DataFrame
    used: list[FolderPath]
    notes: list[str]
    has_labels: bool

    @property
    def label_column(self) -> str:
        """The column that the labels are from, or the word COLUMN where they are from several."""
        return self.rows.attrs["label_column"] or "COLUMN"


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
    finder = _Finder(files)
    found = [
        (table, rows) for table in shown if (rows := _read_one(table, finder, config)) is not None
    ]
    labelled = [(table, rows) for table, rows in found if "label" in rows]
    known = {path for _, rows in labelled for path in rows["path"]}
    for _, rows in found:
        if rows.attrs["unclear"] and not known.issuperset(rows["path"]):
            hint = ", or --class_depth 1 for the class folders" if has_folders else ""
            raise InputError(f"{rows.attrs['unclear']}{hint}")
    chosen = labelled or [(table, rows) for table, rows in found if role_of(_stem(table[-1]))]
    if not chosen:
        return None
    return _joined(chosen, [t for t, _ in found if t not in dict(chosen)], files)


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
        raise InputError(
            f"dataset={config.dataset}: the folders and {names} give different classes; add "
            f"--class_depth 1 for the folders, or --label_column {table.label_column} for the table"
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


def _joined(
    chosen: list[tuple[FolderPath, pd.DataFrame]], unlabelled: list[FolderPath], files: Files
) -> Labelled:
    """One row per image out of several tables."""
    notes = [note for _, rows in chosen for note in rows.attrs["notes"]]
    if unlabelled:
        notes.append(
            f"tables without labels are not used: {some(['/'.join(t) for t in unlabelled])}"
        )
    rows = pd.concat([rows for _, rows in chosen], ignore_index=True)
    has_labels = "label" in rows
    if not has_labels:
        rows["label"] = ""
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
    rows = rows.reset_index(drop=True)
    rows.attrs = chosen[0][1].attrs
    return Labelled(rows, [t for t, _ in chosen], notes, has_labels)


def _read_one(table: FolderPath, finder: _Finder, config: Config) -> pd.DataFrame | None:
    """The rows of one table with columns path, part, table, perhaps label; None if it names no images."""
    name = "/".join(table)
    file = finder.files.path(table[:-1], table[-1])
    frame = _load(file)
    if frame is None or frame.empty:
        return None
    if any(finder.find(str(column), table) for column in frame):  # without a heading
        frame = _load(file, header=None)
        assert frame is not None  # it was read a moment ago
    notes: list[str] = []
    if _is_text(file) and _encoding(file) == WINDOWS:
        notes.append(f"{name} is not UTF-8 and is read as {WINDOWS}")
    column = _image_column(frame, table, finder, config, notes)
    if column is None:
        return None
    paths = [finder.find(value, table, strict=True) for value in frame[column]]
    is_found = np.array([path is not None for path in paths])
    if not is_found.all():
        missing = frame[column][~is_found]
        notes.append(f"{len(missing):,} rows of {name} name no image, such as {missing.iloc[0]!r}")
    rest = frame.drop(columns=column)
    parts = parts_of(rest, name, notes)
    labels = unclear = None
    try:
        given = rest if parts is None else rest.drop(columns=parts.name)
        labels = choose_labels(given, name, config, notes)
    except InputError as error:  # another table may be clear
        unclear = error
    rows = rest.assign(path=paths, table=name)
    rows["part"] = [_part_of(p, table, finder.files) for p in paths] if parts is None else parts
    if labels is not None:
        rows["label"] = labels
    else:
        rows = rows.drop(columns="label", errors="ignore")
    rows = rows[is_found]
    label_column = labels.name if labels is not None else None
    rows.attrs = {"notes": notes, "unclear": unclear, "label_column": label_column}
    return rows


def _load(file: str, **options: Any) -> pd.DataFrame | None:
    """A table of texts; None if the file holds something else."""
    try:
        frame = _any_table(file, options)
    except (ValueError, OSError, KeyError, TypeError):  # pandas' own errors are ValueErrors
        return None
    if frame is None:
        return None
    frame.columns = [str(column).strip() for column in frame]
    frame = frame.loc[
        :, [not c.startswith("Unnamed:") for c in frame] & ~frame.columns.duplicated()
    ]
    texts = frame.convert_dtypes().astype("string").fillna("")
    return texts.apply(lambda column: column.str.strip()).astype(object)


def _any_table(file: str, options: dict[str, Any]) -> pd.DataFrame | None:
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
    return _text_table(file, suffix, options)


def _text_table(file: str, suffix: str, options: dict[str, Any]) -> pd.DataFrame | None:
    """A text table. Of two columns, the second one may hold the delimiter."""
    encoding = _encoding(file)
    with open(file, encoding=encoding, errors="replace") as text:
        first = text.readline()
    delimiter = delimiter_of(first)
    if first.count(delimiter) == 0 and suffix == ".txt":
        delimiter = " "
    last = first.count(delimiter)
    shape = {"sep": delimiter, "dtype": str, "keep_default_na": False, "skipinitialspace": True}
    shape |= {"encoding": encoding, "encoding_errors": "replace", **options}
    try:
        return pd.read_csv(file, **shape)
    except pd.errors.ParserError:
        if last != 1:
            return None

        def joined(fields: list[str]) -> list[str]:
            return [fields[0], delimiter.join(fields[1:])]

        return pd.read_csv(file, engine="python", on_bad_lines=joined, **shape)


def _is_text(file: str) -> bool:
    return file.lower().endswith((".csv", ".tsv", ".txt"))


def _encoding(file: str) -> str:
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


def _image_column(
    frame: pd.DataFrame, table: FolderPath, finder: _Finder, config: Config, notes: list[str]
) -> Any:
    """The column that names most different images; None if none names half of its rows' images.

    File names go before numbers, which may count the rows, and images before their masks.
    """
    if config.image_column:
        return config.image_column if config.image_column in frame else None
    sample = frame.iloc[:: max(1, len(frame) // SAMPLE)]
    ranks = {}
    for column in sample:
        values = set(sample[column])
        count = len({finder.find(value, table) for value in values} - {None})
        if count and count >= len(values) / 2:
            name = str(column).lower()
            has_suffix = sum(_stem(value) != value for value in values) > len(values) / 2
            is_called_image = any(word in name for word in IMAGE_NAMES)
            ranks[column] = (has_suffix, "mask" not in name, is_called_image, count)
    if not ranks:
        return None
    best = max(ranks, key=lambda column: ranks[column])
    # A column without suffixes is no rival of one with them.
    others = [c for c, rank in ranks.items() if c != best and rank[0] == ranks[best][0]]
    if others:
        notes.append(
            f"images: column {best} of {'/'.join(table)}; --image_column takes another one "
            f"({', '.join(map(str, others))})"
        )
    return best


def parts_of(frame: pd.DataFrame, where: str, notes: list[str]) -> pd.Series | None:
    """The column of a table of texts that says of which part an image is; None if there is none."""
    for column in frame:
        values, name = set(frame[column].unique()), str(column).lower()
        roles = {role_of(value) for value in values}
        is_known = None not in roles and len(values) > 1
        if len(values) <= 10 and (is_known or "train" in roles and len(roles - {None}) > 1):
            return frame[column].replace("", "without a name")
        if name.startswith(("is_train", "istrain")) and values <= FLAGS | {"True", "False"}:
            is_train = frame[column].isin(["1", "1.0", "True"])
            return is_train.map({True: "train", False: "test"})
        if name in SPLIT_NAMES:
            found = some(sorted(values))
            notes.append(f"column {column} of {where} names no parts and is not used: {found}")
    return None


def _part_of(path: str | None, table: FolderPath, files: Files) -> str:
    """The part that the path of an image names, else its table's name."""
    folders = os.path.relpath(path, files.root).split(os.sep)[:-1] if path else []
    for name in (*folders, *table[:-1], _stem(table[-1])):
        if role_of(name):
            return name
    return "train"


def choose_labels(
    frame: pd.DataFrame, where: str, config: Config, notes: list[str]
) -> pd.Series | None:
    """The labels in a table of texts; None if no column looks like labels.

    Raises:
        InputError: several columns do.
    """
    given = config.label_column
    if given:
        return frame.get(given)
    named = [column for column in frame if column.lower() in LABEL_NAMES]
    chosen = named if named else _like_labels(frame)
    if len(chosen) > 1:
        one_hot = _one_hot(frame)
        if one_hot is not None:
            notes.append(f"labels: the columns of {where} that hold one 1 per row")
            return one_hot
        chosen = _clearest(frame, chosen)
    if len(chosen) > 1:
        raise InputError(
            f"label_column: {len(chosen)} columns of {where} may hold the labels; add --label_column "
            f"and one of {', '.join(chosen)}"
        )
    if not chosen:
        return None
    notes.append(f"labels: column {chosen[0]} of {where}")
    return frame[chosen[0]]


def _like_labels(frame: pd.DataFrame) -> list[str]:
    """Columns whose values repeat, and are not measured numbers."""
    found = []
    for column in frame:
        values = frame[column].unique()
        is_measured = all("." in v and v.replace(".", "").lstrip("-").isdigit() for v in values)
        is_part = str(column).lower() in SPLIT_NAMES
        if (
            not is_part
            and 2 <= len(values) <= len(frame) / 2
            and (set(values) <= FLAGS or not is_measured)
        ):
            found.append(column)
    return found


def _one_hot(frame: pd.DataFrame) -> pd.Series | None:
    """The name of the column that holds the 1 of each row, as in one column per class."""
    flags = frame[[column for column in frame if set(frame[column].unique()) <= FLAGS]]
    ones = flags.isin(["1", "1.0"])
    return ones.idxmax(axis=1) if len(ones.columns) > 1 and (ones.sum(axis=1) == 1).all() else None


def _clearest(frame: pd.DataFrame, columns: list[str]) -> list[str]:
    """Of columns that name the same classes, the one with words; else all columns."""
    pairs = frame[columns].drop_duplicates()
    if any(pairs[column].duplicated().any() for column in columns):
        return columns
    words = [c for c in columns if not pairs[c].str.lstrip("-").str.isdigit().all()]
    return (words or columns)[:1]


def sorted_names(names: set[str]) -> list[str]:
    """Class names in order: whole numbers by value, others as text."""
    is_numbers = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=int) if is_numbers else sorted(names)


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in image_suffixes() or suffix.lower() in TABLES else name


class _Finder:
    """Find the image that a table means: by path, with or without suffix and leading folders."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.by_stem: dict[str, list[FolderPath]] = {}
        for folder, names in files.images.items():
            for name in names:
                self.by_stem.setdefault(plain(_stem(name)), []).append((*folder, name))

    def find(self, value: str, table: FolderPath, strict: bool = False) -> str | None:
        """The path of the image that a table names; None if no image fits, or several.

        Raises:
            InputError: several images fit, with `strict`.
        """
        parts = tuple(part for part in value.replace("\\", "/").split("/") if part not in ("", "."))
        if not parts:
            return None
        near = self.by_stem.get(plain(_stem(parts[-1])), ())
        found = [path for path in near if _agree(path, parts)]
        if not found:
            named = tuple(map(plain, parts))
            found = [path for path in near if _agree(tuple(map(plain, path)), named)]
        if len(found) > 1:
            beside = (*table[:-1], *parts[:-1])
            own = [path for path in found if path[:-1] == beside]
            role = role_of(_stem(table[-1]))
            same = [path for path in found if role and role in map(role_of, path[:-1])]
            found = own or same or found
        if len(found) > 1 and strict:
            raise InputError(
                f"dataset={self.files.root}: {'/'.join(table)} names {value!r}, which may be "
                f"{some(['/'.join(path) for path in found], 2)}; write the folder before the name"
            )
        if len(found) == 1:
            return self.files.path(found[0][:-1], found[0][-1])
        # Outside of the folder, such as ../images/1.png.
        path = os.path.join(self.files.root, *table[:-1], value)
        is_image = not found and os.path.splitext(value)[1].lower() in image_suffixes()
        return os.path.normpath(path) if is_image and os.path.isfile(path) else None


def _agree(path: FolderPath, named: FolderPath) -> bool:
    """Whether one path is the end of the other; the name may lack its suffix."""
    n = min(len(path), len(named))
    return path[-n:-1] == named[-n:-1] and named[-1] in (path[-1], _stem(path[-1]))
