"""Fixtures of the data tests: a folder of images, loading, counted decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from image_folders import NAMES, png, write_classes

from attribution.config import resolve
from attribution.data import decoding, sources
from attribution.data.dataset import ImageData, load_data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_classes(tmp_path / "images", {"cat": 10, "dog": 15})
    return tmp_path / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in a folder `images`, without labels."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (tmp_path / "set" / "images" / f"{name}.png").write_bytes(png(i))
    return tmp_path / "set"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ImageData]:
    def run(dataset: str | Path, **given) -> ImageData:
        given = {"image_size": 8, "cache_dir": str(tmp_path / "cache"), **given}
        return load_data(resolve({"dataset": str(dataset), **given}))

    return run


@pytest.fixture
def decodes(monkeypatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(sources, "MANY", 1 << 30)  # calls in forks would not be counted
    original = decoding.decode_image
    monkeypatch.setattr(decoding, "decode_image", lambda *a: (calls.append(1), original(*a))[1])
    return calls
