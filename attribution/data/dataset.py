"""The data of an experiment: labelled images in three disjoint splits, with planted noise or shortcut."""

from __future__ import annotations

import csv
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config, nearest
from attribution.data.pixel_cache import (
    RECIPE,
    cached_pixels,
    open_pixels,
    painted_pixels,
    short_hash,
    writing,
)
from attribution.data.sources import VALIDATION_NAMES, Source, chunks, content_digest, find_source
from attribution.errors import InputError

SPLITS = ("train", "validation", "test")
TARGETS = "validation"  # the split whose margins the scores are about
LEFT_OUT = "left out"  # the split of training examples that `keep` does not name
CARVED_SHARE = 0.2
PATCH_SHARE = {"first class": 0.95, "others": 0.05, "held out": 0.5}


@dataclass(frozen=True, eq=False)
class ImageData:
    """Decoded images with labels and splits; row i of `examples` describes row i of `pixels()`.

    Attributes:
        pixels_file: .npy of uint8 (n, size, size, 3), on the disk of the process that loaded it.
        class_names: position is the label.
        examples: example_id, file_name, split (with `keep` also 'left out'), label, label_name,
            true_label, is_flipped; with a shortcut also has_patch and group (label and patch); and
            the column of the data set that `groups` names, where it has that.
        fingerprint: hash of content, labels after planting, splits, class names and image size.
        skipped: names of the files left out because they cannot be decoded.
        dropped_duplicates: copies left out because the same image lies in an official part.
        resident: the content of pixels_file, where the data went to a machine without that disk.
    """

    pixels_file: Path
    class_names: tuple[str, ...]
    examples: pd.DataFrame
    fingerprint: str
    skipped: tuple[str, ...]
    dropped_duplicates: int
    resident: np.ndarray | None = None

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
        """All images, uint8 (n, size, size, 3), read-only: a memory map, opened once a process."""
        return open_pixels(self.pixels_file) if self.resident is None else self.resident

    def with_pixels(self) -> ImageData:
        """The same data with its pixels inside in place of on this machine's disk."""
        return replace(self, resident=np.asarray(self.pixels()))


@dataclass(frozen=True, eq=False)
class Listing:
    """What a data set holds, before any image is decoded: one row of `table` an image."""

    source: Source
    names: list[str]
    table: pd.DataFrame
    dropped: int

    def n_train(self, data_seed: int) -> int:
        """Training examples, those included that may prove undecodable."""
        return int((_carve(self.table, data_seed) == "train").sum())


def list_data(config: Config) -> Listing:
    """Find and hash the images; an order by content makes the first rows a sample of them all.

    Raises:
        InputError: the data set cannot be found, read or split.
    """
    cache = Path(config.cache_dir)
    with writing(config):
        (cache / "pixels").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache / "pixels").close()
    source = find_source(config, cache)
    chosen = _choose_classes(source, config)
    names = [source.class_names[label] for label in chosen]
    table = _list_examples(source, chosen, config)
    listed = len(table)
    table = _drop_copies(table)
    _check_counts(table, names, config)
    return Listing(source, names, table, listed - len(table))


def load_data(config: Config, listing: Listing | None = None) -> ImageData:
    """Read, decode (once: see `cache_dir`), split and, where asked, plant label noise.

    Args:
        listing: of the same config, where it is there already.

    Raises:
        InputError: the data set cannot be found, read, decoded or split as asked.
    """
    cache = Path(config.cache_dir)
    listing = listing or list_data(config)
    source, names, table = listing.source, listing.names, listing.table
    file, bad = cached_pixels(source, table, config, cache)
    is_bad = table["digest"].isin(bad)
    skipped = tuple(sorted(table["name"][is_bad]))
    table = table[~is_bad].reset_index(drop=True)
    _check_counts(table, names, config)  # again: files may have been skipped
    table["split"] = _carve(table, config.data_seed)
    _check_splits(table, names, config)
    examples = _plant_noise(table, names, config)
    if config.shortcut == "patch":
        examples = _plant_patch(examples, config.data_seed)
        if config.image_size < 8:
            raise InputError(
                f"image_size={config.image_size}: too small for shortcut=patch; use 8 or more"
            )
        with writing(config):
            file = painted_pixels(file, examples["has_patch"].to_numpy(), cache)
    if config.keep:
        examples["split"] = _kept(examples, names, config)
    if config.groups != "label" and (values := source.column(config.groups)) is not None:
        if config.groups in (*examples, "position"):
            raise InputError(
                f"groups={config.groups}: names a column of the data set that has the name of one of "
                "this project's own; rename it"
            )
        examples[config.groups] = np.array(values, object)[table["row"]]
    planted = [] if config.shortcut == "none" else [str(list(examples["has_patch"]))]
    fingerprint = short_hash(
        [RECIPE, str(config.image_size), json.dumps(names), *table["digest"]]
        + [f"{label} {split}" for label, split in zip(examples["label"], examples["split"])]
        + planted
    )
    return ImageData(file, tuple(names), examples, fingerprint, skipped, listing.dropped)


