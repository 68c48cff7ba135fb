"""Images in a data set of the Hugging Face Hub, or in a folder of the same format."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from attribution.config import Config, nearest
from attribution.data.columns import LABEL_NAMES, MOST_PARTS, choose_labels, parts_of
from attribution.data.folders import Files
from attribution.data.sources import PART, Source, as_file, some
from attribution.errors import InputError, reason
from attribution.runtime.progress import progress

ARCHIVES = (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst")
IMAGES_INSIDE = (".parquet", ".arrow", ".tar")  # files that may hold images themselves
TABLE_SUFFIXES = (*IMAGES_INSIDE, ".csv", ".json", ".jsonl")


def hub_data(config: Config, name: str) -> Source:
    """The data set with this id on the Hub.

    Raises:
        InputError: it cannot be loaded, or its columns are unclear.
    """
    advice = "; name a data set of the Hub that can be reached, or a folder"
    return _tabular(_load(config, lambda: datasets.load_dataset(name), advice), config)


def saved_folder(config: Config, root: Path) -> Source:
    """A folder that `datasets` saved; its parts may be saved one by one.

    Raises:
        InputError: it cannot be loaded, or its columns are unclear.
    """
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _tabular(_load(config, lambda: datasets.load_from_disk(str(root))), config)
    saved = sorted(file.parent for file in root.glob("**/state.json"))
    load = lambda: {part.name: datasets.load_from_disk(str(part)) for part in saved}  # noqa: E731
    return _tabular(_load(config, load), config)


def hub_folder(config: Config, files: Files) -> Source:
    """A folder of tables that hold images.

    Raises:
        InputError: there are none, they cannot be loaded, or their columns are unclear.
    """
    root = files.root
    # A text table whose rows name images was read before: see tables.py.
    kinds = TABLE_SUFFIXES if config.image_column else IMAGES_INSIDE
    depths = (root.glob("*"), root.glob("*/*"))
    has_tables = any(file.suffix in kinds for found in depths for file in found)
    if not has_tables or _boxes(files):
        raise InputError(f"dataset={config.dataset}: {_what_it_holds(files)}")
    prepared = str(Path(config.cache_dir) / "datasets")
    parts = _load(config, lambda: datasets.load_dataset(str(root), cache_dir=prepared))
    return _tabular(parts, config)


def save(folder: Path, table: pd.DataFrame, source: Source, names: Sequence[str]) -> None:
    """Save images as a DatasetDict of their splits, with the columns image, label and file_name.

    Args:
        table: split, label, filepath, example_id and row (in the source) of each image.
        names: class names; position is the label.
    """
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    features = datasets.Features({**kinds, "file_name": datasets.Value("string")})

    def rows_of(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        with progress("data: exporting images", len(part)) as advance:
            for start in range(0, len(part), PART):  # which bounds memory
                here = part[start : start + PART]
                cells = source.cells(here["row"].to_numpy())
                for cell, label, path in zip(cells, here["label"], here["filepath"]):
                    name = os.path.basename(path)
                    image = {"bytes": as_file(source, cell), "path": name or None}
                    yield {"image": image, "label": label, "file_name": name}
                advance(len(here))

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        parts = {}
        for split, part in table.groupby("split", sort=False):
            parts[split] = datasets.Dataset.from_generator(
                partial(rows_of, part), features, cache, fingerprint=f"{split}", split=split
            )
        datasets.DatasetDict(parts).save_to_disk(str(folder))


def _boxes(files: Files) -> list[str]:
    """Files that describe boxes of objects, as COCO calls them."""
    names = ["/".join(table) for table in files.tables]
    return [n for n in names if n.endswith(".json") and re.search("coco|instances_", n.lower())]


def _what_it_holds(files: Files) -> str:
    """Why a folder is not a labelled set of images, and what to do."""
    names = ["/".join(table) for table in files.tables]
    if boxes := _boxes(files):
        return (
            f"{boxes[0]} looks like boxes of objects (COCO); this project needs one label per image"
        )
    if archives := [kind for kind in files.others if kind in ARCHIVES]:
        return f"holds archives ({', '.join(archives)}) and no labelled images; unpack them first"
    images = files.counted(list(files.images)) or "no images"
    tables = f"{some(names)} (a table names images by file name or path)" if names else "none"
    return (
        "holds neither class subfolders with images, nor a table with their names and labels, nor a "
        f"data set in Hub format; found: {images}; tables: {tables}"
    )


def _load(config: Config, load: Callable[[], Any], advice: str = "") -> dict[str, Any]:
    """The parts of a data set by name."""
    try:
        loaded = load()
    except Exception as error:
        raise InputError(
            f"dataset={config.dataset}: cannot be loaded: {reason(error)}{advice}"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _tabular(parts: dict[str, Any], config: Config) -> Source:
    """Find the two columns and the class names of a data set."""
    features = parts["train" if "train" in parts else next(iter(parts))].features
    image = _column(features, "image_column", config.image_column, datasets.Image)
    label, notes = _label_column(parts, config)
    parts = {name: part for name, part in parts.items() if {image, label} <= set(part.features)}
    if not re.search("Image|string|binary", repr(features[image])):
        raise InputError(f"image_column={image}: holds neither images nor paths of images")
    kind = features[label]
    if isinstance(kind, datasets.ClassLabel):
        return _from_parts(parts, image, label, list(kind.names), notes)
    if not _is_plain(kind):
        raise InputError(f"label_column={label}: holds neither class labels, integers nor strings")
    values = {value for part in parts.values() for value in _values(part, label)}
    names = [str(value) for value in sorted(values - {None, -1})]
    return _from_parts(parts, image, label, names, notes)


def _column(features: Any, option: str, name: str, kind: type) -> str:
    """The column that the caller names, else the only column of this kind."""
    if name:
        if name not in features:
            raise InputError(f"{option}={name}: no such column; {nearest(name, list(features))}")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        few = f"{len(found)} columns are of type {kind.__name__}"
        raise InputError(f"{option}: {few}; name one of {', '.join(found or features)}")
    return found[0]


def _label_column(parts: dict[str, Any], config: Config) -> tuple[str, list[str]]:
    """The column of the labels, and lines about it.

    That is the only one with class labels, else the only plain one that looks like labels.
    """
    first = parts["train" if "train" in parts else next(iter(parts))]
    classes = [c for c, kind in first.features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [c for c in classes if c.lower() in LABEL_NAMES]
    if config.label_column or len(classes) == 1:
        given = config.label_column or classes[0]
        return _column(first.features, "label_column", given, datasets.ClassLabel), []
    if len(named) == 1:
        others = ", ".join(c for c in classes if c not in named)
        return named[0], [f"labels: column {named[0]}; --label_column takes another one ({others})"]
    if not classes:
        plain = [c for c, kind in first.features.items() if _is_plain(kind)]
        frame = pd.DataFrame({c: list(map(str, _values(first, c))) for c in plain})
        notes: list[str] = []
        labels = choose_labels(frame, "the data set", config, notes)
        if labels is not None and labels.name:
            return str(labels.name), notes
    return _column(first.features, "label_column", "", datasets.ClassLabel), []


def _is_plain(kind: Any) -> bool:
    return bool(re.match("u?int|(large_)?string|bool", _dtype(kind)))


def _dtype(kind: Any) -> str:
    return getattr(kind, "dtype", "")


def _values(part: Any, column: str) -> list[Any]:
    return part.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def _from_parts(
    parts: dict[str, Any], image: str, label: str, names: list[str], notes: list[str]
) -> Source:
    """Join all parts; labels are matched by class name, images stay undecoded."""
    ids = {name: position for position, name in enumerate(names)}
    labels, images = [], []
    for part in parts.values():
        own = getattr(part.features[label], "names", None)
        for value in _values(part, label):
            if value is None or value == -1:
                labels.append(-1)
                continue
            named = own[value] if own else str(value)
            if named not in ids:
                raise InputError(
                    f"label_column={label}: a part has class {named!r}, which the training part lacks"
                )
            labels.append(ids[named])
        images.append(part.select_columns([image]).cast_column(image, datasets.Image(decode=False)))
    named = _named_parts(next(iter(parts.values())), label, notes) if len(parts) == 1 else None
    if named is None:
        named = np.repeat(np.array(list(parts), object), [len(part) for part in images])
    merged = datasets.concatenate_datasets(images).with_format("arrow")
    empty = {"bytes": b"", "path": None}  # stands for a null; it is then reported as undecodable
    return Source(
        names,
        np.array(labels, np.int64),
        named,
        lambda rows: [cell or empty for cell in merged[rows][image].to_pylist()],
        column=lambda name: _group_values(parts, name),
        notes=tuple(notes),
    )


def _named_parts(part: Any, label: str, notes: list[str]) -> np.ndarray | None:
    """The part of each image of a data set in one piece, by a column that says it."""
    texts = [
        column
        for column, kind in part.features.items()
        if column != label
        and re.match("(large_)?string|bool", _dtype(kind))
        and len(part.unique(column)) <= MOST_PARTS
    ]
    frame = pd.DataFrame({column: _values(part, column) for column in texts})
    found = parts_of(frame.astype("string").fillna(""), "the data set", notes)
    return None if found is None else found.to_numpy(object)


def _group_values(parts: dict[str, Any], name: str) -> list[Any] | None:
    """A column of all parts, one below the other; None if a part lacks it."""
    if not all(name in part.features for part in parts.values()):
        return None
    kinds = datasets.Value, datasets.ClassLabel
    if not all(isinstance(part.features[name], kinds) for part in parts.values()):
        raise InputError(f"column {name} holds lists or images; a group is a number or a text")
    return [value for part in parts.values() for value in _values(part, name)]
