"""Figures: training curves, galleries of examples, the comparison of arms, the evaluation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from attribution.data.dataset import ImageData
from attribution.experiments.arms import trial_name
from attribution.experiments.metrics import METRICS
from attribution.experiments.verdicts import BETTER, WORSE, headline_of, judged_metrics, verdict
from attribution.scores.artifact import Scores
from attribution.scores.explanation import Explanation

# A figure is 5 inches wide, so that a phone, which shows it at half its size, shows legible text.
DPI, WIDTH = 150, 5.2
TILES = 4  # in a row of a gallery
# Blue and orange: told apart by nearly everybody. A sign or a word always says the same.
HELPFUL, HARMFUL, NEUTRAL = "#0060a8", "#b44a00", "#4d4d4d"
VERDICTS = {BETTER: HELPFUL, WORSE: HARMFUL}
# Okabe and Ito's colours for all kinds of colour vision; yellow is left out, it is faint on white.
LINES = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
MARKERS = "osD^vP*X"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path, dpi=DPI)


def training_curves(histories: Sequence[list[dict[str, float]]]) -> Figure:
    """Loss and validation accuracy of every checkpoint by epoch."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for table in map(pd.DataFrame, histories):
        epochs = table["epoch"] + 1
        upper.plot(epochs, table["train_loss"], "--", color=NEUTRAL, alpha=0.5)
        upper.plot(epochs, table["validation_log_loss"], color=HARMFUL, alpha=0.5)
        lower.plot(epochs, table["validation_accuracy"], color=HELPFUL, alpha=0.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.set(ylabel="loss (nats)", title="loss: training (dashed), validation (solid)")
    lower.set(xlabel="epoch", ylabel="accuracy", title="validation accuracy")
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
    captions = [_wrapped(tile.caption) for line in lines for tile in line if tile]
    above = 0.13 * max((text.count("\n") + 1 for text in captions), default=1) + 0.12
    step, heading = above + 1.15, 0.17 * (title.count("\n") + 1) + 0.1  # inches
    width, height = 1.3 * max([TILES, *map(len, lines)]), step * max(1, len(lines))
    figure = Figure(figsize=(width, height + heading))
    axes = figure.add_axes((0, 0, 1, height / (height + heading)))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    places = [(x, y, tile) for y, line in enumerate(lines) for x, tile in enumerate(line) if tile]
    for x, y, tile in places:
        left, top = 1.3 * x + 0.1, step * y + above
        axes.imshow(tile.image, extent=(left, left + 1.1, top + 1.1, top))
        look: dict[str, Any] = {"color": tile.colour, "clip_on": False}
        axes.add_patch(Rectangle((left, top), 1.1, 1.1, fill=False, linewidth=2, **look))
        text = left + 0.55, top - 0.05, _plain(_wrapped(tile.caption))
        axes.text(*text, fontsize=8, ha="center", va="bottom", **look)
    figure.text(0.1 / width, 1 - 0.07 / (height + heading), _plain(title), fontsize=9, va="top")
    return figure


def _wrapped(caption: str) -> str:
    """A caption in lines that a tile has room for."""
    return "\n".join(part for line in caption.split("\n") for part in textwrap.wrap(line, 18))


def _rows(tiles: Sequence[_Tile], most: int = TILES) -> list[list[_Tile | None]]:
    return [list(tiles[i : i + most]) for i in range(0, len(tiles), most)]


def _tiles(data: ImageData, table: pd.DataFrame, column: str, colour: str = "") -> list[_Tile]:
    """Training examples with the values of a column; without a colour, flipped ones are orange."""
    pixels, train, tiles = data.pixels(), data.rows("train"), []
    for row in table.itertuples():
        flipped = "\n(flipped)" if row.is_flipped else ""
        caption = f"{row.label_name}{flipped}\n{getattr(row, column):+.3g}"
        own = colour or (HARMFUL if flipped else NEUTRAL)
        tiles.append(_Tile(pixels[train[row.position]], caption, own))
    return tiles


def _plain(text: str) -> str:
    """Escape dollar signs, which start a formula in matplotlib."""
    return text.replace("$", r"\$")


def score_gallery(data: ImageData, scores: Scores, targets: int = 6, k: int = 3) -> Figure:
    """The most helpful and most harmful examples of some targets of different classes."""
    chosen = list(scores.targets.groupby("label").head(1).head(targets).index)
    shown = scores.select(chosen)
    pixels, validation = data.pixels(), data.rows("validation")
    lines: list[list[_Tile | None]] = []
    for i, target in enumerate(chosen):
        name = f"target\n{shown.targets['label_name'][i]}"
        own = _Tile(pixels[validation[target]], name, NEUTRAL)
        lines.append([own, *_tiles(data, shown.top(i, k), "score", HELPFUL)])
        lines.append([None, *_tiles(data, shown.bottom(i, k), "score", HARMFUL)])
    title = "blue (highest scores): raise the target's margin most\norange (lowest): lower it most"
    return _gallery(lines, title)


def explanation(data: ImageData, found: Explanation) -> Figure:
    """A prediction, with the examples that raised (above) and lowered (below) its margin."""
    own = f"{found.predicted} {found.probability:.2f}"
    if not found.is_right:
        own += f"\n({found.label} {found.label_probability:.2f})"
    first = _Tile(found.pixels, own, HELPFUL if found.is_right else HARMFUL)
    sides = [
        _rows(_tiles(data, found.helpful, "score", HELPFUL), TILES - 1) or [[]],
        _rows(_tiles(data, found.harmful, "score", HARMFUL), TILES - 1),
    ]
    lines = [[None, *line] for side in sides for line in side]
    lines[0][0] = first
    about = [
        f"{found.name}: {found.agreement}",
        f"blue (+) raised the margin of {found.label}, orange (-) lowered it",
        *(f"Warning: {line}" for line in found.warnings),
    ]
    return _gallery(lines, "\n".join(part for line in about for part in textwrap.wrap(line, 72)))


def removed_gallery(
    data: ImageData, removed: pd.DataFrame, title: str, order: tuple[str, bool], limit: int = 40
) -> Figure:
    """The removed examples in the arm's own order; orange and a word mark a known flip.

    Args:
        order: the column that the arm ranks by, and whether the first is the lowest.
    """
    column, rises = order
    shown = removed.sort_values(column, ascending=rises, kind="stable").head(limit)
    more = f", the first {limit} of {len(removed)}" if len(removed) > limit else ""
    about = f"removed by {title}{more}\nlabel and {column.replace('_', ' ')}"
    return _gallery(_rows(_tiles(data, shown, column)), about)


def comparison(table: pd.DataFrame) -> Figure:
    """Above: each trial's paired difference from random removal. Below: its mean test metric.

    Each random arm stands above the arms that are compared with it, on one band of grey or white.
    """
    blocks, metric = _with_their_control(table), headline_of(table)
    rows = pd.concat(blocks)
    y = np.arange(len(rows))
    figure = Figure(figsize=(WIDTH, 1.9 + 0.5 * len(rows)), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _intervals(upper, rows, f"{metric}_vs_random", f"{metric}_vs_random")
    _intervals(lower, rows, f"{metric}_mean", metric)
    names = []
    for block in blocks:
        for row in block.itertuples():
            is_control = row.arm == "random" and len(block) > 1
            name = trial_name(row.arm, row.action, row.frac)
            names.append(f"{name}, control of:" if is_control else name)
    for axes in (upper, lower):
        axes.set_yticks(y, [_plain(name) for name in names])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for i, block in enumerate(blocks):
            if i % 2:
                end = sum(map(len, blocks[: i + 1])) - 0.5
                axes.axhspan(end - len(block), end, color=NEUTRAL, alpha=0.08, linewidth=0)
    upper.axvline(0, color=NEUTRAL, linewidth=0.8)
    upper.xaxis.set_major_formatter(lambda x, _: f"{100 * x:+g}" if x else "0")
    upper.set_xlabel(
        "points vs random (95 % interval)\nblue ▲ better, orange ▼ worse\ngrey ● not certain (Holm)"
    )
    lower.set_xlabel(f"test {METRICS[metric].words} (mean, 95 % over seeds)")
    return figure


def _with_their_control(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of a comparison in blocks: the same action on as many examples, random first."""
    keys = list(zip(table["n_removed"], table["action"], strict=True))
    blocks = [table[[each == key for each in keys]] for key in dict.fromkeys(keys)]
    return [
        pd.concat([block[block["arm"] == "random"], block[block["arm"] != "random"]])
        for block in blocks
    ]


def removal_curves(table: pd.DataFrame) -> Figure:
    """Mean of each judged test metric by the share that an arm acts on, with 95 % intervals."""
    metrics = [m for m in judged_metrics(headline_of(table)) if f"{m}_mean" in table]
    figure = Figure(figsize=(WIDTH, 1 + 3.8 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        _curves(axes, table, metric)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _curves(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    none = table[table["arm"] == "none"].iloc[0]
    axes.axhline(none[f"{metric}_mean"], color=NEUTRAL, linewidth=0.8, label="none")
    axes.axhspan(none[f"{metric}_ci_low"], none[f"{metric}_ci_high"], color=NEUTRAL, alpha=0.12)
    acted = table[table["n_removed"] > 0]
    lines = list(acted.groupby(["arm", "action"], sort=False))
    shares = 100 * acted["frac"]
    # Error bars stand side by side, also where all arms have one share.
    apart = float(np.ptp(shares) or shares.max()) / 100 if len(acted) else 0.0
    for i, ((arm, action), rows) in enumerate(lines):
        rows = rows.sort_values("frac")
        mean = rows[f"{metric}_mean"]
        errors = mean - rows[f"{metric}_ci_low"], rows[f"{metric}_ci_high"] - mean
        axes.errorbar(
            100 * rows["frac"] + (i - len(lines) / 2) * apart, mean, errors,
            marker=MARKERS[i % len(MARKERS)], markersize=5, capsize=2, linewidth=1.2,
            color=NEUTRAL if arm == "random" else LINES[i % len(LINES)],
            linestyle="--" if action == "relabel" else "-",
            label=trial_name(arm, action),
        )  # fmt: skip
    label = f"test {METRICS[metric].words}, 95 % interval"
    axes.set(xlabel="% of the training set acted on", ylabel=label)


def _intervals(axes: Axes, table: pd.DataFrame, mean: str, stem: str) -> None:
    """A line from end to end and a marker in each row; the marker's shape says the verdict too."""
    for y, (_, row) in enumerate(table.iterrows()):
        found = verdict(row)
        look: dict[str, Any] = {"color": VERDICTS.get(found, NEUTRAL)}
        axes.plot([row[f"{stem}_ci_low"], row[f"{stem}_ci_high"]], [y, y], linewidth=2, **look)
        axes.plot(row[mean], y, {BETTER: "^", WORSE: "v"}.get(found, "o"), markersize=7, **look)


def evaluation(table: pd.DataFrame, brittle: pd.DataFrame | None) -> Figure:
    """Each method's LDS, its AUROC for planted flips, and how far it made margins fall."""
    panels = [("lds", "linear datamodeling score (LDS)")]
    if "auroc" in table:
        panels.append(("auroc", "AUROC for planted flips"))
    count = len(panels) + (brittle is not None)
    figure = Figure(figsize=(WIDTH, count * (1 + 0.28 * len(table))), layout="constrained")
    grid = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes, (name, label) in zip(grid, panels, strict=False):
        _bars(axes, table[table[name].notna()], "method", name, label)
    ceiling = table["noise_ceiling"].iloc[0]
    if np.isfinite(ceiling):
        grid[0].axvline(ceiling, color=NEUTRAL, linestyle="--", linewidth=1)
        grid[0].set_title("dashed: noise ceiling", fontsize=8)
    if brittle is not None:
        label = f"change of the margin without {brittle['k'].iloc[0]} examples"
        _bars(grid[-1], brittle, "removed", "margin_change", label)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, name: str, figure: str, label: str) -> None:
    y = np.arange(len(rows))[::-1]
    errors = rows[figure] - rows[f"{figure}_ci_low"], rows[f"{figure}_ci_high"] - rows[figure]
    axes.barh(y, rows[figure], xerr=np.maximum(errors, 0), color=NEUTRAL, alpha=0.6, capsize=2)
    axes.set_yticks(y, [_plain(text) for text in rows[name]])
    axes.set(xlabel=label)
