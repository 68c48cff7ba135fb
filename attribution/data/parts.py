"""The parts in which data sets come, such as train and test, under the names that people give them."""

from __future__ import annotations

import re
import unicodedata

# Of two names for one role the first is used. Eval is last: next to `test` it is for validation.
ROLES = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "test", "evaluation": "test",
}  # fmt: skip
_NAME = re.compile(
    rf"(?:.*[\W_])?({'|'.join(ROLES)})"
    r"(?:[\W_]?(?:sets?|data|images?|imgs|split|list|labels?|annotations|metadata))?\d*"
)

_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # as in PublicTest


def role_of(name: str) -> str | None:
    """'train', 'test' or 'validation' for a name like Training, seg_train or test_set; else None."""
    match = _NAME.fullmatch(_HUMP.sub("_", name).lower())
    return match and ROLES[match[1]]


def plain(name: str) -> str:
    """A name without the differences that other file systems do not make: case, composed accents."""
    return unicodedata.normalize("NFC", name).casefold()


def by_role(names: list[str]) -> dict[str, str]:
    """The part that plays each role; the other names play none."""
    order = list(ROLES)
    exact = [name for name in names if name.lower() in ROLES]
    exact.sort(key=lambda name: order.index(name.lower()))
    found: dict[str, str] = {}
    for name in exact + [name for name in names if name not in exact and role_of(name)]:
        role = str(role_of(name))
        found.setdefault("validation" if "eval" in name.lower() and role in found else role, name)
    return found
