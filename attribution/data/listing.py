"""Find a data set and list its images, before any image is decoded."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd

from attribution.config import FIELDS, Config, nearest
from attribution.data import sources
from attribution.data.folders import class_folders, find_files
from attribution.data.parts import by_role, role_of
from attribution.data.sources import Cells, Source, some
from attribution.data.splits import SPLITS, carve, units
from attribution.data.tables import read_tables, with_table
from attribution.errors import InputError
from attribution.runtime.cache_folder import cache_folder
from attribution.runtime.progress import say

# Data sets of the Hub whose authors' test images are called validation there.
TEST_CALLED_VALIDATION = ("ethz/food101", "food101")


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a data set.

    Attributes:
        names: class names; position is the label.
        table: one row per image: digest, label, file_name, role, row (in the source), name (for
            messages), unit (see splits.units), in an order that depends on content alone.
        dropped: copies left out because the same image lies in an official part.
    """

    source: Source
    names: list[str]
    table: pd.DataFrame
    dropped: int

    def n_train(self, config: Config) -> int:
        """Number of training examples, including any that cannot be decoded."""
        return int((carve(self.table, config) == "train").sum())


def list_data(config: Config) -> Listing:
    """Find and hash the images. The first rows are a sample of all: the order is that of the hashes.

    Raises:
        InputError: the data set cannot be found, read or split, or cache_dir cannot be written.
    """
    cache_folder(config, "pixels")
    source = find_source(config)
    for note in (*source.notes, *_unused_parts(source, config)):
        say(f"data: {note}")
    _check_labelled(source, config)
    chosen = _choose_classes(source, config)
    names = [source.class_names[label] for label in chosen]
    table = _list_images(source, chosen, config)
    listed = len(table)
    table = _drop_copies(table)
    column = source.column(config.split_by) if config.split_by else None
    values = None if column is None else np.array(column, object)[table["row"]]
    table["unit"] = units(table, values, config)
    if config.split_by:
        say(f"data: {table['unit'].nunique()} units by split_by={config.split_by}")
    dropped = listed - len(table)
    if config.small_classes == "leave_out" and not config.wanted_classes:
        table, names = _leave_out_small(table, names, config)
    check_classes(table, names, config)
    return Listing(source, names, table, dropped)


def folder_of(dataset: str) -> Path | None:
    """The folder that a data set's name stands for; None for the embedded digits and the Hub's."""
    folder = Path(os.path.abspath(os.path.expanduser(dataset)))
    return folder if dataset != "digits" and folder.is_dir() else None


def find_source(config: Config) -> Source:
    """The images that `dataset` names: the embedded digits, a folder, or a data set of the Hub."""
    text = config.dataset
    if text == "digits":
        return sources.digits()
    if folder := folder_of(text):
        return _in_folder(folder, config)
    root = Path(os.path.abspath(os.path.expanduser(text)))
    if root.exists():
        raise InputError(f"dataset={text}: is a file; name the folder that holds the images")
    looks_like_path = text.startswith((".", "/", "~")) or "/" in text and root.parent.is_dir()
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise InputError(f"dataset={text}: missing folder; name one that exists, or a Hub id")
    return hub_format().hub_data(config, text)


def _in_folder(root: Path, config: Config) -> Source:
    """The images in a folder, by the one reader whose kind of data set it holds.

    Raises:
        InputError: none of them fits, or several do.
    """
    files = find_files(root, config)
    names = {table[-1] for table in files.tables}
    if ("dataset_dict.json",) in files.tables or "state.json" in names:
        return hub_format().saved_folder(config, root)
    folders = class_folders(files, config)
    if folders is None or not config.class_depth:
        has_classes = folders is not None and len(folders.class_names) > 1
        table = read_tables(files, config, has_classes)
        if table is not None and (found := with_table(files, table, folders, config)):
            return found
    if folders is None:
        return hub_format().hub_folder(config, files)
    return replace(folders, notes=(*folders.notes, *files.notes()))


def hub_format() -> ModuleType:
    """The reader of data sets in Hub format: to import it takes seconds, and image files do not need it."""
    from attribution.data import hub_format

    return hub_format


def _check_labelled(source: Source, config: Config) -> None:
    """Refuse images without a label in a part that is used."""
    used = np.isin(source.parts, list(_roles(source, config)))
    n, unlabelled = int(used.sum()), int((used & (source.labels < 0)).sum())
    if unlabelled:
        raise InputError(
            f"dataset={config.dataset}: {unlabelled} of {n} images have no label (an empty label, nan, null "
            "and -1 mean unlabelled); remove their rows, or give the class that is called -1 another name"
        )


def _choose_classes(source: Source, config: Config) -> list[int]:
    """Labels of the classes to keep, in the source's order."""
    for name in config.wanted_classes:
        if name not in source.class_names:
            raise InputError(f"classes={name}: no such class; {nearest(name, source.class_names)}")
    wanted = config.wanted_classes or source.class_names
    chosen = [label for label, name in enumerate(source.class_names) if name in wanted]
    if len(chosen) < 2:
        what = f"classes={config.classes}" if config.classes else f"dataset={config.dataset}"
        raise InputError(f"{what}: {len(chosen)} class; at least 2 are needed")
    return chosen


