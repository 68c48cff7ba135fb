"""Find the image that a table means."""

from __future__ import annotations

import os

from attribution.data.folders import TABLES, Files, FolderPath
from attribution.data.parts import plain, role_of
from attribution.data.sources import image_suffixes, some
from attribution.errors import InputError


class ImageFinder:
    """Find the image that a table means: by path, with or without suffix and leading folders."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.by_stem: dict[str, list[FolderPath]] = {}
        for folder, names in files.images.items():
            for name in names:
                self.by_stem.setdefault(plain(stem(name)), []).append((*folder, name))

    def find(self, value: str, table: FolderPath, strict: bool = False) -> str | None:
        """The path of the image that a table names; None if no image fits, or several.

        Raises:
            InputError: several images fit, with `strict`.
        """
        parts = tuple(part for part in value.replace("\\", "/").split("/") if part not in ("", "."))
        if not parts:
            return None
        near = self.by_stem.get(plain(stem(parts[-1])), ())
        found = [path for path in near if _agree(path, parts)]
        if not found:
            named = tuple(map(plain, parts))
            found = [path for path in near if _agree(tuple(map(plain, path)), named)]
        if len(found) > 1:
            beside = (*table[:-1], *parts[:-1])
            own = [path for path in found if path[:-1] == beside]
            role = role_of(stem(table[-1]))
            same = [path for path in found if role and role in map(role_of, path[:-1])]
            found = own or same or found
        if len(found) > 1 and strict:
            raise InputError(
                f"dataset={self.files.root}: {'/'.join(table)} names {value!r}, which may be "
                f"{some(['/'.join(path) for path in found], 2)}; write the folder before the name"
            )
        if len(found) == 1:
            return self.files.path(found[0][:-1], found[0][-1])
        # Outside of the folder, such as ../images/1.png.
        path = os.path.join(self.files.root, *table[:-1], value)
        is_image = not found and os.path.splitext(value)[1].lower() in image_suffixes()
        return os.path.normpath(path) if is_image and os.path.isfile(path) else None


def _agree(path: FolderPath, named: FolderPath) -> bool:
    """Whether one path is the end of the other; the name may lack its suffix."""
    n = min(len(path), len(named))
    return path[-n:-1] == named[-n:-1] and named[-1] in (path[-1], stem(path[-1]))


def stem(name: str) -> str:
    """A file name without the suffix of an image or a table."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in image_suffixes() or suffix.lower() in TABLES else name
