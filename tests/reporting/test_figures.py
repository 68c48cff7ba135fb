"""What the figures show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from made_comparison import MORE, only, table_of
from PIL import Image

from attribution.reporting import figures


def test_removal_curves_are_one_line_an_arm_and_action(tmp_path: Path) -> None:
    table = table_of(MORE)
    figure = figures.removal_curves(table)
    figures.save(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert np.ptp(np.asarray(image.convert("L"))) > 100
    (axes,) = figure.axes
    curves = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    assert set(curves) == {"random", "harmful", "loss", "random relabelled", "oracle relabelled"}
    rows = table[(table["arm"] == "harmful")]
    expected = np.column_stack([100 * rows["frac"], rows["accuracy_mean"]])
    np.testing.assert_allclose(curves["harmful"][:, 1], expected[:, 1])
    # Curves stand side by side: each at most half their number of steps from its share.
    step = np.ptp(100 * table.loc[table["n_removed"] > 0, "frac"]) / 200
    np.testing.assert_allclose(curves["harmful"][:, 0], expected[:, 0], atol=step * len(curves) / 2)
    assert len({curve[0, 0] for curve in curves.values()}) == len(curves)
    assert curves["oracle relabelled"].shape == (1, 2)


def test_removal_curves_of_baselines_and_of_an_arm_that_removes_nothing(tmp_path: Path) -> None:
    nothing = only() | {("negative", 0, "remove"): MORE["none", 0, "remove"]}
    figures.save(figures.removal_curves(table_of(nothing)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
