"""Pages escape every text and embed every image."""

from __future__ import annotations

import base64
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from page_parser import Element, image_of, parsed
from PIL import Image

from attribution.reporting import html as pages


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_is_escaped(text: str) -> None:
    tile = {"image": "data:image/png;base64,", "label": text, "true": text, "value": text,
            "title": text, "tone": ""}  # fmt: skip
    each = {
        "name": text, "image": "data:image/png;base64,", "label": text, "predicted": text,
        "is_right": False, "probability": 0.5, "label_probability": 0.5, "helpful": [tile],
        "agreement": text, "warnings": [text],
        "harmful": [],
    }  # fmt: skip
    tree = parsed(pages.render("explanation", explanations=[each], run_ids={text: text}))
    figure = tree.all("figure")[1]
    assert figure.attributes["title"] == text and figure.all("img")[0].attributes["alt"] == text


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_a_picture_is_embedded_without_loss(height, width, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    element = Element("img", {"src": pages.picture(pixels)})
    np.testing.assert_array_equal(image_of(element), pixels)


def test_a_large_picture_is_embedded_as_small_as_it_is_shown() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    content = base64.b64decode(pages.picture(pixels).split(",", 1)[1])
    assert max(Image.open(io.BytesIO(content)).size) == pages.SHOWN
