"""Data: a folder, a Hub id or the embedded digits as decoded pixels, labels and disjoint splits."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from attribution.config import Config, nearest
from attribution.errors import InputError

SPLITS = ("train", "validation", "test")
VALIDATION_NAMES = ("validation", "valid", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar")
CARVED_SHARE = 0.2
CHUNK = 256  # images read and decoded at a time, which bounds the memory
RECIPE = "1"  # raise when the same file would be decoded to other pixels


@dataclass(frozen=True, eq=False)
class ImageData:
    """Decoded images with labels and splits; row i of `examples` describes row i of `pixels()`.

    Attributes:
        pixels_file: .npy of uint8 (n, size, size, 3).
        class_names: position is the label.
        examples: example_id, file_name, split, label, label_name, true_label, is_flipped.
        fingerprint: hash of content, labels after planting, splits, class names and image size.
        skipped: names of the files left out because they cannot be decoded.
        dropped_duplicates: copies left out because the same image lies in an official part.
    """

    pixels_file: Path
    class_names: tuple[str, ...]
    examples: pd.DataFrame
    fingerprint: str
    skipped: tuple[str, ...]
    dropped_duplicates: int

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, ascending, int64 (n_split,)."""
        return np.flatnonzero((self.examples["split"] == split).to_numpy()).astype(np.int64)

    def labels(self, split: str) -> np.ndarray:
        """Labels of a split after planting, int64 (n_split,)."""
        return self.examples["label"].to_numpy(np.int64)[self.rows(split)]

    def table(self, split: str) -> pd.DataFrame:
        """The examples of a split, with their position in it."""
        table = self.examples.iloc[self.rows(split)].reset_index(drop=True)
        return table.assign(position=np.arange(len(table)))

    def pixels(self) -> np.ndarray:
        """Memory map of all images, uint8 (n, size, size, 3), opened once a process."""
        return _open_pixels(self.pixels_file)


@lru_cache(maxsize=8)
def _open_pixels(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def load_data(config: Config) -> ImageData:
    """Read, decode (once: see `cache_dir`), split and, where asked, plant label noise.

    Raises:
        InputError: the data set cannot be found, read, decoded or split as asked.
    """
    cache = Path(config.cache_dir).expanduser()
    with _writing(config):
        (cache / "pixels").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache / "pixels").close()
    source = _find_source(config, cache)
    chosen = _choose_classes(source, config)
    names = [source.class_names[label] for label in chosen]
    table = _list_examples(source, chosen, config)
    listed = len(table)
    table = _drop_copies(table)
    dropped = listed - len(table)
    _check_counts(table, names, config)
    file, bad = _cached_pixels(source, table, config, cache)
    is_bad = table["digest"].isin(bad)
    skipped = tuple(sorted(table["name"][is_bad]))
    table = table[~is_bad].reset_index(drop=True)
    _check_counts(table, names, config)  # again: files may have been skipped
    table["split"] = _carve(table, config.data_seed)
    _check_splits(table, names, config)
    examples = _plant_noise(table, names, config)
    fingerprint = _hash(
        [RECIPE, str(config.image_size), json.dumps(names), *table["digest"]]
        + [f"{label} {split}" for label, split in zip(examples["label"], examples["split"])]
    )
    return ImageData(file, tuple(names), examples, fingerprint, skipped, dropped)


def _hash(items: Iterable[str]) -> str:
    return blake2b("\n".join(items).encode(), digest_size=16).hexdigest()


@contextmanager
def _writing(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cache_dir={config.cache_dir}: cannot be written ({error.strerror or error}); "
            "name a writable folder"
        ) from error


@dataclass(frozen=True)
class _Source:
    """Undecoded images: labels (n,) as int64, -1 where unknown, and the part that each is in."""

    class_names: list[str]
    labels: np.ndarray
    parts: np.ndarray
    cells: Callable[[np.ndarray], list[dict[str, Any]]]  # row numbers to {"bytes", "path"}
    open: Callable[[io.BytesIO], Image.Image] = Image.open
    root: Path | None = None  # file names are told relative to it

    def name(self, cell: dict[str, Any]) -> str:
        path = cell["path"] or ""
        return os.path.relpath(path, self.root) if path and self.root else os.path.basename(path)


