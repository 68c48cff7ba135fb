"""Tables for the terminal: the comparison of arms, the evaluation of methods, explanations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attribution.errors import printable
from attribution.experiments.arms import trial_name
from attribution.experiments.metrics import METRICS
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.statistics import detectable_effect, seeds_needed
from attribution.experiments.verdicts import headline_of, judged_metrics, verdict
from attribution.reporting import answer

WIDTH = 134  # columns of a log file or a pipe


def print_comparison(
    table: pd.DataFrame, about_metric: str = "", contrasts: Sequence[str] = ()
) -> None:
    """Print what each arm is, the comparison with a verdict for each, and the answer in words.

    Args:
        about_metric: why the headline is not accuracy, if so; the other metrics are then shown too.
        contrasts: lines on arm against arm.
    """
    arms = list(dict.fromkeys(table["arm"]))
    width = max(map(len, arms))
    _say("The arms, each one way to choose training examples:")
    for arm in arms:
        _say(f"  {arm:<{width}}  {ARM_SPECS[arm].about}")
    if about_metric:
        print()
        _say(about_metric)
    _print_judged(table, f"{int(table['n_seeds'].iloc[0])} paired seeds")
    if about_metric:
        _print("Other test metrics, means over seeds", *other_metrics(table))
    for sentence in (*answer.warnings(table), *answer.sentences(table), *contrasts, power(table)):
        if sentence:
            _say(sentence)
    print()


def print_splits(
    table: pd.DataFrame, rows: pd.DataFrame, about_metric: str = "", contrasts: Sequence[str] = ()
) -> None:
    """Print the summary of several splits, each split's difference from random, and the answer in words.

    Args:
        table, rows: of replication.summary and by_split.
        about_metric: why the headline is not accuracy, if so.
        contrasts: lines on arm against arm.
    """
    headline = headline_of(table)
    _print_judged(table, f"{int(table['n_splits'].iloc[0])} splits of the data")
    for metric in judged_metrics(headline):
        if f"{metric}_vs_random" in rows:
            wide = rows.pivot(index="trial", columns="data_seed", values=f"{metric}_vs_random")
            wide = wide.loc[list(rows["trial"].unique())].dropna()
            _say(f"Test {METRICS[metric].words} against random removal, by data_seed")
            texts = [[trial, *(f"{x:+z.4f}" for x in row)] for trial, row in wide.T.items()]
            _print("", ["arm", *map(str, wide)], texts)
    for sentence in filter(None, (about_metric, answer.short(table), *contrasts)):
        _say(sentence)


def _say(sentence: str) -> None:
    """Print a sentence as it is: rich would read brackets as markup."""
    console = _console()
    console.print(Text(printable(sentence)), soft_wrap=not console.is_terminal)


def _print_judged(table: pd.DataFrame, over: str) -> None:
    """Print the verdicts on each metric that has some."""
    for metric in judged_metrics(headline_of(table)):
        if f"{metric}_mean" in table:
            title = f"Test {METRICS[metric].words} over {over}, 95 % intervals"
            _print_verdicts(title, metric, table)


def other_metrics(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the means that have no verdicts."""
    judged = judged_metrics(headline_of(table))
    names = [name for name in METRICS if name not in judged and f"{name}_mean" in table]
    rows = [
        [trial_name(row["arm"], row["action"], row["frac"])]
        + [f"{row[f'{name}_mean']:.4f}" for name in names]
        for _, row in table.iterrows()
    ]
    return ["arm", *(METRICS[name].words for name in names)], rows


def _print_verdicts(title: str, metric: str, table: pd.DataFrame) -> None:
    """Print a comparison; a terminal that is too narrow for a table gets two lines for each row."""
    headers = ["arm", "frac", "removed", METRICS[metric].words, "vs random", "p (Holm)", "verdict"]
    rows = [cells(row, metric) for _, row in table.iterrows()]
    widths = [max(map(len, texts)) for texts in zip(headers, *rows, strict=True)]
    if sum(widths) + 3 * len(widths) + 1 <= _console().width:
        _print(title, headers, rows)
        return
    print(f"{title}\n")
    names = [trial_name(row["arm"], row["action"], row["frac"]) for _, row in table.iterrows()]
    width = max(map(len, names))
    for name, texts in zip(["arm", *names], [headers, *rows], strict=True):
        print(f"{name:<{width}}  {texts[3]:>{widths[3]}}  {texts[4]:>{widths[4]}}".rstrip())
        print("    " + ", ".join(filter(None, (texts[6], texts[5]))))
    print()


def _console() -> Console:
    """A console that does not break lines in a log or a pipe."""
    console = Console()
    return Console(width=None if console.is_terminal else max(console.width, WIDTH))


