"""Figures: training curves, galleries of examples, the comparison of arms, the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from attribution.data.dataset import ImageData
from attribution.experiments.arms import trial_name
from attribution.experiments.comparison import BETTER, WORSE, verdict
from attribution.scores.artifact import Scores
from attribution.scores.explanation import Explanation

DPI = 110
HELPFUL, HARMFUL, NEUTRAL = "#1b7837", "#b2182b", "#4d4d4d"
VERDICTS = {BETTER: "#0060a8", WORSE: "#b44a00"}  # blue and orange: told apart by nearly everybody


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path, dpi=DPI)


def training_curves(histories: Sequence[list[dict[str, float]]]) -> Figure:
    """Loss and validation accuracy of every checkpoint by epoch."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for history in histories:
        epochs = [epoch["epoch"] + 1 for epoch in history]
        for name, colour in (("train_loss", NEUTRAL), ("validation_log_loss", HARMFUL)):
            left.plot(epochs, [epoch[name] for epoch in history], color=colour, alpha=0.5)
        accuracy = [epoch["validation_accuracy"] for epoch in history]
        right.plot(epochs, accuracy, color=HELPFUL, alpha=0.5)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="epoch", ylabel="loss (nats)", title="training (grey), validation (red)")
    right.set(xlabel="epoch", ylabel="accuracy", title="validation accuracy")
    return figure


@dataclass(frozen=True)
class _Tile:
    """An image with its caption and the colour of both caption and frame."""

    image: np.ndarray
    caption: str
    colour: str


def _gallery(lines: Sequence[Sequence[_Tile | None]], title: str) -> Figure:
    """Rows of tiles; None leaves a place empty."""
    # One pair of axes for all tiles: one for each tile takes four times as long.
    width, height = 1.15 * max([6, *map(len, lines)]), 1.4 * max(1, len(lines))  # inches
    figure = Figure(figsize=(width, height + 0.3))
    axes = figure.add_axes((0, 0, 1, height / (height + 0.3)))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    places = [(x, y, tile) for y, line in enumerate(lines) for x, tile in enumerate(line) if tile]
    for x, y, tile in places:
        left, top = 1.15 * x + 0.1, 1.4 * y + 0.35
        axes.imshow(tile.image, extent=(left, left + 0.95, top + 0.95, top))
        look: dict[str, Any] = {"color": tile.colour, "clip_on": False}
        axes.add_patch(Rectangle((left, top), 0.95, 0.95, fill=False, linewidth=2, **look))
        text = left + 0.475, top - 0.05, _plain(tile.caption)
        axes.text(*text, fontsize=7, ha="center", va="bottom", **look)
    figure.suptitle(_plain(title), fontsize=9)
    return figure


def _tiles(data: ImageData, table: pd.DataFrame, column: str, colour: str = "") -> list[_Tile]:
    """Training examples with the values of a column; without a colour, flipped ones are red."""
    pixels, train, tiles = data.pixels(), data.rows("train"), []
    for row in table.itertuples():
        flipped = " (flipped)" if row.is_flipped else ""
        caption = f"{row.label_name}{flipped}\n{getattr(row, column):+.3g}"
        own = colour or (HARMFUL if flipped else NEUTRAL)
        tiles.append(_Tile(pixels[train[row.position]], caption, own))
    return tiles


def _plain(text: str) -> str:
    """Escape dollar signs, which start a formula in matplotlib."""
    return text.replace("$", r"\$")


def score_gallery(data: ImageData, scores: Scores, targets: int = 6, k: int = 4) -> Figure:
    """The most helpful and most harmful examples of some targets of different classes."""
    chosen = list(scores.targets.groupby("label").head(1).head(targets).index)
    shown = scores.select(chosen)
    pixels, validation, lines = data.pixels(), data.rows("validation"), []
    for i, target in enumerate(chosen):
        name = f"target\n{shown.targets['label_name'][i]}"
        line: list[_Tile | None] = [_Tile(pixels[validation[target]], name, NEUTRAL)]
        for rows, colour in ((shown.top(i, k), HELPFUL), (shown.bottom(i, k), HARMFUL)):
            line += [*_tiles(data, rows, "score", colour), *[None] * (k - len(rows))]
        lines.append(line)
    return _gallery(lines, "green: raises the target's margin, red: lowers it")


def explanation(data: ImageData, found: Explanation) -> Figure:
    """A prediction, with the examples that raised (above) and lowered (below) its margin."""
    own = f"{found.predicted} {found.probability:.2f}"
    if not found.is_right:
        own += f"\n({found.label} {found.label_probability:.2f})"
    first = _Tile(found.pixels, own, HELPFUL if found.is_right else HARMFUL)
    lines: list[list[_Tile | None]] = [
        [first, *_tiles(data, found.helpful, "score", HELPFUL)],
        [None, *_tiles(data, found.harmful, "score", HARMFUL)],
    ]
    title = f"{found.name}: green raised the margin of {found.label}, red lowered it"
    return _gallery(lines, title)