def _choose_classes(source: Source, config: Config) -> list[int]:
    """Ids of the classes to keep, in the source's order."""
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


def _list_examples(source: Source, chosen: list[int], config: Config) -> pd.DataFrame:
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
    names: list[str] = []
    digests: list[str] = []
    with ThreadPoolExecutor() as pool:
        for cells in (source.cells(rows[chunk]) for chunk in chunks(len(rows))):
            names += [source.name(cell) for cell in cells]
            digests += pool.map(content_digest, cells)
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


def _drop_copies(table: pd.DataFrame) -> pd.DataFrame:
    """Keep an image in the most official part that holds it, so that no two splits share it."""
    rank = table["role"].map({"pool": 0, "validation": 1, "test": 2})
    return table[rank == rank.groupby(table["digest"]).transform("max")].reset_index(drop=True)


def _check_counts(table: pd.DataFrame, names: list[str], config: Config) -> None:
    shown = f"dataset={config.dataset}"
    pool = table[table["role"] == "pool"]
    owner = pool.groupby("digest")["label"].first()  # an image of two classes is one's, see _carve
    carved = 1 + sum(split not in set(table["role"]) for split in SPLITS[1:])
    for label, name in enumerate(names):
        if not (table["label"] == label).any():
            raise InputError(f"{shown}: empty class {name!r}: it holds no images")
        count = int((owner == label).sum())
        if count < carved:
            raise InputError(
                f"{shown}: class {name!r} has {count} different images of its own to train on; "
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
    groups["draw"] = [short_hash([str(data_seed), digest]) for digest in groups.index]
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
    """The public columns, with round(label_noise * n_train) training labels made wrong.

    To any other class alike, or (noise_kind=pair: Han et al. 2018, "Co-teaching") to the next.
    """
    true_label = table["label"].to_numpy(np.int64)
    train = np.flatnonzero(table["split"] == "train")
    generator = np.random.default_rng(config.data_seed)
    flipped = generator.choice(train, round(config.label_noise * len(train)), replace=False)
    label = true_label.copy()
    last = len(names) if config.noise_kind == "uniform" else 2
    label[flipped] += generator.integers(1, last, len(flipped))
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


def read_ids(file: str) -> list[str]:
    """The example_ids in a file: the column of that name of a .csv table, or one a line.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    try:
        # A spreadsheet begins the table that it saves with a byte order mark.
        with Path(file).expanduser().open(encoding="utf-8-sig", newline="") as lines:
            rows = [row for row in csv.reader(lines) if any(map(str.strip, row))]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"keep={file}: cannot be read ({error})") from None
    column = 0
    if rows and "example_id" in rows[0]:
        column, rows = rows[0].index("example_id"), rows[1:]
    ids = [row[column].strip() for row in rows if len(row) > column]
    if not ids:
        raise InputError(f"keep={file}: holds no example_ids")
    return ids


def _kept(examples: pd.DataFrame, names: list[str], config: Config) -> np.ndarray:
    """The splits, with the training examples that `keep` does not name left out."""
    ids = set(read_ids(config.keep))
    split = examples["split"].to_numpy(object).copy()
    train = split == "train"
    unknown = sorted(ids - set(examples["example_id"][train]))
    if unknown:
        raise InputError(
            f"keep={config.keep}: {len(unknown)} of its {len(ids)} example_ids are not in this "
            f"training set, e.g. {unknown[0][:40]!r}; is it of other data or another data_seed?"
        )
    split[train & ~examples["example_id"].isin(ids)] = LEFT_OUT
    for label, name in enumerate(names):
        if not ((split == "train") & (examples["label"] == label)).any():
            raise InputError(f"keep={config.keep}: no training example of class {name!r} is left")
    return split


def _plant_patch(examples: pd.DataFrame, data_seed: int) -> pd.DataFrame:
    """Columns has_patch and group: a shortcut to the first class that held-out images do not keep.

    Drawn within each true class and split, in exact shares.
    """
    generator = np.random.default_rng([data_seed, 1])
    has_patch = np.zeros(len(examples), dtype=bool)
    for (split, true_label), rows in examples.groupby(["split", "true_label"]).indices.items():
        kind = "first class" if true_label == 0 else "others"
        share = PATCH_SHARE[kind if split == "train" else "held out"]
        has_patch[generator.choice(rows, round(share * len(rows)), replace=False)] = True
    names = np.where(has_patch, "with patch", "without patch")
    return examples.assign(has_patch=has_patch, group=examples["label_name"] + ", " + names)
