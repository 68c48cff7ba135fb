"""report.html: the comparison of arms as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.data.thumbnails import embedded
from attribution.experiments.arms import Trial, removal_metrics, removed_table, trial_name
from attribution.experiments.comparison import Comparison
from attribution.experiments.metrics import METRICS, headline
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.outcome import ACTED
from attribution.experiments.verdicts import (
    BETTER,
    CONTROLS,
    WORSE,
    headline_of,
    judged_metrics,
    verdict,
)
from attribution.reporting import answer, html, terminal

GALLERY = 24  # examples shown for each arm
CLASSES = 30  # classes shown: those with the largest differences
TONES = {BETTER: "good", WORSE: "bad"}


def page(
    config: Config,
    data: ImageData,
    comparison: Comparison,
    folder: Path,
    runs: dict[str, tuple[str, str]],
    versions: dict[str, Any],
) -> str:
    """The whole page as HTML.

    Args:
        folder: with the figures comparison.png and curves.png.
        runs: this run and those that it builds on, by name ('trak run'): the id, and the address on the
            tracking server, which is empty without one.
        versions: from machine.hardware.
    """
    table = comparison.table
    metric = headline_of(table)
    others, means = terminal.other_metrics(table)
    return html.render(
        "report",
        dataset=Path(config.dataset).name,
        answer=answer.sentences(table),
        contrasts=answer.contrasts(comparison.contrasts),
        config=config,
        model=Path(config.model).name,
        flips=int(data.table("train")["is_flipped"].sum()),
        n_classes=len(data.class_names),
        n={split: f"{len(data.rows(split)):,}" for split in SPLITS},
        acted=ACTED.get(config.action, "removed or relabelled"),
        about_metric=headline(config, data.labels("train"), data.class_names)[1],
        warnings=answer.warnings(table),
        comparisons=[_comparison(table, m) for m in judged_metrics(metric) if f"{m}_mean" in table],
        other_metrics=others,
        means=means,
        power=terminal.power(table),
        figure=embedded((folder / "comparison.png").read_bytes()),
        curves=embedded((folder / "curves.png").read_bytes()),
        classes=_classes(comparison.per_class),
        arms=_arms(data, comparison),
        explained={arm: ARM_SPECS[arm].about for arm in table["arm"]},
        runs=runs,
        settings=config.group("data", "training", "finetune", "trak", "ablation"),
        versions=versions,
        n_seeds=int(table["n_seeds"].iloc[0]),
    )


def _comparison(table: pd.DataFrame, metric: str) -> dict[str, Any]:
    """The table of one metric: the texts of each row, and the class of its verdict."""
    rows = [
        {"cells": terminal.cells(row, metric), "tone": TONES.get(verdict(row, metric), "")}
        for _, row in table.iterrows()
    ]
    return {"metric": METRICS[metric].words, "rows": rows}


def _classes(table: pd.DataFrame) -> dict[str, Any]:
    """The table of effects on each class, in percentage points."""
    stem = "accuracy_vs_random"
    low, mean, high = (100 * table[name] for name in (f"{stem}_ci_low", stem, f"{stem}_ci_high"))
    table = table.assign(
        name=[trial_name(r.arm, r.action, r.frac) for r in table.itertuples()],
        mean=mean,
        half=(high - low) / 2,
        # Without a difference between seeds there is no interval.
        excludes=((low > 0) | (high < 0)) & (low < high),
    )
    parts = [part for _, part in table.groupby("label_name", sort=False)]
    largest = np.argsort([-part["mean"].abs().max() for part in parts])[:CLASSES]
    return {
        "columns": [*parts[0]["name"]] if parts else [],
        "rows": [parts[i].to_dict("records") for i in sorted(largest)],
        "left_out": len(parts) > len(largest),
        "count": len(table),
        "by_chance": round(0.05 * len(table)),
        "excluding": int(table["excludes"].sum()),
    }


def _arms(data: ImageData, comparison: Comparison) -> list[dict[str, Any]]:
    """Every trial with its counts; a gallery for the first trial of each arm, since later ones extend it."""
    shown: set[tuple[str, str]] = set()
    found = []
    for outcome in comparison.outcomes:
        trial = outcome.trial
        if trial.arm not in CONTROLS:
            found.append(_arm(data, comparison, trial, (trial.arm, trial.action) not in shown))
            shown.add((trial.arm, trial.action))
    return found


def _arm(
    data: ImageData, comparison: Comparison, trial: Trial, with_gallery: bool
) -> dict[str, Any]:
    """What one trial chose: counts, flips, classes, and a gallery of its first examples."""
    evidence = comparison.evidence
    removed, metrics = removed_table(trial, evidence), removal_metrics(trial, evidence)
    value, rises = ARM_SPECS[trial.arm].order
    count = GALLERY if with_gallery else 0
    shown = removed.sort_values(value, ascending=rises, kind="stable").head(count)
    per_class = removed.groupby("label_name")["seeds"].sum() / len(trial.removed)
    return {
        "name": trial.name,
        "count": trial.size,
        "different": len(removed),  # more than count if each seed drew its own
        "value": value.replace("_", " "),
        "precision": metrics.get("flips_precision"),
        "recall": metrics.get("flips_recall"),
        "per_class": per_class.sort_values(ascending=False, kind="stable"),
        "tiles": html.tiles(data, shown, value),
    }