def _find_source(config: Config, cache: Path) -> _Source:
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


def _digits() -> _Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _Source(
        [str(name) for name in digits.target_names],
        digits.target.astype(np.int64),
        np.full(len(images), "train", object),
        lambda rows: [{"bytes": image.tobytes(), "path": None} for image in images[rows]],
        lambda file: Image.frombytes("L", images.shape[1:], file.read()),
    )


def _folder(root: Path, config: Config, cache: Path) -> _Source:
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _tabular(_load(config, str(root), saved=True), config)
    folders = {"train": _class_folders(root)}
    parts = {part: _class_folders(root / part) for part in ("train", "test", *VALIDATION_NAMES)}
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


def _class_folders(folder: Path) -> dict[Path, set[str]]:
    """The image suffixes in each visible subfolder; an empty set where it holds no image."""
    found: dict[Path, set[str]] = {}
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        if child.is_dir() and not child.name.startswith("."):
            files = (file.name for file in os.scandir(child) if file.is_file())
            shown = (name for name in files if not name.startswith("."))
            found[child] = {os.path.splitext(n)[1] for n in shown if n.lower().endswith(SUFFIXES)}
    return found


def _class_folder_source(
    root: Path, folders: dict[str, dict[Path, set[str]]], config: Config, cache: Path
) -> _Source:
    patterns = {
        part: [f"{glob.escape(str(f))}/*{suffix}" for f in classes for suffix in sorted(classes[f])]
        for part, classes in folders.items()
    }
    options = {"data_files": patterns, "drop_labels": False, "drop_metadata": True}
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        advice = "" if local else "; name a data set of the Hub that can be reached, or a folder"
        raise InputError(f"dataset={config.dataset}: cannot be loaded: {reason}{advice}") from error
    finally:
        if local and shown:
            datasets.enable_progress_bars()
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _tabular(parts: dict[str, Any], config: Config) -> _Source:
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
) -> _Source:
    """One source of all parts; labels are matched by class name, images stay undecoded."""
    import datasets

    ids = {name: position for position, name in enumerate(names)}
    labels, images = [], []
    for part in parts.values():
        own = getattr(part.features[label], "names", None)
        for value in _values(part, label):
            known = value is not None and value != -1
            labels.append(ids[own[value] if own else str(value)] if known else -1)
        images.append(part.select_columns([image]).cast_column(image, datasets.Image(decode=False)))
    merged = datasets.concatenate_datasets(images).with_format("arrow")
    return _Source(
        names,
        np.array(labels, np.int64),
        np.repeat(np.array(list(parts), object), [len(part) for part in images]),
        lambda rows: merged[rows][image].to_pylist(),
        root=root,
    )


def _choose_classes(source: _Source, config: Config) -> list[int]:
    """Ids of the classes to keep, in the source's order."""
    for name in config.class_names:
        if name not in source.class_names:
            raise InputError(f"classes={name}: no such class; {nearest(name, source.class_names)}")
    wanted = config.class_names or source.class_names
    chosen = [label for label, name in enumerate(source.class_names) if name in wanted]
    if len(chosen) < 2:
        raise InputError(f"dataset={config.dataset}: {len(chosen)} class; at least 2 are needed")
    return chosen


def _roles(source: _Source, config: Config) -> dict[str, str]:
    """The split that each used part stands for; 'pool' is what is not yet divided."""
    present = list(dict.fromkeys(source.parts))
    pool = "train" if "train" in present else present[0]
    if pool != "train" and len(present) > 1:
        raise InputError(f"dataset={config.dataset}: no part 'train' among {', '.join(present)}")
    labelled = set(source.parts[source.labels >= 0])
    test = ["test"] if "test" in labelled else []
    validation = [name for name in VALIDATION_NAMES if name in labelled][:1]
    # Without a labelled test part (ethz/food101 has none) the validation part takes its place.
    official = dict(zip(test + validation, ("test", "validation")))
    return {**official, pool: "pool"}


