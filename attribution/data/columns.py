"""What the columns of a table of texts hold: the images' names, their labels, their parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from attribution.config import Config
from attribution.data.image_finder import stem
from attribution.data.parts import role_of
from attribution.data.sources import some
from attribution.errors import InputError

LABEL_NAMES = (
    "label", "labels", "class", "target", "category", "fine_label", "class_name", "label_name",
)  # fmt: skip
IMAGE_NAMES = ("image", "img", "file", "filename", "path", "filepath")
SPLIT_NAMES = ("split", "subset", "partition")
IS_TRAIN = re.compile(r"is_?train(ing)?(_?(set|split|img|image))?")
MOST_PARTS = 10
FLAGS = {"0", "1", "0.0", "1.0"}
SAMPLE = 200  # rows that are looked at to find the column of the images


def choose_images(
    frame: pd.DataFrame, where: str, find: Callable[[str], str | None], notes: list[str]
) -> Any:
    """The column that names the images; None if none names half of its rows' images.

    File names go before numbers, which may count the rows, images before their masks, and then the
    column that names most different images.

    Args:
        frame: a table of texts.
        where: what messages call it.
        find: returns the path of the image that a text means, or None.
        notes: gets lines about the choice.
    """
    sample = frame.iloc[:: max(1, len(frame) // SAMPLE)]
    ranks = {}
    for column in sample:
        values = set(sample[column])
        count = len({find(value) for value in values} - {None})
        if count and count >= len(values) / 2:
            name = str(column).lower()
            has_suffix = sum(stem(value) != value for value in values) > len(values) / 2
            is_called_image = any(word in name for word in IMAGE_NAMES)
            ranks[column] = (has_suffix, "mask" not in name, is_called_image, count)
    if not ranks:
        return None
    best = max(ranks, key=lambda column: ranks[column])
    # A column without suffixes is no rival of one with them.
    others = [c for c, rank in ranks.items() if c != best and rank[0] == ranks[best][0]]
    if others:
        notes.append(
            f"images: column {best} of {where}; --image_column takes another one "
            f"({', '.join(map(str, others))})"
        )
    return best


def parts_of(frame: pd.DataFrame, where: str, notes: list[str]) -> pd.Series | None:
    """The column of a table of texts that says of which part an image is; None if there is none.

    Args:
        frame: without the column that is named as the labels.
        where: what messages call it.
        notes: gets a line about a column that is called like parts and names none.
    """
    for column in frame:
        values, name = set(frame[column].unique()), str(column).lower()
        if len(values) > MOST_PARTS or name in LABEL_NAMES:
            continue
        roles = {role_of(value) for value in values}
        is_known = None not in roles and (len(values) > 1 or name in SPLIT_NAMES)
        if is_known or "train" in roles and len(roles - {None}) > 1:
            return frame[column].replace("", "without a name")
        if IS_TRAIN.fullmatch(name) and values <= FLAGS | {"True", "False", "true", "false"}:
            is_train = frame[column].isin(["1", "1.0", "True", "true"])
            return is_train.map({True: "train", False: "test"})
        if name in SPLIT_NAMES:
            found = some(sorted(values))
            notes.append(f"column {column} of {where} names no parts and is not used: {found}")
    return None


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
