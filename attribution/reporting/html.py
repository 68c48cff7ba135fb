"""HTML pages: each is one file that needs no other, with every text from data escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from attribution.data.dataset import ImageData
from attribution.scores.explanation import Explanation

SHOWN = 128  # pixels: images are embedded no larger, because a page holds a hundred of them
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill in templates/NAME.html."""
    return TEMPLATES.get_template(f"{template}.html").render(**values)


def embedded(content: bytes) -> str:
    """A PNG as a data: address."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(pixels: np.ndarray) -> str:
    """An image, uint8 (h, w, 3), as a data: address, at most SHOWN pixels wide and high."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    image.thumbnail((SHOWN, SHOWN))
    image.save(file, "PNG", optimize=True)
    return embedded(file.getvalue())


def tiles(data: ImageData, table: pd.DataFrame, value: str, tone: str = "") -> list[dict[str, Any]]:
    """Training examples as the gallery of the templates shows them.

    Args:
        table: with position, label_name, is_flipped, true_label.
        value: the column that is shown under the image.
        tone: CSS class of the frame: helpful, harmful, or none.
    """
    pixels, rows = data.pixels(), data.rows("train")
    return [
        {
            "image": picture(np.array(pixels[rows[row["position"]]])),
            "label": row["label_name"],
            "true": data.class_names[row["true_label"]] if row["is_flipped"] else "",
            "value": f"{row[value]:+.3g}",
            "title": row["file_name"] or row["example_id"],
            "tone": tone,
        }
        for _, row in table.iterrows()
    ]


def explanations(data: ImageData, found: Iterable[Explanation], run_ids: dict[str, str]) -> str:
    """The page of the explain stage: every prediction with the examples behind it."""
    shown = [
        {
            "name": each.name,
            "image": picture(each.pixels),
            "label": each.label,
            "predicted": each.predicted,
            "is_right": each.is_right,
            "probability": each.probability,
            "label_probability": each.label_probability,
            "helpful": tiles(data, each.helpful, "score", "helpful"),
            "harmful": tiles(data, each.harmful, "score", "harmful"),
        }
        for each in found
    ]
    return render("explanation", explanations=shown, run_ids=run_ids)
