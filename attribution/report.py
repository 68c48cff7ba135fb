"""The comparison in words and figures, for a terminal."""

from __future__ import annotations

import pandas as pd

from attribution.comparison import verdict


def print_comparison(table: pd.DataFrame) -> None:
    """Print the comparison table with intervals, adjusted p-values and a verdict for each arm."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    seeds = int(table["n_seeds"].iloc[0])
    shown = Table(
        title=f"Test accuracy over {seeds} paired seeds, 95 % intervals",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for column in ("arm", "frac", "removed", "accuracy", "vs random", "p (Holm)", ""):
        side = "left" if column in ("arm", "") else "right"
        shown.add_column(column, justify=side, no_wrap=bool(column))
    for _, row in table.iterrows():
        shown.add_row(*_cells(row))
    # A fixed width where there is no terminal, so that a log or a pipe gets whole lines.
    console = Console()
    Console(width=max(console.width, 120) if not console.is_terminal else None).print(shown)


def _cells(row: pd.Series) -> list[str]:
    compared = pd.notna(row["accuracy_vs_random"])
    return [
        str(row["arm"]),
        f"{100 * row['frac']:.3g} %",
        str(int(row["n_removed"])),
        f"{row['accuracy_mean']:.4f} {_half_width(row, 'accuracy')}",
        f"{row['accuracy_vs_random']:+.4f} {_half_width(row, 'accuracy_vs_random')}"
        if compared
        else "",
        f"{row['accuracy_vs_random_p_holm']:.2g}" if compared else "",
        verdict(row),
    ]


def _half_width(row: pd.Series, name: str) -> str:
    """Student's t intervals are symmetric, so one number says both ends."""
    return f"± {(row[f'{name}_ci_high'] - row[f'{name}_ci_low']) / 2:.4f}"
