"""Pages escape every text and embed every image."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from page_parser import parsed

from attribution.reporting import html as pages


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_is_escaped(text: str) -> None:
    tile = {"image": "data:image/png;base64,", "label": text, "true": text, "value": text,
            "title": text, "tone": ""}  # fmt: skip
    each = {
        "name": text, "label": text, "predicted": text, "is_right": False, "probability": 0.5,
        "label_probability": 0.5, "agreement": text, "effect": text, "measured": "", "warnings": [text],
        "pixels": "",
    }  # fmt: skip
    given = {"explanations": [(each, [tile], [])], "picture": "data:image/png;base64,".format}
    tree = parsed(pages.render("explanation", **given, run_ids={text: text}))
    figure = tree.all("figure")[1]
    assert figure.attributes["title"] == text and figure.all("img")[0].attributes["alt"] == text
