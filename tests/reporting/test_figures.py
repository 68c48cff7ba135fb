"""What the figures show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from made_comparison import GROUPS, MORE, only, table_of
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
    step = np.ptp(100 * table.loc[table["n_removed"] > 0, "frac"]) / 100
    np.testing.assert_allclose(curves["harmful"][:, 0], expected[:, 0], atol=step * len(curves) / 2)
    assert len({curve[0, 0] for curve in curves.values()}) == len(curves)
    assert curves["oracle relabelled"].shape == (1, 2)


def test_removal_curves_have_a_panel_for_the_worst_group_where_groups_are_known() -> None:
    table = table_of(MORE, GROUPS)
    axes = figures.removal_curves(table).axes
    for panel, metric in zip(axes, ("accuracy", "worst_group_accuracy"), strict=True):
        curves = {c.get_label(): c.lines[0].get_xydata()[:, 1] for c in panel.containers}
        for arm in ("harmful", "loss"):
            expected = table.loc[table["arm"] == arm, f"{metric}_mean"]
            np.testing.assert_allclose(curves[arm], expected)


def test_removal_curves_of_baselines_and_of_an_arm_that_removes_nothing(tmp_path: Path) -> None:
    nothing = only() | {("negative", 0, "remove"): MORE["none", 0, "remove"]}
    figures.save(figures.removal_curves(table_of(nothing)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_error_bars_at_one_share_stand_side_by_side() -> None:
    one = {key: value for key, value in MORE.items() if key[1] in (0, 4)}
    (axes,) = figures.removal_curves(table_of(one)).axes
    places = [container.lines[0].get_xydata()[0, 0] for container in axes.containers]
    assert len(set(places)) == len(places) == 5 and np.allclose(places, 10, atol=1)


def test_each_random_arm_is_paired_with_the_arms_that_it_is_the_control_of() -> None:
    upper, _ = figures.comparison(table_of(MORE)).axes
    names = [label.get_text() for label in upper.get_yticklabels()]
    assert names == [
        "none", "random 0.1, control of:", "harmful 0.1", "loss 0.1", "random 0.2, control of:",
        "harmful 0.2", "loss 0.2", "random 0.1 relabelled, control of:", "oracle 0.1 relabelled",
    ]  # fmt: skip
    # The marker says the verdict too, not its colour alone.
    markers = {
        names[int(line.get_ydata()[0])]: line for line in upper.lines if line.get_marker() in "^vo"
    }
    assert markers["harmful 0.1"].get_marker() == "^" and markers["loss 0.1"].get_marker() == "o"


def test_no_figure_is_wider_than_a_phone_shows_legibly() -> None:
    """Text of 8 points is 8 pixels high at 390 pixels if the figure is 390 / 72 inches wide."""
    table = table_of(MORE)
    history = [
        {"epoch": 0, "train_loss": 1.0, "validation_log_loss": 1.0, "validation_accuracy": 0.5}
    ]
    for figure in (
        figures.comparison(table), figures.removal_curves(table), figures.training_curves([history]),
    ):  # fmt: skip
        assert figure.get_figwidth() <= 390 / 72
