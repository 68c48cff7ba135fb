"""Small image folders and data sets in Hub format, for tests of the data."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.errors import InputError


def picture(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def write_classes(folder: Path, counts: dict[str, int], first: int = 0) -> int:
    """Class subfolders with that many different images; returns the next unused seed."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            (folder / name / f"{first}.png").write_bytes(png(first))
            first += 1
    return first


def hub_dataset(first: int, counts: list[int], labels: bool = True) -> Any:
    import datasets

    ids = [label for label, count in enumerate(counts) for _ in range(count)]
    images = [{"bytes": png(first + i), "path": f"{first + i}.png"} for i in range(len(ids))]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["pizza", "apple"])
    )
    columns = {"image": images, "label": ids if labels else [-1] * len(ids)}
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(folder: Path, **parts) -> Path:
    for name, part in parts.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def with_column(first: int, counts: list[int], **columns: Callable[[int], Any]) -> Any:
    """A data set whose row of image i has column(i)."""
    part = hub_dataset(first, counts)
    for name, value in columns.items():
        part = part.add_column(name, [value(first + i) for i in range(sum(counts))])
    return part


def camera(i: int) -> str:
    return "abc"[(i * i) % 7 % 3] + str(i)


def sizes(loaded: ImageData) -> list[int]:
    return [len(loaded.rows(split)) for split in SPLITS]


def fails(load, dataset, *words: str, **given) -> None:
    with pytest.raises(InputError) as caught:
        load(dataset, **given)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


NAMES = [f"im{i:02d}" for i in range(12)]  # of the fixture `folder`
LABELS = ["cat", "dog", "emu"] * 4


def labels_of(loaded: ImageData) -> dict[str, str]:
    examples = loaded.examples
    return {Path(f).stem: name for f, name in zip(examples["file_name"], examples["label_name"])}