def _list_examples(source: _Source, chosen: list[int], config: Config) -> pd.DataFrame:
    """One row an image of the chosen classes, in an order that depends on content alone."""
    roles = _roles(source, config)
    role = np.array([roles.get(part, "") for part in source.parts], object)
    unlabelled = int(((source.labels < 0) & (role != "")).sum())
    if unlabelled:
        raise InputError(f"dataset={config.dataset}: {unlabelled} images have no label")
    new_label = dict(zip(chosen, range(len(chosen))))
    rows = np.flatnonzero(np.isin(source.labels, chosen) & (role != ""))
    parts = source.parts[rows]
    first = {part: (source.parts == part).argmax() for part in roles}
    names, digests = [], []
    with ThreadPoolExecutor() as pool:
        for cells in (source.cells(rows[chunk]) for chunk in _chunks(len(rows))):
            names += [source.name(cell) for cell in cells]
            digests += pool.map(_digest, cells)
    table = pd.DataFrame(
        {
            "digest": digests,
            "label": [new_label[label] for label in source.labels[rows]],
            "file_name": names,
            "role": role[rows],
            "row": rows,
            "name": [n or f"row {r - first[p]} ({p})" for n, r, p in zip(names, rows, parts)],
        }
    )
    return table.sort_values(["digest", "label", "file_name", "row"], ignore_index=True)


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _content(cell: dict[str, Any]) -> bytes:
    """The file's bytes; empty where it cannot be read, which then counts as undecodable."""
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except (OSError, TypeError):
        return b""


def _digest(cell: dict[str, Any]) -> str:
    return blake2b(_content(cell), digest_size=16).hexdigest()


def _drop_copies(table: pd.DataFrame) -> pd.DataFrame:
    """Keep an image in the most official part that holds it, so that no two splits share it."""
    rank = table["role"].map({"pool": 0, "validation": 1, "test": 2})
    return table[rank == rank.groupby(table["digest"]).transform("max")].reset_index(drop=True)


def _check_counts(table: pd.DataFrame, names: list[str], config: Config) -> None:
    shown = f"dataset={config.dataset}"
    pool = table[table["role"] == "pool"]
    carved = 1 + sum(split not in set(table["role"]) for split in SPLITS[1:])
    for label, name in enumerate(names):
        if not (table["label"] == label).any():
            raise InputError(f"{shown}: empty class {name!r}: it holds no images")
        count = pool["digest"][pool["label"] == label].nunique()
        if count < carved:
            raise InputError(
                f"{shown}: class {name!r} has {count} different images to train on; "
                f"at least {carved} are needed, one for each split made from them"
            )


def _carve(table: pd.DataFrame, data_seed: int) -> np.ndarray:
    """The split of every row: official parts as they are, the pool divided class by class.

    An image's place in the draw is a hash of its content and the seed, so it does not depend on
    the other images, and copies of one image go together.
    """
    split = table["role"].to_numpy(object).copy()
    pool = table[table["role"] == "pool"]
    missing = [name for name in ("test", "validation") if name not in set(split)]
    groups = pool.groupby("digest", sort=False)["label"].agg(["first", "size"])
    groups["draw"] = [_hash([str(data_seed), digest]) for digest in groups.index]
    drawn: dict[str, str] = {}
    for _, members in groups.sort_values("draw").groupby("first"):
        drawn.update(_divide(members["size"].to_dict(), missing))
    split[pool.index] = pool["digest"].map(drawn)
    return split


