"""Images in a data set of the Hugging Face Hub, or in a folder of the same format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from attribution.config import Config, nearest
from attribution.data.sources import SUFFIXES, Source
from attribution.errors import InputError, reason

TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar")


def hub_data(config: Config, name: str) -> Source:
    """The data set with this id on the Hub.

    Raises:
        InputError: it cannot be loaded, or its columns are unclear.
    """
    advice = "; name a data set of the Hub that can be reached, or a folder"
    return _tabular(_load(config, lambda: datasets.load_dataset(name), advice), config)


def hub_folder(config: Config, root: Path, cache: Path) -> Source:
    """A folder that `datasets` saved, or that holds tables.

    Raises:
        InputError: it holds neither, cannot be loaded, or its columns are unclear.
    """
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _tabular(_load(config, lambda: datasets.load_from_disk(str(root))), config)
    depths = (root.glob("*"), root.glob("*/*"))
    if not any(file.suffix in TABLE_SUFFIXES for files in depths for file in files):
        raise InputError(
            f"dataset={config.dataset}: holds neither class subfolders with images "
            f"({' '.join(SUFFIXES)}) nor a data set in Hub format"
        )
    prepared = str(cache / "datasets")
    parts = _load(config, lambda: datasets.load_dataset(str(root), cache_dir=prepared))
    return _tabular(parts, config)


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
    label = _column(features, "label_column", config.label_column, datasets.ClassLabel)
    parts = {name: part for name, part in parts.items() if {image, label} <= set(part.features)}
    if not re.search("Image|string|binary", repr(features[image])):
        raise InputError(f"image_column={image}: holds neither images nor paths of images")
    kind = features[label]
    if isinstance(kind, datasets.ClassLabel):
        return _from_parts(parts, image, label, list(kind.names))
    if not re.match("u?int|(large_)?string|bool", getattr(kind, "dtype", "")):
        raise InputError(f"label_column={label}: holds neither class labels, integers nor strings")
    values = {value for part in parts.values() for value in _values(part, label)}
    names = [str(value) for value in sorted(values - {None, -1})]
    return _from_parts(parts, image, label, names)


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


def _values(part: Any, column: str) -> list[Any]:
    return part.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def _from_parts(parts: dict[str, Any], image: str, label: str, names: list[str]) -> Source:
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
    merged = datasets.concatenate_datasets(images).with_format("arrow")
    empty = {"bytes": b"", "path": None}  # stands for a null; it is then reported as undecodable
    return Source(
        names,
        np.array(labels, np.int64),
        np.repeat(np.array(list(parts), object), [len(part) for part in images]),
        lambda rows: [cell or empty for cell in merged[rows][image].to_pylist()],
        column=lambda name: _group_values(parts, name),
    )


def _group_values(parts: dict[str, Any], name: str) -> list[Any] | None:
    """A column of all parts, one below the other; None if a part lacks it."""
    if not all(name in part.features for part in parts.values()):
        return None
    kinds = datasets.Value, datasets.ClassLabel
    if not all(isinstance(part.features[name], kinds) for part in parts.values()):
        raise InputError(f"column {name} holds lists or images; a group is a number or a text")
    return [value for part in parts.values() for value in _values(part, name)]
