"""Hostile input, drawn by hypothesis: documented refusals, and nothing else (benchmarks/fuzz.py)."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

import benchmarks.__main__ as benchmark
from benchmarks import fuzz


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_but_documented_refusals_comes_out(target: str) -> None:
    found = fuzz.fuzz(target, 600, root=1)
    assert not found.undocumented
    assert found.cases == 600
    assert found.accepted > 30  # both ways through are tried
    assert len(found.refusals) > 10


def test_the_same_seed_draws_the_same_cases() -> None:
    first, again, other = (fuzz.fuzz("config", 100, root) for root in (2, 2, 3))
    assert (first.accepted, first.refusals) == (again.accepted, again.refusals)
    assert first.refusals != other.refusals


def raising(*_: object) -> None:
    raise KeyError("planted")


def wrong(*_: object) -> np.ndarray:
    return np.zeros((1, 1, 3), np.uint8)


@pytest.mark.parametrize(
    ("target", "name", "broken", "says"),
    [
        ("load_scores", "load_scores", raising, "KeyError"),
        ("config", "resolve", raising, "KeyError"),
        ("images", "read_image", raising, "KeyError"),
        ("images", "read_image", wrong, "AssertionError"),
    ],
)
def test_an_undocumented_exception_or_a_wrong_result_fails_the_command(
    monkeypatch, capsys, target, name, broken, says
) -> None:
    monkeypatch.setattr(fuzz, name, broken)
    monkeypatch.setattr(sys, "argv", ["", "fuzz", "--cases", "50", "--targets", target])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 1
    assert f"{target}: {says}" in capsys.readouterr().err


def test_a_mended_png_has_checksums_that_fit() -> None:
    file = io.BytesIO()
    Image.new("L", (5, 5), 7).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[19] = 4  # the width's last byte
    with pytest.raises((SyntaxError, OSError)):
        Image.open(io.BytesIO(content)).load()
    assert Image.open(io.BytesIO(fuzz._mended(bytes(content)))).size == (4, 5)
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(fuzz._mended(b"no PNG")))


@pytest.mark.parametrize(
    ("edit", "becomes"),
    [
        (("set", 1, b"xy"), b"axyd"),
        (("insert", 1, b"xy"), b"axybcd"),
        (("delete", 1, b"xy"), b"ad"),
        (("cut", 1, b"x"), b"a"),
        (("repeat", 1, b"x"), b"abcdbcd"),
        (("set", 6, b"z"), b"azcd"),  # positions go round
    ],
)
def test_edits(edit: tuple, becomes: bytes) -> None:
    assert fuzz.changed(b"abcd", [edit]) == becomes