def _divide(sizes: dict[str, int], missing: list[str]) -> dict[str, str]:
    """Deal one class's images, in order, to the missing splits (a fifth each); the rest trains."""
    target = max(1, round(CARVED_SHARE * sum(sizes.values())))
    split = dict.fromkeys(sizes, "train")
    for after, name in enumerate(reversed(missing)):
        free = [digest for digest in sizes if split[digest] == "train"]
        spare = len(free) - (len(missing) - after)  # one image stays for every split to come
        filled = 0
        for digest in free:
            if spare > 0 and filled + sizes[digest] <= target:
                split[digest], filled, spare = name, filled + sizes[digest], spare - 1
        if not filled:
            split[min(free, key=sizes.__getitem__)] = name
    return split


def _check_splits(table: pd.DataFrame, names: list[str], config: Config) -> None:
    counts = pd.crosstab(table["split"], table["label"])
    for split in SPLITS:
        for label, name in enumerate(names):
            if not counts.get(label, pd.Series(dtype=int)).get(split, 0):
                raise InputError(
                    f"dataset={config.dataset}: class {name!r} has no images in the {split} split; "
                    "add some, or leave the class out with classes"
                )


def _plant_noise(table: pd.DataFrame, names: list[str], config: Config) -> pd.DataFrame:
    """The public columns, with round(label_noise * n_train) training labels made wrong."""
    true_label = table["label"].to_numpy(np.int64)
    train = np.flatnonzero(table["split"] == "train")
    generator = np.random.default_rng(config.data_seed)
    flipped = generator.choice(train, round(config.label_noise * len(train)), replace=False)
    label = true_label.copy()
    label[flipped] += generator.integers(1, len(names), len(flipped))
    label %= len(names)
    copy = table.groupby("digest").cumcount()
    return pd.DataFrame(
        {
            "example_id": [f"{d[:16]}-{c}" if c else d[:16] for d, c in zip(table["digest"], copy)],
            "file_name": table["file_name"],
            "split": table["split"],
            "label": label,
            "label_name": [names[i] for i in label],
            "true_label": true_label,
            "is_flipped": label != true_label,
        }
    )


def _cached_pixels(
    source: _Source, table: pd.DataFrame, config: Config, cache: Path
) -> tuple[Path, set[str]]:
    """The file of the table's decodable images, in its order, and the digests of the others."""
    key = _hash([RECIPE, str(config.image_size), *table["digest"]])
    folder = cache / "pixels" / key
    bad = _read_cache(folder, table, config.image_size)
    if bad is None:
        with _writing(config):
            bad = _build_cache(folder, source, table, config.image_size)
    if bad and config.on_bad_image == "stop":
        first, *others = table["name"][table["digest"].isin(bad)]
        raise InputError(
            f"dataset={config.dataset}: {first}{f' and {len(others)} others' * bool(others)} "
            "cannot be decoded; repair or remove what is damaged, or set on_bad_image=skip"
        )
    return folder / "pixels.npy", bad


def _read_cache(folder: Path, table: pd.DataFrame, size: int) -> set[str] | None:
    """Digests that were skipped when the cache was built; None if it has to be built."""
    try:
        bad = set(json.loads((folder / "skipped.json").read_text()))
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None
    n = int((~table["digest"].isin(bad)).sum())
    return bad if pixels.shape == (n, size, size, 3) and pixels.dtype == np.uint8 else None


def _build_cache(folder: Path, source: _Source, table: pd.DataFrame, size: int) -> set[str]:
    shutil.rmtree(folder, ignore_errors=True)  # what may lie there is broken
    _open_pixels.cache_clear()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        good = _decode_all(new / "pixels.npy", source, table["row"].to_numpy(), size)
        bad = set(table["digest"][~good])
        (new / "skipped.json").write_text(json.dumps(sorted(bad)))
        try:
            os.replace(new, folder)
        except OSError:  # fine if another process was faster
            if _read_cache(folder, table, size) is None:
                raise
    return bad


