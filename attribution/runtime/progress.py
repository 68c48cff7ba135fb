"""Messages and progress bars on stderr; results go to stdout."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from attribution.errors import redact


@contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar; yield the function that advances it, by 1 or by its argument."""
    shown = {"file": sys.stderr, "disable": None, "leave": False}  # None: on a terminal only
    with tqdm(desc=name, total=total, initial=done, **shown) as bar:
        ended = threading.Event()

        def tick() -> None:  # tasks may take minutes: the clock shows that they run
            while not ended.wait(1):
                bar.refresh()

        if not bar.disable:
            threading.Thread(target=tick, daemon=True).start()
        try:
            yield bar.update
        finally:
            ended.set()


def say(message: str) -> None:
    """Write a line to stderr, without credentials."""
    print(redact(message), file=sys.stderr, flush=True)
