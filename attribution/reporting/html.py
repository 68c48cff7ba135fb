"""HTML pages: each is one file that needs no other, with every text from data escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.data.thumbnails import picture
from attribution.scores.explanation import Explanation

MOST_SUSPECTS = 2000  # on one page
TEMPLATE_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = Environment(
    loader=FileSystemLoader(TEMPLATE_FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill in templates/NAME.html."""
    return TEMPLATES.get_template(f"{template}.html").render(**values)


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
        (
            each,
            tiles(data, each.helpful, "score", "helpful"),
            tiles(data, each.harmful, "score", "harmful"),
        )
        for each in found
    ]
    return render("explanation", explanations=shown, picture=picture, run_ids=run_ids)


def suspects(data: ImageData, table: pd.DataFrame, dataset: str, command: str) -> str:
    """The page on which a person decides about the suspects, and downloads the decisions.

    Args:
        table: suspects.csv.
        dataset: its name.
        command: that trains with the downloaded files.
    """
    pixels, first = data.pixels(), table.head(MOST_SUSPECTS)
    shown = [
        row
        | {
            "name": row["file_name"] or row["example_id"],
            "reasons": row["reasons"].split(", "),
            "image": picture(np.array(pixels[number]), is_one_of_many=True),
        }
        for row, number in zip(first.to_dict("records"), data.rows_of(first), strict=True)
    ]
    script = (TEMPLATE_FOLDER / "suspects.js").read_text(encoding="utf-8")
    examined = pd.concat(map(data.table, SPLITS))
    sha256 = hashlib.sha256(script.encode()).digest()
    return render(
        "suspects",
        dataset=dataset,
        suspects=shown,
        more=max(0, len(table) - MOST_SUSPECTS),
        classes=data.class_names,
        reasons=sorted({reason for each in shown for reason in each["reasons"]}),
        command=command,
        examined="\n".join(examined["example_id"] + "," + examined["split"]),
        script=script,
        # The browser runs this script alone, whatever a name in the data says.
        script_hash=f"sha256-{base64.b64encode(sha256).decode()}",
    )
