"""The comparison in words and figures, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import pandas as pd

from attribution.errors import printable
from attribution.experiments.arms import trial_name
from attribution.experiments.comparison import JUDGED, verdict
from attribution.experiments.statistics import detectable_effect, seeds_needed

if TYPE_CHECKING:
    from rich.console import Console


def print_comparison(table: pd.DataFrame) -> None:
    """Print the comparison table with intervals, adjusted p-values and a verdict for each arm."""
    console = _console()
    seeds = int(table["n_seeds"].iloc[0])
    for metric in JUDGED:
        if f"{metric}_mean" not in table:
            continue
        name = metric.replace("_", " ")
        columns = "arm", "frac", "removed", name, "vs random", "p (Holm)", ""
        title = f"Test {name} over {seeds} paired seeds, 95 % intervals"
        _print(console, title, columns, [_cells(row, metric) for _, row in table.iterrows()])
    console.print(power(table), soft_wrap=True, highlight=False)


def _console() -> Console:
    """A fixed width where there is no terminal, so that a log or a pipe gets whole lines."""
    from rich.console import Console

    console = Console()
    return Console(width=None if console.is_terminal else max(console.width, 134))


def _print(console: Console, title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """A table whose first and last columns are words and whose others are figures."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        side: Literal["left", "right"] = (
            "left" if column in (columns[0], "example", "") else "right"
        )
        # Where a table is too wide words give way, and figures do not.
        width = max((len(row[i]) for row in rows), default=0) if side == "right" else None
        shown.add_column(column, justify=side, no_wrap=bool(column), min_width=width)
    for row in rows:
        # A name in brackets is no markup, and one with control characters steers no terminal.
        shown.add_row(*(Text(printable(text)) for text in row))
    console.print(shown)


def print_evaluation(table: pd.DataFrame) -> None:
    """Print what each method is worth, with intervals."""
    columns = "method", "LDS", "of ceiling", "slope", "AUROC of flips", "AP", "first 10 %", "20 %"
    ceiling = table["noise_ceiling"].iloc[0]
    known = f"noise ceiling of LDS {ceiling:.3f}" if pd.notna(ceiling) else "one model on each"
    title = f"Methods against retrained subsets ({known}), 95 % intervals"
    rows = []
    for _, row in table.iterrows():
        share = row["lds_share_of_ceiling"]
        rows.append(
            [
                row["method"],
                interval(row, "lds", ".3f"),
                f"{100 * share:.0f} %" if pd.notna(share) else "",
                interval(row, "calibration_slope", ".2f"),
                interval(row, "auroc", ".4f"),
                _figure(row, "average_precision", ".3f"),
                _figure(row, "recall_10pct", ".3f"),
                _figure(row, "recall_20pct", ".3f"),
            ]
        )
    _print(_console(), title, columns, rows)


def print_brittleness(table: pd.DataFrame) -> None:
    """Print what removing the most supporting examples of single targets did to them."""
    first = table.iloc[0]
    title = (
        f"{first['targets']} targets, each retrained without {first['k']} examples, 95 % intervals"
    )
    rows = [
        [row["removed"], interval(row, "flipped", ".2f"), interval(row, "margin_change", "+.2f")]
        for _, row in table.iterrows()
    ]
    _print(_console(), title, ("removed", "predictions flipped", "change of the margin"), rows)


def print_explanations(table: pd.DataFrame) -> None:
    """Print the three strongest training examples for and against each prediction."""
    columns = "explained", "predicted", "examples that", "score", "example", "label", ""
    rows, before = [], None
    for _, row in table[table["rank"] <= 3].iterrows():
        is_new, before = row["explained"] != before, row["explained"]
        side = {"helpful": "raised it", "harmful": "lowered it"}[row["side"]]
        rows.append(
            [
                f"{row['explained']}: {row['explained_label']}" if is_new else "",
                f"{row['predicted']} {row['probability']:.2f}" if is_new else "",
                side if row["rank"] == 1 else "",
                f"{row['score']:+.3g}",
                row["file_name"] or row["example_id"],
                row["label_name"],
                "flipped" if row["is_flipped"] else "",
            ]
        )
    title = "What raised, and what lowered, the margin of each label most"
    _print(_console(), title, columns, rows)


def _figure(row: pd.Series, name: str, form: str) -> str:
    return f"{row[name]:{form}}" if name in row and pd.notna(row[name]) else ""


def interval(row: pd.Series, name: str, form: str) -> str:
    """A figure with its interval, '0.574 [0.547, 0.589]'; empty where there is none."""
    if not _figure(row, name, form):
        return ""
    low, high = (_figure(row, f"{name}_ci_{end}", form) for end in ("low", "high"))
    return f"{_figure(row, name, form)} [{low}, {high}]"


def power(table: pd.DataFrame) -> str:
    """What the run could have seen, and how many seeds its largest unclear difference needs."""
    rows = table[table["accuracy_vs_random"].notna()]
    if rows.empty:
        return ""
    seeds = int(table["n_seeds"].iloc[0])
    detectable = rows["accuracy_vs_random_detectable"]
    if not detectable.max() > 0:
        return (
            f"All {seeds} seeds gave each arm the same difference from random: no power is known."
        )
    text = (
        f"With {seeds} seeds a difference from random of {detectable.median():.4f} (median over arms; "
        f"{detectable.min():.4f} to {detectable.max():.4f}) is found with 80 % power, before Holm."
    )
    unclear = [row for _, row in rows.iterrows() if verdict(row) == "indistinguishable from random"]
    if unclear:
        row = max(unclear, key=lambda row: abs(row["accuracy_vs_random"]))
        effect, spread = (
            row["accuracy_vs_random"],
            detectable[row.name] / detectable_effect(1, seeds),
        )
        with suppress(ValueError):  # an effect of zero
            text += (
                f" Were {effect:+.4f} of {row['arm']} {row['frac']:.3g} its true effect, "
                f"{seeds_needed(effect, spread)} seeds would show it."
            )
    return text


def _cells(row: pd.Series, metric: str) -> list[str]:
    versus = f"{metric}_vs_random"
    compared = pd.notna(row[versus])
    return [
        trial_name(row["arm"], row["action"]),
        f"{100 * row['frac']:.3g} %",
        str(int(row["n_removed"])),
        f"{row[f'{metric}_mean']:.4f} {_half_width(row, metric)}",
        f"{row[versus]:+.4f} {_half_width(row, versus)}" if compared else "",
        f"{row[f'{versus}_p_holm']:.2g}" if compared else "",
        verdict(row, metric),
    ]


def _half_width(row: pd.Series, name: str) -> str:
    """Student's t intervals are symmetric, so one number says both ends."""
    return f"± {(row[f'{name}_ci_high'] - row[f'{name}_ci_low']) / 2:.4f}"
