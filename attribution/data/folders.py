"""Find the files of a data set, and read class folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attribution.config import Config
from attribution.data.parts import ROLES, by_role, plain, role_of
from attribution.data.sources import Source, from_files, image_suffixes, some
from attribution.errors import InputError
from attribution.runtime.progress import progress

FolderPath = tuple[str, ...]  # names of folders, from the data set's own downwards
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}  # hold images of any class
MASK_FOLDERS = {"masks", "mask", "annotations", "labels", "segmentation", "segmentations"}
# Beside the image 1.png: 1_mask.png.
MASK_FILE = re.compile(r"(.+)[_-](?:mask|segmentation)(?:[_-]?\d+)?", re.IGNORECASE)


@dataclass
class Files:
    """What a folder holds.

    Attributes:
        images: sorted names of the images in each folder that holds some.
        tables: files that may hold labels.
        others: number of other files by suffix.
        empty: the topmost folders without images.
        hidden: hidden files and folders.
        masks: folders with masks or annotations beside the images, with their numbers.
    """

    root: Path
    images: dict[FolderPath, list[str]] = field(default_factory=dict)
    tables: list[FolderPath] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)

    def path(self, folder: FolderPath, name: str) -> str:
        return os.path.join(self.root, *folder, name)

    def counted(self, folders: list[FolderPath]) -> str:
        """Some folders by name, with the number of their images."""
        return some([f"{'/'.join(f) or '.'} ({len(self.images[f]):,} images)" for f in folders])

    def notes(self, read: Sequence[FolderPath] = ()) -> list[str]:
        """Lines about the files that are not used.

        Args:
            read: tables that are used.
        """
        others = self.others + Counter(_suffix(t[-1]) for t in self.tables if t not in read)
        notes = []
        if others:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(8))
            notes.append(f"{others.total():,} files are not images and are not used: {kinds}")
        if self.hidden:
            notes.append(
                f"{len(self.hidden)} hidden files or folders left out: {some(self.hidden)}"
            )
        if self.empty:
            notes.append(f"folders without images left out: {some(self.empty)}")
        if self.masks:
            notes.append(f"masks or annotations left out: {some(self.masks)}")
        return notes


def find_files(root: Path, config: Config) -> Files:
    """Walk through a folder and the folders in it; links are followed.

    Raises:
        InputError: a folder cannot be read, or an image's name is not UTF-8.
    """
    files = Files(root)
    with progress("data: finding files", 0) as advance:
        try:
            _walk(files, (), frozenset(), advance)
        except OSError as error:
            raise InputError(f"dataset={config.dataset}: cannot be read ({error})") from None
    for folder, names in files.images.items():
        base = files.path(folder, "")
        for path in (base + name for name in names):
            if not path.isascii() and path.encode(errors="replace") != os.fsencode(path):
                raise InputError(
                    f"dataset={config.dataset}: {path} has a name that is not UTF-8; rename it"
                )
    _set_masks_aside(files)
    return files


def _walk(files: Files, folder: FolderPath, above: frozenset, advance: Callable[..., None]) -> int:
    """Add what a folder holds; returns the number of images in it and below.

    Args:
        above: the folders above. A link to one of them would never end.
    """
    path = os.path.join(files.root, *folder)
    info = os.stat(path)
    if (info.st_dev, info.st_ino) in above:
        return 0
    above |= {(info.st_dev, info.st_ino)}
    images, mark = [], len(files.empty)
    with os.scandir(path) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    count = 0
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name == "__MACOSX":
            files.hidden.append("/".join((*folder, name)))
        elif os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
            count += _walk(files, (*folder, name), above, advance)
        # A broken link is listed too: it is then reported as undecodable.
        elif _suffix(name) in image_suffixes() and (entry.is_symlink() or entry.is_file()):
            images.append(name)
        elif _suffix(name) in TABLES:
            files.tables.append((*folder, name))
        else:
            files.others[_suffix(name)] += 1
    advance(len(entries))
    count += len(images)
    if images:
        files.images[folder] = images
    if folder and not count:
        files.empty[mark:] = ["/".join(folder)]
    return count


def _suffix(name: str) -> str:
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if dot else "without suffix"


def _set_masks_aside(files: Files) -> None:
    """Remove masks that lie beside their images, or in a folder beside a folder of images."""
    for folder, names in files.images.items():
        if beside := _masks(names):
            files.images[folder] = sorted(set(names) - beside)
            files.masks.append(
                f"{'/'.join(folder) or '.'} ({len(beside):,} files such as {min(beside)})"
            )
    known = {folder[:i] for folder in files.images for i in range(1, len(folder) + 1)}
    holding = {folder[:-1] for folder in known if folder[-1].lower() in IMAGE_FOLDERS}
    masks = {f for f in known if f[-1].lower() in MASK_FOLDERS and f[:-1] in holding}
    for folder in list(files.images):
        if any(folder[:i] in masks for i in range(1, len(folder) + 1)):
            count = len(files.images.pop(folder))
            files.masks.append(f"{'/'.join(folder)} ({count:,} images)")


def _masks(names: list[str]) -> set[str]:
    """Of files in one folder, those that are called like another one with `_mask` behind its name."""
    called = [name for name in names if "mask" in name.lower() or "segmentation" in name.lower()]
    if not called:
        return set()
    stems = {os.path.splitext(name)[0] for name in names}
    matches = {name: MASK_FILE.fullmatch(os.path.splitext(name)[0]) for name in called}
    return {name for name, match in matches.items() if match and match[1] in stems}


def class_folders(files: Files, config: Config) -> Source | None:
    """Images in class folders, with or without official parts; None if there are no classes.

    A class is the topmost folder that holds images itself, or the folder at level `class_depth`.

    Raises:
        InputError: the same class names lie below several folders, such as one for each patient.
    """
    notes: list[str] = []
    folders = _without_image_folders(files.images)
    parts = _official(folders, config) or {"train": folders}
    used = {real for inside in parts.values() for reals in inside.values() for real in reals}
    if unused := [real for real in files.images if real not in used]:
        notes.append(f"folders next to {some(list(parts))} are not used: {files.counted(unused)}")
    holders = {path for inside in parts.values() for path in inside if path}
    classes = {part: _classes(inside, holders, config) for part, inside in parts.items()}
    pool = by_role(list(parts)).get("train", next(iter(parts)))
    train = classes[pool]
    if not train:
        return None
    if not (config.class_depth or config.label_column):
        _refuse_repeated(train, files, config)
    classes = {part: _named_like(train, found) for part, found in classes.items()}
    grouped = [real for found in classes.values() for reals in found.values() for real in reals]
    if loose := sorted(used - set(grouped)):
        notes.append(
            f"images outside of class folders have no label and are not used: {files.counted(loose)}"
        )
    names = _names({c for found in classes.values() for c in found})
    rows = []
    for part, found in classes.items():
        is_known = any(c in train for c in found)
        for c, reals in found.items():
            for real in reals:
                label = names[c] if is_known else None
                base = files.path(real, "")
                rows += [(base + name, label, part) for name in files.images[real]]
    order = sorted({label for _, label, _ in rows if label is not None})
    if all(name.isdecimal() for name in order) and order != sorted(order, key=int):
        notes.append(f"class names are sorted as text: {some(order)}")
    inside = parts[pool]
    levels = max(map(len, inside))
    if levels > 1:
        deepest = sorted(train, key=len)[-1]
        example = "/".join(deepest)
        notes.append(
            f"{len(train)} classes are folders such as {example}; --class_depth N takes the folders of "
            f"level N (1 to {levels}), -1 those of one name as one class"
        )
    below = [path for path in inside if config.class_depth >= 0 and path not in train]
    lower = [real for path in below for real in inside[path]]
    if merged := [real for real in lower if real not in loose]:
        notes.append(f"images below a class folder belong to its class: {files.counted(merged)}")
    return from_files(files.root, rows, order, notes)


Folders = dict[FolderPath, list[FolderPath]]  # folders of images by the path that counts


def _without_image_folders(images: dict[FolderPath, list[str]]) -> Folders:
    """Leave folders such as `images` out of the paths where they are alone."""
    children: dict[FolderPath, set[str]] = {}
    for folder in images:
        for i in range(len(folder)):
            children.setdefault(folder[:i], set()).add(folder[i])
    found: Folders = {}
    for folder in images:
        path = tuple(
            name
            for i, name in enumerate(folder)
            if name.lower() not in IMAGE_FOLDERS or len(children[folder[:i]]) > 1
        )
        found.setdefault(path, []).append(folder)
    return found


def _official(folders: Folders, config: Config) -> dict[str, Folders] | None:
    """The folders of each part by their paths below it, None if there are no parts.

    A class may be called train: folders named like parts are parts if no other folder lies next to
    them, if there is one for training and another one, or if the one for training holds folders.
    Folders that hold images themselves must have such a name alone, unlike crash_test.
    """
    tops = sorted({path[0] for path in folders if path})
    named = [top for top in tops if role_of(top)]
    roles = {role_of(top) for top in named}
    nested = {path[0] for path in folders if path[1:]}
    are_bare = all(top.lower() in ROLES for top in named)
    is_certain = "train" in roles and len(roles) > 1 and (are_bare or nested.issuperset(named))
    is_certain |= any(
        role_of(top) == "train" and (named[1:] or top.lower() == "train") for top in nested
    )
    if named and (is_certain or named == tops):
        return {top: _inside(folders, top) for top in named}
    if len(tops) == 1:  # data/train
        return _official(_below(folders, tops[0]), config)
    return _beside_classes(folders, tops, config) or _lowest(folders)


def _beside_classes(folders: Folders, tops: list[str], config: Config) -> dict[str, Folders] | None:
    """Parts beside the classes that are trained on: cat, dog, test/cat, test/dog, or test alone.

    With class_depth, a folder `test` that holds images itself may be a class.
    """
    classes = [top for top in tops if not role_of(top)]
    parts = {top: _inside(folders, top) for top in tops if role_of(top)}
    held = {plain(path[0]) for inside in parts.values() for path in inside if path}
    is_test = all(top.lower() in ROLES and role_of(top) == "test" for top in parts)
    if held:
        are_parts = held <= set(map(plain, classes))
    else:
        are_parts = is_test and len(classes) > 1 and not config.class_depth
    if not (parts and classes and are_parts):
        return None
    return {"train": {p: reals for p, reals in folders.items() if p and p[0] in classes}, **parts}


def _lowest(folders: Folders) -> dict[str, Folders] | None:
    """Parts below the classes: cat/train, cat/test; None if other folders hold images too."""
    roles = {role_of(path[-1]) if path[1:] else None for path in folders}
    if None in roles or len(roles) < 2:
        return None
    parts: dict[str, Folders] = {}
    for path, reals in folders.items():
        parts.setdefault(path[-1], {})[path[:-1]] = reals
    return parts


def _below(folders: Folders, top: str) -> Folders:
    return {path[1:]: real for path, real in folders.items() if path and path[0] == top}


def _inside(folders: Folders, top: str) -> Folders:
    """The folders of a part, also where it is doubled: seg_train/seg_train."""
    below = _below(folders, top)
    tops = {path[0] for path in below if path}
    if len(tops) == 1 and role_of(next(iter(tops))) == role_of(top):
        return _inside(below, next(iter(tops)))
    return below


def _classes(folders: Folders, holders: set[FolderPath], config: Config) -> Folders:
    """The folders of images that belong to each class.

    Args:
        holders: folders that hold images themselves, in any part.
    """
    found: Folders = {}
    for path, reals in folders.items():
        topmost = next((i for i in range(1, len(path) + 1) if path[:i] in holders), 0)
        level = config.class_depth or topmost
        if level < 0 and path:
            found.setdefault(path[-1:], []).extend(reals)
        elif 0 < level <= len(path):
            found.setdefault(path[:level], []).extend(reals)
    return found


def _names(classes: set[FolderPath]) -> dict[FolderPath, str]:
    """A folder's own name, with the folders above it where several have that name."""
    count = Counter(c[-1] for c in classes)
    return {c: c[-1] if count[c[-1]] == 1 else "/".join(c) for c in classes}


def _refuse_repeated(classes: Folders, files: Files, config: Config) -> None:
    """Refuse class folders of which every name lies below several folders, as with folds or patients."""
    count = Counter(c[-1] for c in classes)
    if len(count) > 1 and min(count.values()) > 1:
        above = sorted({"/".join(c[:-1]) or "." for c in classes})
        table = ", or --label_column COLUMN where a table holds the labels" if files.tables else ""
        raise InputError(
            f"dataset={config.dataset}: folders called {some(sorted(count))} lie in each of "
            f"{some(above)}; add --class_depth -1 for one class for each name, or --class_depth N "
            f"for the folders of level N (1 to {max(map(len, classes))}){table}"
        )


def _named_like(train: Folders, found: Folders) -> Folders:
    """The classes of a part; those that differ from the training part's in case alone are those."""
    known = {tuple(map(plain, c)): c for c in train}
    renamed: Folders = {}
    for c, reals in found.items():
        same = c if c in train else known.get(tuple(map(plain, c)), c)
        renamed.setdefault(same, []).extend(reals)
    return renamed
