"""Random edits of a file's bytes, for tests of what reads files that others made."""

from __future__ import annotations

from hypothesis import strategies as st

Edit = tuple[str, int, bytes]


def edits(length: int) -> st.SearchStrategy[list[Edit]]:
    """Up to four edits of a file of `length` bytes, for `edited`."""
    kinds = st.sampled_from(("overwrite", "insert", "delete", "cut", "repeat"))
    return st.lists(
        st.tuples(kinds, st.integers(0, length), st.binary(min_size=1, max_size=8)), max_size=4
    )


def edited(content: bytes, changes: list[Edit]) -> bytes:
    """The content after these edits."""
    for kind, position, new in changes:
        at = position % (len(content) + 1)
        left, right = content[:at], content[at:]
        content = {
            "overwrite": left + new + right[len(new) :],
            "insert": left + new + right,
            "delete": left + right[len(new) :],
            "cut": left,
            "repeat": left + right[:64] + right,
        }[kind]
    return content
