"""Seeded hostile input to what reads files and flags: does anything but a documented refusal come out?"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from attribution.config import FIELDS, STAGES, Config, parse, resolve
from attribution.data.pixel_cache import read_image
from attribution.errors import InputError
from attribution.scores.artifact import REQUIRED_COLUMNS, load_scores, write_scores

CHUNK = 1000  # cases that hypothesis draws at a time: it remembers all of them
SIDE = 8
PIXELS = 1 << 20  # of an image, at most: an allowed one of 179 million takes seconds


@dataclass
class Found:
    """What came of the cases of one target."""

    cases: int = 0
    accepted: int = 0
    refusals: set[str] = field(default_factory=set)
    undocumented: dict[str, Any] = field(default_factory=dict)  # exception to the first such case
    slowest: float = 0.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=tuple(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a target.

    `accepted` cases were read, and what came out was checked; `refusals` are distinct documented
    ones, numbers and names left out; `undocumented` is the number of distinct exceptions of any other
    kind, or of results that should have been refused: each is told with its case, and makes the
    command fail. A crash of the interpreter would end it, without a table.
    """
    rows = []
    for name in options.targets:
        start, found = time.monotonic(), fuzz(name, options.cases, options.seed)
        for error, case in found.undocumented.items():
            print(f"{name}: {error}: {case!r}"[:2000], file=sys.stderr)
        rows.append(
            {
                "target": name,
                "cases": found.cases,
                "accepted": found.accepted,
                "refusals": len(found.refusals),
                "undocumented": len(found.undocumented),
                "seconds": round(time.monotonic() - start, 1),
                "slowest_ms": round(1000 * found.slowest, 1),
            }
        )
    return rows


def fuzz(name: str, cases: int, root: int) -> Found:
    """Draw at least so many cases of a target and note what came of each."""
    found, chunk = Found(), 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in command.py: Pillow's and numpy's are no refusals
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        strategy, read = TARGETS[name](Path(folder))
        while found.cases < cases:
            quiet = settings(
                max_examples=min(CHUNK, cases - found.cases),
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                database=None,
                deadline=None,
            )
            body = given(strategy)(lambda case: _try(read, case, found))
            seed(f"{root}/{name}/{chunk}")(quiet(body))()
            chunk += 1
    return found


def _try(read: Callable[[Any], str], case: Any, found: Found) -> None:
    start = time.perf_counter()
    try:
        refusal = read(case)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found.undocumented.setdefault(f"{type(error).__name__}: {_template(str(error))}", case)
    else:
        found.accepted += not refusal
        found.refusals |= {_template(refusal)} - {""}
    found.cases += 1
    found.slowest = max(found.slowest, time.perf_counter() - start)


def _template(message: str) -> str:
    """A message without what is of one case alone."""
    return re.sub(r"'[^']*'|\[.*\]|0x[0-9a-f]+|-?\d[\d.,]*", "#", message.rpartition(": ")[2])[:80]


# -- bytes that were changed -----------------------------------------------------------------------

EDITS = ("set", "insert", "delete", "cut", "repeat")


def changes(most: int) -> st.SearchStrategy[list[tuple[str, int, bytes]]]:
    """Edits of a file of at most so many bytes, for `changed`."""
    edit = st.tuples(
        st.sampled_from(EDITS), st.integers(0, most), st.binary(min_size=1, max_size=8)
    )
    return st.lists(edit, max_size=4)


