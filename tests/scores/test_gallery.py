"""Pictures of scored examples, as a notebook shows them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from image_folders import write_classes
from PIL import Image

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.errors import InputError
from attribution.scores.artifact import Scores


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scores, ImageData]:
    """Scores of a folder of images, and its data."""
    monkeypatch.setenv("TRAK_ABLATION_CACHE", str(tmp_path / "cache"))
    write_classes(tmp_path / "images", {"cat": 5, "a <b>": 5})
    config = resolve({"dataset": str(tmp_path / "images"), "image_size": 8})
    data = load_data(config)
    train, targets = data.table("train"), data.table("validation")
    values = np.random.default_rng(0).normal(size=(len(train), len(targets))).astype(np.float32)
    metadata = {"data": config.group("data"), "data_fingerprint": data.fingerprint}
    return Scores(values, train, targets, metadata), data


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_pictures_are_those_of_the_examples_with_their_scores(scored) -> None:
    scores, data = scored
    top = scores.top(0, 3)
    shown = scores.show(top)
    assert repr(shown) == "<3 pictures, which a notebook shows>"
    page = shown._repr_html_()
    rows = data.rows("train")[top["position"]]
    for found, row in zip(pictures(page), rows, strict=True):
        np.testing.assert_array_equal(found, data.pixels()[row])
    for example_id, score in zip(top["example_id"], top["score"]):
        assert f"{example_id}<br>{score:+.3g}" in page
    assert "<b>" not in page


def test_examples_and_targets_are_shown_by_id_in_the_order_asked(scored) -> None:
    scores, data = scored
    ids = [scores.targets["example_id"][1], scores.train["example_id"][2]]
    found = pictures(scores.show(ids).page)
    own = data.examples["example_id"].tolist()
    for image, example_id in zip(found, ids, strict=True):
        np.testing.assert_array_equal(image, data.pixels()[own.index(example_id)])
    with pytest.raises(InputError, match="example_id=nobody: was not scored"):
        scores.show(["nobody"])


def test_another_data_set_is_refused(scored, tmp_path: Path) -> None:
    scores, _ = scored
    next((tmp_path / "images" / "cat").iterdir()).unlink()
    with pytest.raises(InputError, match="has changed since these scores were made"):
        scores.show(scores.top(0, 1))
    old = Scores(scores.values, scores.train, pd.DataFrame(scores.targets), {})
    with pytest.raises(InputError, match="make them again"):
        old.show(scores.top(0, 1))
