"""Pictures of scored examples, for a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import resolve
from attribution.data.dataset import load_data
from attribution.data.thumbnails import picture
from attribution.errors import InputError


@dataclass(frozen=True)
class Gallery:
    """Pictures with captions, which a notebook shows.

    Attributes:
        page: HTML that needs no other file.
        count: of the pictures.
    """

    page: str
    count: int

    def __repr__(self) -> str:
        return f"<{self.count} pictures, which a notebook shows>"

    def _repr_html_(self) -> str:
        return self.page


def gallery(table: pd.DataFrame, metadata: Mapping[str, Any]) -> Gallery:
    """The pictures of the examples in a table, from the data set that was scored.

    Args:
        table: with the columns example_id and label_name, perhaps score.
        metadata: of the score artifact.

    Raises:
        InputError: the data set cannot be read, or has changed since it was scored.
    """
    if "data" not in metadata:
        raise InputError("scores: do not say of which data set they are; make them again with trak")
    config = resolve(metadata["data"])
    data = load_data(config)
    if data.fingerprint != metadata["data_fingerprint"]:
        raise InputError(f"dataset={config.dataset}: has changed since these scores were made")
    rows = {example_id: row for row, example_id in enumerate(data.examples["example_id"])}
    pixels, tiles = data.pixels(), []
    for example in table.to_dict("records"):
        score = f"<br>{example['score']:+.3g}" if "score" in example else ""
        texts = (html.escape(str(example[name])) for name in ("label_name", "example_id"))
        image = picture(np.array(pixels[rows[example["example_id"]]]))
        tiles.append(
            '<figure style="display:inline-block;margin:4px;width:132px;font-size:small">'
            f'<img src="{image}" width="128" alt=""><figcaption>{"<br>".join(texts)}{score}'
            "</figcaption></figure>"
        )
    return Gallery("".join(tiles), len(tiles))
