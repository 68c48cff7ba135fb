"""What a person at the terminal is told: lines, and the progress of what takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attribution.errors import redact


@contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield a function that advances the line, by one unless told; it shows the rate and the time left."""
    from tqdm import tqdm

    with tqdm(
        total=total, initial=done, desc=name, file=sys.stderr, disable=None, leave=False
    ) as bar:
        yield bar.update


def say(message: str) -> None:
    """Write a line to stderr, without credentials; stdout is for results."""
    print(redact(message), file=sys.stderr, flush=True)
