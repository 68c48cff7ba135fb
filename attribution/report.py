"""The comparison in words and figures, for a terminal."""

from __future__ import annotations

import pandas as pd

from attribution.comparison import JUDGED, verdict
from attribution.statistics import detectable_effect, seeds_needed


def print_comparison(table: pd.DataFrame) -> None:
    """Print the comparison table with intervals, adjusted p-values and a verdict for each arm."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A fixed width where there is no terminal, so that a log or a pipe gets whole lines.
    console = Console()
    console = Console(width=None if console.is_terminal else max(console.width, 134))
    seeds = int(table["n_seeds"].iloc[0])
    for metric in JUDGED:
        if f"{metric}_mean" not in table:
            continue
        name = metric.replace("_", " ")
        shown = Table(
            title=f"Test {name} over {seeds} paired seeds, 95 % intervals",
            box=box.SIMPLE_HEAD,
            title_justify="left",
        )
        for column in ("arm", "frac", "removed", name, "vs random", "p (Holm)", ""):
            side = "left" if column in ("arm", "") else "right"
            shown.add_column(column, justify=side, no_wrap=bool(column))
        for _, row in table.iterrows():
            shown.add_row(*_cells(row, metric))
        console.print(shown)
    console.print(power(table), soft_wrap=True, highlight=False)


def power(table: pd.DataFrame) -> str:
    """What the run could have seen, and how many seeds its largest and smallest differences need."""
    rows = table[table["accuracy_vs_random"].notna()]
    if rows.empty:
        return ""
    seeds = int(table["n_seeds"].iloc[0])
    detectable = rows["accuracy_vs_random_detectable"]
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
        if effect and spread:
            text += (
                f" Were {effect:+.4f} of {row['arm']} {row['frac']:.3g} its true effect, "
                f"{seeds_needed(effect, spread)} seeds would show it."
            )
    return text


def _cells(row: pd.Series, metric: str) -> list[str]:
    versus = f"{metric}_vs_random"
    compared = pd.notna(row[versus])
    return [
        str(row["arm"]) + " relabelled" * (row["action"] == "relabel"),
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
