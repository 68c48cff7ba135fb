"""Texts as names that MLflow and file systems accept."""

from __future__ import annotations

import posixpath
import re

from attribution.runtime.hashing import digest


def file_name(text: str) -> str:
    """A text as the stem of a file's name."""
    return re.sub(r"[^\w\-.]+", "-", text).strip("-.")[:80] or "unnamed"


def metric_name(text: str) -> str:
    """A text without the characters that MLflow refuses in the name of a metric.

    A hash at the end keeps apart texts that differ only in those characters.
    """
    name = re.sub(r"[^\w\-. :/]", "_", text)
    name = name if len(name) < 248 else name[:240]  # with the hash; MLflow's limit is 250
    # MLflow treats a name as a path and refuses one that could be written shorter.
    name = name if posixpath.normpath(name) == name else name.replace("/", "_")
    return name if name == text else f"{name}_{digest(text)[:6]}"