def changed(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """The content after these edits."""
    for kind, position, new in edits:
        at = position % (len(content) + 1)
        left, right = content[:at], content[at:]
        if kind == "set":
            content = left + new + right[len(new) :]
        elif kind == "insert":
            content = left + new + right
        elif kind == "delete":
            content = left + right[len(new) :]
        elif kind == "cut":
            content = left
        else:
            content = left + right[:64] + right
    return content


# -- load_scores -----------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 3, 4, -1, 2**31, 2**40, 2**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
TYPES = (
    "<f4",
    ">f4",
    "<f2",
    "<f8",
    "<i4",
    "|O",
    "|b1",
    "<U9",
    "<c8",
    "|V4",
    "[('a', '<f4')]",
    "M8",
)
COLUMNS = sorted(set.union(*REQUIRED_COLUMNS.values()))
CELLS = (None, True, -1, 0, 1, 2**40, math.nan, math.inf, 0.5, "text", b"\xff", [1], {"a": 1})


def scores(folder: Path) -> tuple[st.SearchStrategy, Callable[[Any], str]]:
    """A score artifact in which one file is changed, and its hash with it."""
    import pandas as pd

    def table(n: int) -> pd.DataFrame:
        columns = {name: np.arange(n) / n for name in COLUMNS}
        texts = {name: [f"{name} {i}" for i in range(n)] for name in ("example_id", "label_name")}
        whole = {name: np.arange(n) for name in ("position", "label")}
        return pd.DataFrame(columns | texts | whole)

    write_scores(folder, np.arange(12.0).reshape(4, 3), table(4), table(3), {})
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    promised = json.loads(files["metadata.json"])
    edits = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(st.just(name), changes(len(files[name])))
    )
    header = st.tuples(
        st.just("header"),
        st.sampled_from(TYPES),
        st.lists(st.sampled_from([0, 1, 3, 4, -1, 2**40, 2**62, 10**30]), max_size=3),
        st.booleans(),
        st.sampled_from([0, 4, 48]),
    )
    matrix = st.tuples(st.just("matrix"), st.lists(st.floats(width=32), min_size=12, max_size=12))
    metadata = st.tuples(
        st.just("metadata"), st.sampled_from(sorted(promised)), VALUES, st.booleans()
    )
    cells = st.tuples(
        st.just("cells"),
        st.sampled_from(sorted(REQUIRED_COLUMNS)),
        st.sampled_from([*COLUMNS, "is_flipped", "index"]),
        st.lists(st.sampled_from(CELLS), min_size=2, max_size=5) | st.just(None),
        st.booleans(),
    )

    def make(case: tuple) -> dict[str, bytes]:
        kind, *rest = case
        if kind in files:
            return {kind: changed(files[kind], rest[0])}
        if kind == "header":
            descr, shape, fortran, size = rest
            descr = descr if descr[0] == "[" else repr(descr)
            text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {tuple(shape)}}}\n"
            start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
            return {"scores.npy": start + text.encode() + bytes(size)}
        if kind == "matrix":
            file = io.BytesIO()
            np.save(file, np.array(rest[0], np.float32).reshape(4, 3))
            return {"scores.npy": file.getvalue()}
        if kind == "metadata":
            key, value, gone = rest
            left = {k: v for k, v in promised.items() if k != key}
            return {"metadata.json": json.dumps(left if gone else left | {key: value}).encode()}
        return {rest[0]: _table_bytes(files[rest[0]], *rest[1:])}

    def read(case: tuple) -> str:
        new = make(case)
        if "metadata.json" not in new:
            hashes = {name: sha256(content).hexdigest() for name, content in (files | new).items()}
            tables = {name: hashes[name] for name in REQUIRED_COLUMNS}
            document = promised | {"sha256": hashes["scores.npy"], "sha256_tables": tables}
            new["metadata.json"] = json.dumps(document).encode()
        for name, content in (files | new).items():
            (folder / name).write_bytes(content)
        try:
            found = load_scores(folder)
        except InputError as error:
            return str(error)
        check_scores(found)
        return ""

    return edits | header | matrix | metadata | cells, read