def _roles(source: Source, config: Config) -> dict[str, str]:
    """The role of each part that is used: 'test', 'validation', or 'pool' (to be divided)."""
    present = list(dict.fromkeys(source.parts))
    labelled = set(source.parts[source.labels >= 0])
    official = by_role([part for part in present if part in labelled or role_of(part) == "train"])
    pool = official.pop("train", present[0])
    if role_of(pool) != "train" and len(present) > 1:
        raise InputError(f"dataset={config.dataset}: no part 'train' among {', '.join(present)}")
    if config.dataset in TEST_CALLED_VALIDATION and "test" not in official:
        official["test"] = official.pop("validation")
    if config.resplit == "yes":
        return {
            **{part: "pool" for part in present if part in labelled and role_of(part)},
            pool: "pool",
        }
    return {**{part: role for role, part in official.items() if part != pool}, pool: "pool"}


def _unused_parts(source: Source, config: Config) -> list[str]:
    """Lines about the parts that play no role."""
    used, notes = _roles(source, config), []
    for part, count in Counter(source.parts).items():
        if part not in used:
            has_labels = (source.labels[source.parts == part] >= 0).any()
            why = "" if has_labels else "it holds no labels and "
            notes.append(f"part {part} ({count:,} images): {why}is not used")
    return notes


def _list_images(source: Source, chosen: list[int], config: Config) -> pd.DataFrame:
    """The table of a Listing, copies included."""
    roles = _roles(source, config)
    role = np.array([roles.get(part, "") for part in source.parts], object)
    rows = np.flatnonzero(np.isin(source.labels, chosen) & (role != ""))
    first = {part: (source.parts == part).argmax() for part in roles}

    def listed(_: int, cells: Cells) -> list[tuple[str, str]]:
        return [(source.name(cell), sources.digest(sources.content(cell))) for cell in cells]

    found = list(sources.map_cells(source, rows, listed, "data: listing images"))
    names, digests = np.array(found, object).reshape(-1, 2).T
    labels = np.searchsorted(chosen, source.labels[rows])
    # By digest, copies by label and name. Bytes are sorted in a third of the time of texts.
    order = np.lexsort((rows, names, labels, digests.astype("S")))
    rows, names = rows[order], names[order]
    shown = [n or f"row {r - first[p]} ({p})" for n, r, p in zip(names, rows, source.parts[rows])]
    return pd.DataFrame(
        {
            "digest": digests[order],
            "label": labels[order],
            "file_name": names,
            "role": role[rows],
            "row": rows,
            "name": shown,
        }
    )


def _drop_copies(table: pd.DataFrame) -> pd.DataFrame:
    """Keep copies of an image in one role only (test before validation before pool)."""
    digest, role = table["digest"], table["role"]
    in_test = digest.isin(digest[role == "test"]) & (role != "test")
    in_validation = digest.isin(digest[role == "validation"]) & (role == "pool")
    return table[~(in_test | in_validation)].reset_index(drop=True)


def _own_images(table: pd.DataFrame, config: Config) -> pd.Series:
    """Number of units that are left to divide for each label."""
    pool = table[table["role"] == "pool"]
    if config.split_by:
        return pool.groupby("label")["unit"].nunique()
    # An image in two classes counts for the first: its rows follow one another.
    is_first = pool["digest"] != pool["digest"].shift()
    return pool["label"][is_first].value_counts()


def _leave_out_small(
    table: pd.DataFrame, names: list[str], config: Config
) -> tuple[pd.DataFrame, list[str]]:
    """Leave out the classes with too few images to divide, and say so."""
    needed = len(SPLITS) + 1 - table["role"].nunique()
    own = _own_images(table, config).reindex(range(len(names)), fill_value=0)
    kept = [label for label, count in own.items() if count >= needed]
    if len(kept) == len(names) or len(kept) < 2:
        return table, names
    small = [f"{names[label]} ({count})" for label, count in own.items() if count < needed]
    say(
        f"data: classes with fewer than {needed} different images to train on are left out: "
        f"{some(small, 20)}; --small_classes stop refuses them"
    )
    table = table[table["label"].isin(kept)].reset_index(drop=True)
    table["label"] = table["label"].map({label: i for i, label in enumerate(kept)})
    return table, [names[label] for label in kept]


def check_classes(table: pd.DataFrame, names: list[str], config: Config) -> None:
    """Refuse a class that would be missing from a split.

    Raises:
        InputError: a class has no images, none in an official part, or too few to divide.
    """
    shown = f"dataset={config.dataset}"
    official = sorted(set(table["role"].unique()) - {"pool"})
    needed = len(SPLITS) - len(official)  # splits made from the pool
    roles = table.drop_duplicates(["label", "role"]).groupby("label")["role"].agg(set)
    own = _own_images(table, config)
    kind = (
        f"units by split_by={config.split_by}" if config.split_by else "different images of its own"
    )
    for label, name in enumerate(names):
        if label not in roles:
            raise InputError(f"{shown}: empty class {name!r}: it holds no images")
        if own.get(label, 0) < needed:
            remedy = "; add --resplit to divide all images anew" if official else ""
            raise InputError(
                f"{shown}: class {name!r} has {own.get(label, 0)} {kind} to train on; at least "
                f"{needed} are needed, one for each split made from them{remedy}"
            )
    for split in official:
        lacking = [name for label, name in enumerate(names) if split not in roles[label]]
        if lacking:
            listed, plural = ", ".join(map(repr, lacking)), "es" if lacking[1:] else ""
            raise InputError(
                f"{shown}: the {split} part lacks the class{plural} {listed}; add --resplit to divide all "
                "images anew, add images, or leave classes out with classes"
            )
        parameter = {"validation": "val_fraction", "test": "test_fraction"}[split]
        value = getattr(config, parameter)
        if value != FIELDS[parameter].default:
            raise InputError(
                f"{parameter}={value}: the {split} split is a part of the data set; add --resplit to "
                f"divide all images anew, or leave {parameter} out"
            )
