"""Write a data set as `labels` and `keep` leave it: class folders, a Hugging Face data set, or a table."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData, load_data
from attribution.data.decisions import LEFT_OUT
from attribution.data.decoding import open_image
from attribution.data.folders import Files, class_folders
from attribution.data.listing import Listing, folder_of, hub_format, list_data
from attribution.data.planted import example_ids
from attribution.data.sources import Cells, Source, as_file, image_suffixes, map_cells
from attribution.data.splits import SPLITS
from attribution.errors import InputError, reason
from attribution.runtime.safe_files import atomic, link_or_copy

TABLE = "export.csv"  # in every export; --overwrite replaces only folders that hold it
CONTENTS = {TABLE, "dataset_dict.json", *SPLITS}


def target(config: Config) -> Path:
    """The folder that is written, absolute.

    Raises:
        InputError: it is the data set's own, or holds something that may not be replaced.
    """
    shown = f"export={config.export}"
    folder, source = Path(config.export).expanduser().resolve(), folder_of(config.dataset)
    if source and (source.resolve() in (folder, *folder.parents) or folder in source.parents):
        raise InputError(
            f"{shown}: overlaps with dataset={config.dataset}; name a folder elsewhere"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{shown}: is a file; name a folder")
    found = set(os.listdir(folder)) if folder.exists() else set()
    if found and config.overwrite == "no":
        raise InputError(f"{shown}: is not empty; name another folder, or add --overwrite")
    if found and not (TABLE in found and found <= CONTENTS):
        raise InputError(
            f"{shown}: holds something else than an earlier export, which is not replaced; name "
            "another folder"
        )
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{shown}: {nearest} cannot be written to")
    return folder


def check(config: Config, data: ImageData) -> None:
    """Refuse class names that would be other classes once they are folders.

    Raises:
        InputError: with the first of them.
    """
    if not config.export or config.export_format != "folder":
        return
    names = data.class_names
    files = Files(
        Path(), {(split, *name.split("/")): ["x.png"] for split in SPLITS for name in names}
    )
    found = class_folders(files, replace(config, class_depth=0))
    read = found.class_names if found else []
    for name in names:
        is_hidden = any(part[:1] in ("", ".") or part == "__MACOSX" for part in name.split("/"))
        if name not in read or is_hidden:
            raise InputError(
                f"export={config.export}: class {name!r} cannot be a folder's name; add "
                "--export_format hf"
            )


def write(config: Config, data: ImageData) -> pd.DataFrame:
    """Write the data set, whole or not at all, and return the table of its images.

    Raises:
        InputError: see target; or the folder cannot be written, or the data set has changed.
    """
    folder, listing = target(config), list_data(config)  # anew: training may have taken hours
    before = load_data(replace(config, keep="", labels=""), listing).examples
    if list(before["example_id"]) != list(data.examples["example_id"]):
        raise InputError(f"export={config.export}: dataset={config.dataset} has changed meanwhile")
    table = _table(data.examples, before, listing)
    try:
        with atomic(folder) as unfinished:
            unfinished.mkdir()
            if config.export_format == "hf":
                table = table[table["is_kept"]]
                hub_format().save(unfinished, table, listing.source, data.class_names)
            elif config.export_format == "folder" or not listing.source.root:
                table = table[table["is_kept"]]
                table = table.assign(filepath=_write_images(unfinished, table, listing.source))
            table = table.drop(columns="row")
            table.to_csv(unfinished / TABLE, index=False)
            if folder.exists():  # it goes with atomic's own folder
                os.replace(folder, unfinished.with_name("replaced"))
    except OSError as error:
        raise InputError(f"export={config.export}: cannot be written ({reason(error)})") from None
    return table


def _table(examples: pd.DataFrame, before: pd.DataFrame, listing: Listing) -> pd.DataFrame:
    """One row per image: its labels, and its row in the source.

    Args:
        before: the same examples without `keep` and `labels`.
    """
    is_kept = examples["split"] != LEFT_OUT
    row = dict(zip(example_ids(listing.table), listing.table["row"]))
    root = listing.source.root
    return pd.DataFrame(
        {
            "filepath": [str(root / name) if root else name for name in examples["file_name"]],
            "label": examples["label_name"],
            "given_label": before["label_name"],
            "split": before["split"],
            "is_label_issue": ~is_kept | (examples["label_name"] != before["label_name"]),
            "is_kept": is_kept,
            "example_id": examples["example_id"],
            "row": examples["example_id"].map(row),
        }
    )


def _write_images(folder: Path, table: pd.DataFrame, source: Source) -> list[str]:
    """Write the images to SPLIT/CLASS/FILE below a folder, and return these paths.

    Files are linked where the file system can. Where two would have one name, each starts with its
    example_id.
    """
    names = [
        os.path.basename(path) or each for path, each in zip(table["filepath"], table["example_id"])
    ]
    below = table["split"] + "/" + table["label"] + "/"
    count = Counter((below + names).str.lower())
    paths = [
        f"{start}{name}" if count[(start + name).lower()] == 1 else f"{start}{each}-{name}"
        for start, name, each in zip(below, names, table["example_id"])
    ]
    for each in below.unique():
        (folder / each).mkdir(parents=True)

    def place(first: int, cells: Cells) -> Iterator[str]:
        for position, cell in enumerate(cells, first):
            path = paths[position]
            if cell["bytes"] is None:
                link_or_copy(os.path.realpath(cell["path"]), folder / path)
            else:
                held = as_file(source, cell)
                if os.path.splitext(path)[1].lower() not in image_suffixes():
                    path += f".{open_image(io.BytesIO(held)).format}".lower()
                (folder / path).write_bytes(held)
            yield path

    return list(map_cells(source, table["row"].to_numpy(), place, "data: exporting images"))