def _table_bytes(content: bytes, name: str, cells: list | None, twice: bool) -> bytes:
    """A table with another column of that name (or a second one), or without it.

    The same where arrow cannot hold it.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table, out = parquet.read_table(io.BytesIO(content)), io.BytesIO()
    rows = len(table)
    if name in table.column_names and not twice:
        table = table.drop_columns([name])
    try:
        if cells is not None:
            table = table.append_column(name, pa.array((cells * rows)[:rows]))
        parquet.write_table(table, out)
    except (pa.ArrowException, TypeError, OverflowError):
        return content
    return out.getvalue()


def check_scores(found: Any) -> None:
    """What load_scores promises of all that it returns."""
    assert found.values.dtype == np.float32 and np.isfinite(found.values).all()
    assert found.values.shape == (len(found.train), len(found.targets))
    for name, table in zip(REQUIRED_COLUMNS, (found.train, found.targets), strict=True):
        assert REQUIRED_COLUMNS[name] <= set(table.columns)
        assert table["position"].tolist() == list(range(len(table)))
        assert np.isfinite(table["loss"].to_numpy(float)).all()
    assert len(found.top(0, 2)) == len(found.top_per_target(2)[0][0]) == min(2, len(found.train))


# -- the parser of flags ---------------------------------------------------------------------------

TEXTS = ("", " ", ",", "nan", "inf", "-0", "1e400", "0x10", "1_000", "9" * 5000, "digits", "images",
         "auto", "none", "yes", "../..", "~", "a\nb", "\0", "\x1b[31m", "é😀", "--", "-", "=", "{x}", "%s")  # fmt: skip


def config(folder: Path) -> tuple[st.SearchStrategy, Callable[[Any], str]]:
    """Flags of a stage: names that exist or nearly do, values of any kind."""
    names = st.sampled_from([*FIELDS, "help", "epoch", "num-seeds"])
    value = st.sampled_from(TEXTS) | st.text(max_size=12) | NUMBERS.map(str)
    fitting = st.sampled_from(list(FIELDS.values())).flatmap(
        lambda f: st.tuples(st.just(f.name), _values(f.type, f.metadata.get("choices")))
    )

    def flags(pairs: st.SearchStrategy) -> st.SearchStrategy[list[str]]:
        """--name value or --name=value."""
        return st.tuples(pairs, st.booleans()).map(
            lambda p: [f"--{p[0][0]}={p[0][1]}"] if p[1] else [f"--{p[0][0]}", p[0][1]]
        )

    anything = flags(st.tuples(names, value)) | flags(fitting) | value.map(lambda text: [text])
    words = st.lists(flags(fitting), max_size=2) | st.lists(anything, max_size=4)
    case = st.tuples(st.sampled_from(STAGES), words.map(lambda lists: sum(lists, [])))

    def read(case: tuple[str, list[str]]) -> str:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                check_config(resolve(parse(*case)))
        except InputError as error:
            assert str(error).isprintable(), "what would steer a terminal"
            return str(error)
        except SystemExit as stop:  # argparse's way to end; --help is no error
            assert (stop.code, out.getvalue()) == (2, "") or (stop.code, err.getvalue()) == (0, "")
            return err.getvalue() or "help"
        return ""

    return case, read


def _values(kind: str, choices: tuple | None) -> st.SearchStrategy[str]:
    """What a parameter may well be."""
    numbers = {"int": st.integers(1, 50), "float": st.floats(0.01, 0.9)}
    return (numbers.get(kind) or st.sampled_from(choices or ("digits", "0.1", "a/b"))).map(str)


def check_config(found: Config) -> None:
    """What resolve promises of every value."""
    for name, f in FIELDS.items():
        value, bounds = getattr(found, name), f.metadata
        assert type(value).__name__ == f.type or (f.type, type(value)) == ("float", int), name
        assert f.type != "float" or math.isfinite(value), name
        assert value in bounds.get("choices", [value]), name
        assert bounds.get("at_least", value) <= value <= bounds.get("at_most", value), name


# -- the image loader ------------------------------------------------------------------------------


def images(folder: Path) -> tuple[st.SearchStrategy, Callable[[Any], str]]:
    """Small files of every format with some bytes changed; of PNG, with checksums that fit again."""
    files = _examples()
    case = st.sampled_from(range(len(files))).flatmap(
        lambda i: st.tuples(st.just(i), changes(len(files[i])), st.booleans())
    )

    def read(case: tuple) -> str:
        number, edits, mend = case
        content = changed(files[number], edits)
        content = _mended(content) if mend else content
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, PIXELS // 2
        try:
            pixels = read_image(content, SIDE)
        except InputError as error:
            return str(error)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
        return ""

    return case, read


def _examples() -> list[bytes]:
    """One small file for each format and mode that it can hold."""
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    image, files = Image.fromarray(values), []
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError):
                source = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
                extra = {"exif": exif} if name in ("PNG", "JPEG", "WEBP") else {}
                source.save(file, name, **extra)
                files.append(file.getvalue())
    moving = io.BytesIO()
    image.save(moving, "GIF", save_all=True, append_images=[image.rotate(90)])
    return [*files, moving.getvalue()]


def _mended(content: bytes) -> bytes:
    """A PNG whose checksums are those of its chunks, as far as they can be told apart."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = content[:8], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        if len(body) < 4 + length:
            break
        out += content[at : at + 4] + body + zlib.crc32(body).to_bytes(4)
        at += 12 + length
    return out + content[at:]


TARGETS = {"load_scores": scores, "config": config, "images": images}