def _print(title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
    """Print a table: some columns hold words, the others hold figures."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        is_text = column in (columns[0], "example", "verdict", "")
        side: Literal["left", "right"] = "left" if is_text else "right"
        # In a narrow terminal words are cut off, figures are not.
        width = None if is_text else max((len(row[i]) for row in rows), default=0)
        shown.add_column(column, justify=side, no_wrap=bool(column), min_width=width)
    for row in rows:
        # Text: rich would read a name in brackets as markup.
        shown.add_row(*(Text(printable(text)) for text in row))
    _console().print(shown)


def print_evaluation(table: pd.DataFrame) -> None:
    """Print how well each method predicts retrained models and finds flips, with intervals."""
    columns = "method", "LDS", "of ceiling", "slope", "AUROC of flips", "AP", "first 10 %", "20 %"
    ceiling = table["noise_ceiling"].iloc[0]
    known = f"noise ceiling of LDS {ceiling:.3f}" if pd.notna(ceiling) else "one model on each"
    title = f"Methods against retrained subsets ({known}), 95 % intervals"
    rows = [
        [
            row["method"],
            interval(row, "lds", ".3f"),
            share_of_ceiling(row),
            interval(row, "calibration_slope", ".2f"),
            interval(row, "auroc", ".4f"),
            figure(row, "average_precision", ".3f"),
            figure(row, "recall_10pct", ".3f"),
            figure(row, "recall_20pct", ".3f"),
        ]
        for _, row in table.iterrows()
    ]
    _print(title, columns, rows)


def print_brittleness(table: pd.DataFrame) -> None:
    """Print how predictions change without the examples that support them most."""
    first = table.iloc[0]
    title = (
        f"{first['targets']} targets, each retrained without {first['k']} examples, 95 % intervals"
    )
    rows = [
        [row["removed"], interval(row, "flipped", ".2f"), interval(row, "margin_change", "+.2f")]
        for _, row in table.iterrows()
    ]
    _print(title, ("removed", "predictions flipped", "change of the margin"), rows)


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
    _print("Training examples that raised or lowered the margin of each label most", columns, rows)
    for line in explanation_lines(table):
        _say(line)


def explanation_lines(table: pd.DataFrame) -> list[str]:
    """What stands beside each prediction: agreement, the strongest effect, and warnings.

    Args:
        table: explanation.csv.
    """
    lines = []
    for row in table.drop_duplicates("explained").itertuples():
        lines += [f"{row.explained}: {each}" for each in (row.agreement, row.effect) if each]
        lines += [f"warning: {row.explained}: {each}" for each in row.warnings.splitlines()]
    return lines


def figure(row: pd.Series, name: str, form: str) -> str:
    """A figure as text; empty if the row does not have it."""
    return f"{row[name]:{form}}" if name in row and pd.notna(row[name]) else ""


def interval(row: pd.Series, name: str, form: str) -> str:
    """A figure with its interval, '0.574 [0.547, 0.589]'; empty if the row does not have it."""
    mean, low, high = (figure(row, f"{name}{end}", form) for end in ("", "_ci_low", "_ci_high"))
    return f"{mean} [{low}, {high}]" if mean else ""


def share_of_ceiling(row: pd.Series) -> str:
    """A method's LDS as a percentage of the noise ceiling; empty if that is unknown."""
    share = row["lds_share_of_ceiling"]
    return f"{100 * share:.0f} %" if pd.notna(share) else ""


def power(table: pd.DataFrame) -> str:
    """The change that this many seeds can detect, and how many the largest unclear one needs.

    Empty if nothing was compared, or all seeds gave each arm the same difference.
    """
    metric = headline_of(table)
    versus = f"{metric}_vs_random"
    rows = table[table[versus].notna()]
    if rows.empty or not rows[f"{versus}_detectable"].max() > 0:
        return ""
    seeds, detectable = int(table["n_seeds"].iloc[0]), rows[f"{versus}_detectable"]
    words = METRICS[metric].words
    text = (
        f"{seeds} seeds can detect {'an' if words[0] == 'a' else 'a'} {words} change of about "
        f"±{detectable.median():.2g} (80 % power)."
    )
    is_unclear = [verdict(row) == "indistinguishable from random" for _, row in rows.iterrows()]
    unclear = rows[is_unclear]
    if unclear.empty:
        return text
    row = unclear.loc[unclear[versus].abs().idxmax()]
    effect, spread = row[versus], row[f"{versus}_detectable"] / detectable_effect(1, seeds)
    try:
        needed = seeds_needed(effect, spread)
    except ValueError:  # no effect at all
        return text
    name = trial_name(row["arm"], row["action"], row["frac"])
    return (
        f"{text} To confirm {name} at {effect:+.4f} you would need about {needed} seeds: "
        f"--num_seeds {needed}"
    )


def cells(row: pd.Series, metric: str) -> list[str]:
    """The texts of one row of the comparison, for one metric."""
    versus = f"{metric}_vs_random"
    compared = pd.notna(row[versus])
    return [
        trial_name(row["arm"], row["action"]),
        f"{100 * row['frac']:.3g} %",
        str(int(row["n_removed"])),
        f"{row[f'{metric}_mean']:.4f} {_spread(row, f'{metric}_mean', metric)}",
        f"{row[versus]:+z.4f} {_spread(row, versus, versus)}" if compared else "",
        f"{row[f'{versus}_p_holm']:.2g}" if compared else "",
        verdict(row, metric),
    ]


def _spread(row: pd.Series, mean: str, stem: str) -> str:
    """Half the interval's width, or its ends if one was cut off at what a metric can be."""
    low, high = row[f"{stem}_ci_low"], row[f"{stem}_ci_high"]
    half = max(high - row[mean], row[mean] - low)
    if high - low < 2 * half - 1e-9:
        return "({} to {})".format(
            *(f"{end:.0f}" if abs(end) in (0, 1) else f"{end:.4f}" for end in (low, high))
        )
    return f"± {half:.4f}"
