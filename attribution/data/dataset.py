"""The data of an experiment: labelled images in three disjoint splits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.decisions import kept_splits, relabelled
from attribution.data.listing import Listing, check_classes, list_data
from attribution.data.pixel_cache import RECIPE, cached_pixels, painted_pixels
from attribution.data.planted import plant_noise, plant_patch
from attribution.data.sources import short_hash
from attribution.data.splits import carve, check_every_class
from attribution.errors import InputError


@dataclass(frozen=True, eq=False)
class ImageData:
    """Decoded images with labels and splits; row i of `examples` describes row i of `pixels()`.

    Attributes:
        pixels_file: .npy of uint8 (n, size, size, 3), on this machine's disk.
        class_names: position is the label.
        examples: example_id, file_name, split (with `keep` also 'left out'), label, label_name,
            true_label, is_flipped; with a shortcut also has_patch and group (label and patch); and
            the column of the data set that `groups` names, if it has one.
        fingerprint: hash of content, labels after planting, splits, class names and image size.
        skipped: names of files left out because they cannot be decoded.
        dropped_duplicates: copies left out because the same image lies in an official part.
        resident: the pixels themselves, on a machine that does not have pixels_file.
        listing: what the images were found in; a worker process does not get it.
    """

    pixels_file: Path
    class_names: tuple[str, ...]
    examples: pd.DataFrame
    fingerprint: str
    skipped: tuple[str, ...]
    dropped_duplicates: int
    resident: np.ndarray | None = None
    listing: Listing | None = None

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, ascending, int64 (n_split,)."""
        return np.flatnonzero((self.examples["split"] == split).to_numpy()).astype(np.int64)

    def rows_of(self, table: pd.DataFrame) -> np.ndarray:
        """Row numbers of the examples in a table with the columns split and position, int64 (n,)."""
        rows = {split: self.rows(split) for split in table["split"].unique()}
        pairs = zip(table["split"], table["position"], strict=True)
        return np.array([rows[split][position] for split, position in pairs], np.int64)

    def units(self) -> np.ndarray:
        """The unit of each image (n,), see splits.units; without a listing only copies share one."""
        digests = self.examples["example_id"].str[:16]  # copies have other endings
        if self.listing:
            table = self.listing.table
            digests = digests.map(dict(zip(table["digest"].str[:16], table["unit"], strict=True)))
        return digests.to_numpy(str)

    def labels(self, split: str) -> np.ndarray:
        """Labels of a split after planting, int64 (n_split,)."""
        return self.examples["label"].to_numpy(np.int64)[self.rows(split)]

    def table(self, split: str) -> pd.DataFrame:
        """The examples of a split, with their position in it."""
        table = self.examples.iloc[self.rows(split)].reset_index(drop=True)
        return table.assign(position=np.arange(len(table)))

    def pixels(self) -> np.ndarray:
        """All images, uint8 (n, size, size, 3), read-only and memory-mapped."""
        return np.load(self.pixels_file, mmap_mode="r") if self.resident is None else self.resident

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"listing": None}  # which holds open readers

    def portable(self) -> ImageData:
        """The same data with its pixels in memory, to be sent to another machine."""
        return replace(self, resident=np.asarray(self.pixels()))


def load_data(config: Config, listing: Listing | None = None) -> ImageData:
    """Read, decode (once, see pixel_cache), split, and plant faults where the config asks for them.

    Args:
        listing: of the same config, if there is one already.

    Raises:
        InputError: the data set cannot be found, read, decoded or split as asked.
    """
    listing = listing or list_data(config)
    names, table = listing.names, listing.table
    file, bad = cached_pixels(listing.source, table, config)
    is_bad = table["digest"].isin(bad)
    skipped = tuple(sorted(table["name"][is_bad]))
    table = table[~is_bad].reset_index(drop=True)
    check_classes(table, names, config)  # again: files may have been skipped
    table["split"] = carve(table, config)
    if config.split_by:
        why = ": images share units with other classes; another data_seed may divide them better"
        check_every_class(table, names, f"split_by={config.split_by}", why)
    examples = plant_noise(table, names, config)
    if config.labels:
        examples = relabelled(examples, names, config)
    patches: list[str] = []
    if config.shortcut == "patch":
        examples = plant_patch(examples, config)
        file = painted_pixels(file, examples["has_patch"].to_numpy(), table, config)
        patches = [str(list(examples["has_patch"]))]
    if config.keep:
        examples["split"] = kept_splits(examples, names, config)
    if config.groups != "label" and (values := listing.source.column(config.groups)) is not None:
        if config.groups in (*examples, "position"):
            raise InputError(
                f"groups={config.groups}: this project has a column of the same name; rename the "
                "data set's column"
            )
        examples[config.groups] = np.array(values, object)[table["row"]]
    digests = table["digest"].tolist()
    labels = (examples["label"].astype(str) + " " + examples["split"]).tolist()
    fingerprint = short_hash(
        RECIPE, str(config.image_size), json.dumps(names), *digests, *labels, *patches
    )
    return ImageData(
        file, tuple(names), examples, fingerprint, skipped, listing.dropped, listing=listing
    )
