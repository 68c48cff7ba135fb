"""Where images come from: embedded digits, a folder, or a Hub id, as undecoded bytes with labels."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attribution.config import Config, nearest
from attribution.errors import InputError, reason
from attribution.runtime.safe_files import regular

VALIDATION_NAMES = ("validation", "valid", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
# Of Pillow's formats those; others would start programs (EPS: Ghostscript), whatever the file is called.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar")
MOST_BYTES = 1 << 30  # of an image's file
CHUNK = 256  # images read and decoded at a time, which bounds the memory


def open_image(file: io.BytesIO) -> Image.Image:
    """An image that is not decoded yet, of one of the FORMATS."""
    return Image.open(file, formats=FORMATS)


@dataclass(frozen=True)
class Source:
    """Undecoded images: labels (n,) as int64, -1 where unknown, and the part that each is in."""

    class_names: list[str]
    labels: np.ndarray
    parts: np.ndarray
    cells: Callable[[np.ndarray], list[dict[str, Any]]]  # row numbers to {"bytes", "path"}
    open: Callable[[io.BytesIO], Image.Image] = open_image
    root: Path | None = None  # file names are told relative to it
    column: Callable[[str], list[Any] | None] = lambda name: None  # other values of every row

    def name(self, cell: dict[str, Any]) -> str:
        path = cell["path"] or ""
        return os.path.relpath(path, self.root) if path and self.root else os.path.basename(path)


def find_source(config: Config, cache: Path) -> Source:
    text = config.dataset
    if text == "digits":
        return _digits()
    root = Path(os.path.abspath(os.path.expanduser(text)))
    if root.is_dir():
        return _folder(root, config, cache)
    if root.exists():
        raise InputError(f"dataset={text}: is a file; name the folder that holds the images")
    looks_like_path = text.startswith((".", "/", "~")) or "/" in text and root.parent.is_dir()
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise InputError(f"dataset={text}: missing folder; name one that exists, or a Hub id")
    return _tabular(_load(config, text), config)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Source(
        [str(name) for name in digits.target_names],
        digits.target.astype(np.int64),
        np.full(len(images), "train", object),
        lambda rows: [{"bytes": image.tobytes(), "path": None} for image in images[rows]],
        lambda file: Image.frombytes("L", images.shape[1:], file.read()),
    )


def _folder(root: Path, config: Config, cache: Path) -> Source:
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _tabular(_load(config, str(root), saved=True), config)
    folders = {"train": _class_folders(root, config)}
    parts = {
        part: _class_folders(root / part, config) for part in ("train", "test", *VALIDATION_NAMES)
    }
    # A class may be called "train": it is a part only if it holds folders of images itself.
    if any(parts["train"].values()):
        folders = {part: classes for part, classes in parts.items() if any(classes.values())}
    if any(folders["train"].values()):
        return _class_folder_source(root, folders, config, cache)
    depths = (root.glob("*"), root.glob("*/*"))
    if any(file.suffix in TABLE_SUFFIXES for files in depths for file in files):
        return _tabular(_load(config, str(root), cache_dir=str(cache / "datasets")), config)
    raise InputError(
        f"dataset={config.dataset}: holds neither class subfolders with images "
        f"({' '.join(SUFFIXES)}) nor a data set in Hub format"
    )


def _class_folders(folder: Path, config: Config) -> dict[Path, set[str]]:
    """The image suffixes in each visible subfolder; an empty set where it holds no image."""
    found: dict[Path, set[str]] = {}
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        if child.is_dir() and not child.name.startswith("."):
            shown = (entry for entry in os.scandir(child) if not entry.name.startswith("."))
            images = [entry for entry in shown if entry.name.lower().endswith(SUFFIXES)]
            for entry in images:
                _check_name(entry, config)
            found[child] = {os.path.splitext(entry.name)[1] for entry in images if entry.is_file()}
    return found


def _check_name(file: os.DirEntry, config: Config) -> None:
    """Refuse what `datasets` would leave out without a word, or take for an address."""
    if file.is_symlink() and not os.path.exists(file):
        what = "is a link that leads nowhere; repair or remove it"
    elif "::" in file.path:
        what = "has '::' in its path, which stands for an address; rename it"
    elif file.path.encode(errors="replace") != os.fsencode(file.path):
        what = "has a name that is not UTF-8; rename it"
    else:
        return
    raise InputError(f"dataset={config.dataset}: {file.path} {what}")


def _class_folder_source(
    root: Path, folders: dict[str, dict[Path, set[str]]], config: Config, cache: Path
) -> Source:
    patterns = {
        part: [f"{glob.escape(str(f))}/*{suffix}" for f in classes for suffix in sorted(classes[f])]
        for part, classes in folders.items()
    }
    options: dict[str, Any] = {"data_files": patterns, "drop_labels": False, "drop_metadata": True}
    parts = _load(config, "imagefolder", cache_dir=str(cache / "datasets"), **options)
    # datasets leaves out a class folder without images; here it has to be told.
    names = sorted({folder.name for classes in folders.values() for folder in classes})
    return _from_parts(parts, "image", "label", names, root)


def _load(config: Config, name: str, saved: bool = False, **options: Any) -> dict[str, Any]:
    """Parts by name, from `datasets`; its progress bars are shown for downloads only."""
    import datasets

    local = saved or bool(options)
    shown = not datasets.utils.are_progress_bars_disabled()
    if local and shown:
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, **options)
    except Exception as error:
        advice = "" if local else "; name a data set of the Hub that can be reached, or a folder"
        raise InputError(
            f"dataset={config.dataset}: cannot be loaded: {reason(error)}{advice}"
        ) from error
    finally:
        if local and shown:
            datasets.enable_progress_bars()
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _tabular(parts: dict[str, Any], config: Config) -> Source:
    """A data set in Hub format: find its two columns and its class names."""
    import datasets

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


def _from_parts(
    parts: dict[str, Any], image: str, label: str, names: list[str], root: Path | None = None
) -> Source:
    """One source of all parts; labels are matched by class name, images stay undecoded."""
    import datasets

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

    def column(name: str) -> list[Any] | None:
        if not all(name in part.features for part in parts.values()):
            return None
        kinds = datasets.Value, datasets.ClassLabel
        if not all(isinstance(part.features[name], kinds) for part in parts.values()):
            raise InputError(f"groups={name}: holds lists or images; a group is a number or a text")
        return [value for part in parts.values() for value in _values(part, name)]

    return Source(
        names,
        np.array(labels, np.int64),
        np.repeat(np.array(list(parts), object), [len(part) for part in images]),
        lambda rows: merged[rows][image].to_pylist(),
        root=root,
        column=column,
    )


def chunks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def content(cell: dict[str, Any]) -> bytes:
    """The file's bytes; empty where it cannot be read, which then counts as undecodable."""
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        file = regular(Path(cell["path"]))
        return file.read_bytes() if file.stat().st_size <= MOST_BYTES else b""
    except (OSError, TypeError, ValueError):
        return b""


def content_digest(cell: dict[str, Any]) -> str:
    return digest(content(cell))


def digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
