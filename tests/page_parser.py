"""HTML pages as trees that tests can read."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

VOID = {"meta", "img", "br", "line", "circle", "input", "link", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Any] = field(default_factory=list)  # elements and texts

    @property
    def text(self) -> str:
        parts = [c if isinstance(c, str) else c.text for c in self.children]
        return " ".join("".join(parts).replace("\xa0", " ").split())

    def all(self, tag: str = "") -> list[Element]:
        """Elements inside, in order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += ([child] if tag in ("", child.tag) else []) + child.all(tag)
        return found


class Parser(HTMLParser):
    """A tree of the page; a tag that is not closed where it should be is an error."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} with an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(page: str) -> Element:
    """The tree of a page that is whole, runs nothing, and needs no other file."""
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert [element.tag for element in parser.open] == ["page"], "not all is closed"
    tree = parser.open[0]
    allowed = {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table"),
        *("tr", "th", "td", "img", "svg", "line", "circle", "figure", "figcaption", "br", "b", "i"),
        *("ul", "li", "code", "details", "summary", "span"),
    }
    for element in tree.all():
        assert element.tag in allowed, element.tag
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("href", "xlink:href", "srcset")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
    for style in tree.all("style"):
        assert "url(" not in style.text and "@import" not in style.text
    assert "://" not in re.sub(r"base64,[^\"]*", "", page)
    return tree


def image_of(element: Element) -> np.ndarray:
    content = base64.b64decode(element.attributes["src"].split(",", 1)[1], validate=True)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def rows_of(table: Element) -> list[list[str]]:
    return [[c.text for c in row.children if isinstance(c, Element)] for row in table.all("tr")]


def after(tree: Element, heading: str) -> list[Element]:
    """What stands between a heading of level 2 and the next."""
    (body,) = tree.all("body")
    elements = [child for child in body.children if isinstance(child, Element)]
    (start,) = [i for i, e in enumerate(elements) if e.tag == "h2" and e.text == heading]
    end = next((i for i in range(start + 1, len(elements)) if elements[i].tag == "h2"), None)
    return elements[start + 1 : end]


def tables_after(tree: Element, heading: str) -> list[list[list[str]]]:
    return [rows_of(t) for element in after(tree, heading) for t in element.all("table")]