def _decode_all(file: Path, source: _Source, rows: np.ndarray, size: int) -> np.ndarray:
    """Decode these rows of the source into `file`, by the chunk; True where it worked, (n,)."""
    pixels = _new_pixels(file, len(rows), size)
    good = np.zeros(len(rows), bool)

    def decode(cell: dict[str, Any]) -> np.ndarray | None:
        try:
            return decode_image(source.open(io.BytesIO(_content(cell))), size)
        except Exception:  # Pillow's plugins raise whatever they like on damaged files
            return None

    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(len(rows)):
            for row, image in enumerate(pool.map(decode, source.cells(rows[chunk])), chunk.start):
                if image is not None:
                    pixels[row], good[row] = image, True
    if not good.all():
        kept = np.flatnonzero(good)
        compact = _new_pixels(file.with_suffix(".compact"), len(kept), size)
        for chunk in _chunks(len(kept)):
            compact[chunk] = pixels[kept[chunk]]
        os.replace(file.with_suffix(".compact"), file)
    return good


def _new_pixels(file: Path, n: int, size: int) -> np.ndarray:
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (n, size, size, 3))
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash while writing
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.path.getsize(file))
    return pixels


def decode_image(image: Image.Image, size: int) -> np.ndarray:
    """An image upright, on white, short side fitted, centre kept: uint8 (size, size, 3)."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Wide grey values scaled, where Pillow's own conversion would clip them."""
    values = np.asarray(image).astype(np.float64)
    highest = values.max()
    tops = [1] * (image.mode == "F") + [255] * (image.mode in ("I", "F")) + [65535, 2**31 - 1]
    top = next(top for top in tops if highest <= top)
    return Image.fromarray(np.rint(values.clip(0) * (255 / top)).astype(np.uint8))


def to_batch(
    pixels: np.ndarray | Tensor,
    mean: Iterable[float],
    std: Iterable[float],
    device: str | torch.device = "cpu",
) -> Tensor:
    """uint8 (B, H, W, 3) as a normalised float32 (B, 3, H, W), channels_last."""
    if not isinstance(pixels, Tensor):
        pixels = torch.from_numpy(np.require(pixels, requirements=("C", "W")))
    batch = F.to_dtype(pixels.to(device).permute(0, 3, 1, 2), torch.float32, scale=True)
    batch = F.normalize(batch, list(mean), list(std))
    return batch.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Augmentation:
    """What happens to each example: mirrored or not, and where its crop starts in the padding."""

    flips: Tensor  # (n,) bool
    dy: Tensor  # (n,) int64 in [0, 2 * pad]
    dx: Tensor
    pad: int

    def __getitem__(self, index: Any) -> Augmentation:
        index = torch.as_tensor(index)
        return Augmentation(self.flips[index], self.dy[index], self.dx[index], self.pad)


def draw_augmentation(n: int, augment: str, pad: int, generator: torch.Generator) -> Augmentation:
    """Draw one epoch's augmentation for all n training examples at once.

    Drawn for all, then indexed by position, example i gets the same whichever others are present.
    """
    flips = torch.rand(n, generator=generator) < 0.5
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    if "flip" not in augment:
        flips = torch.zeros_like(flips)
    if "crop" not in augment:
        dy, dx, pad = torch.zeros_like(dy), torch.zeros_like(dx), 0
    return Augmentation(flips, dy, dx, pad)


def augment_batch(batch: Tensor, augmentation: Augmentation) -> Tensor:
    """Mirror and shift each image of (B, 3, H, W) as its entry says; stays channels_last."""
    flips, dy, dx = (
        value.to(batch.device) for value in (augmentation.flips, augmentation.dy, augmentation.dx)
    )
    batch = torch.where(flips[:, None, None, None], F.horizontal_flip(batch), batch)
    pad, (height, width) = augmentation.pad, batch.shape[2:]
    if pad:
        mode = "reflect" if pad < min(height, width) else "edge"
        padded = F.pad(batch, [pad], padding_mode=mode).permute(0, 2, 3, 1)
        ys = dy[:, None] + torch.arange(height, device=batch.device)
        xs = dx[:, None] + torch.arange(width, device=batch.device)
        sample = torch.arange(len(batch), device=batch.device)[:, None, None]
        batch = padded[sample, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)
    return batch.contiguous(memory_format=torch.channels_last)