def removed_gallery(
    data: ImageData, removed: pd.DataFrame, title: str, order: tuple[str, bool], limit: int = 48
) -> Figure:
    """The removed examples in the arm's own order; a red frame marks a known flip.

    Args:
        order: the column that the arm ranks by, and whether the first is the lowest.
    """
    column, rises = order
    shown = removed.sort_values(column, ascending=rises, kind="stable").head(limit)
    tiles = _tiles(data, shown, column)
    lines = [tiles[i : i + 12] for i in range(0, len(tiles), 12)]
    more = f", the first {limit} of {len(removed)}" if len(removed) > limit else ""
    return _gallery(lines, f"removed by {title}{more}; label and {column.replace('_', ' ')}")


def comparison(table: pd.DataFrame) -> Figure:
    """Left: mean test accuracy of each trial. Right: its paired difference from random removal."""
    names = [trial_name(row.arm, row.action, row.frac) for row in table.itertuples()]
    y = np.arange(len(table))[::-1]
    # MLflow shows it in full size in a run's description, beside two panels of its own.
    figure = Figure(figsize=(7.5, 1.3 + 0.38 * len(table)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _intervals(left, table, y, "accuracy_mean", "accuracy")
    _intervals(right, table, y, "accuracy_vs_random", "accuracy_vs_random")
    right.axvline(0, color=NEUTRAL, linewidth=0.8)
    left.set_yticks(y, [_plain(name) for name in names])
    left.set(xlabel="test accuracy\n(mean, 95 % interval over seeds)")
    words = "difference from random (paired, 95 %)\nblue: better, orange: worse"
    right.set(xlabel=words)
    return figure


def removal_curves(table: pd.DataFrame) -> Figure:
    """Mean test accuracy of each arm by the share that it acts on, with 95 % intervals."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    none = table[table["arm"] == "none"].iloc[0]
    axes.axhline(none["accuracy_mean"], color=NEUTRAL, linewidth=0.8, label="none")
    axes.axhspan(none["accuracy_ci_low"], none["accuracy_ci_high"], color=NEUTRAL, alpha=0.12)
    colours = matplotlib.colormaps["tab20"](range(20))
    acted = table[table["n_removed"] > 0]
    lines = list(acted.groupby(["arm", "action"], sort=False))
    apart = float(np.ptp(100 * acted["frac"])) / 200 if len(acted) else 0.0  # of error bars
    for i, ((arm, action), rows) in enumerate(lines):
        rows = rows.sort_values("frac")
        mean = rows["accuracy_mean"]
        errors = mean - rows["accuracy_ci_low"], rows["accuracy_ci_high"] - mean
        shares = 100 * rows["frac"] + (i - len(lines) / 2) * apart
        axes.errorbar(
            shares, mean, errors, marker="o", markersize=4, capsize=2, linewidth=1.2,
            color=colours[i % len(colours)], linestyle="--" if action == "relabel" else "-",
            label=trial_name(arm, action),
        )  # fmt: skip
    axes.set(xlabel="% of the training set acted on", ylabel="test accuracy (mean, 95 % interval)")
    axes.legend(fontsize=7, ncols=2)
    return figure


def _intervals(axes: Axes, table: pd.DataFrame, y: np.ndarray, mean: str, stem: str) -> None:
    low, high = table[f"{stem}_ci_low"], table[f"{stem}_ci_high"]
    for i, (_, row) in enumerate(table.iterrows()):
        colour = VERDICTS.get(verdict(row), NEUTRAL)
        axes.plot([low.iloc[i], high.iloc[i]], [y[i], y[i]], color=colour, linewidth=2)
        axes.plot(table[mean].iloc[i], y[i], "o", color=colour)


def evaluation(table: pd.DataFrame, brittle: pd.DataFrame | None) -> Figure:
    """Each method's LDS, its AUROC for planted flips, and how far it made margins fall."""
    panels = [("lds", "linear datamodeling score (LDS)")]
    if "auroc" in table:
        panels.append(("auroc", "AUROC for planted flips"))
    count = len(panels) + (brittle is not None)
    figure = Figure(figsize=(4.6 * count, 1.4 + 0.32 * len(table)), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)
    for axes, (name, label) in zip(grid[0], panels, strict=False):
        _bars(axes, table[table[name].notna()], "method", name, label)
    ceiling = table["noise_ceiling"].iloc[0]
    if np.isfinite(ceiling):
        grid[0][0].axvline(ceiling, color=NEUTRAL, linestyle="--", linewidth=1)
        grid[0][0].set_title("dashed: noise ceiling", fontsize=8)
    if brittle is not None:
        label = f"change of the margin without {brittle['k'].iloc[0]} examples"
        _bars(grid[0][-1], brittle, "removed", "margin_change", label)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, name: str, figure: str, label: str) -> None:
    y = np.arange(len(rows))[::-1]
    errors = rows[figure] - rows[f"{figure}_ci_low"], rows[f"{figure}_ci_high"] - rows[figure]
    axes.barh(y, rows[figure], xerr=np.maximum(errors, 0), color=NEUTRAL, alpha=0.6, capsize=2)
    axes.set_yticks(y, [_plain(text) for text in rows[name]])
    axes.set(xlabel=label)
