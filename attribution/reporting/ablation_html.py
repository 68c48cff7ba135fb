"""report.html: the comparison as one page, whose words follow its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.experiments.arms import Trial, trial_name
from attribution.experiments.comparison import CONTROLS, JUDGED, Comparison, verdict
from attribution.reporting import html, terminal

GALLERY = 24  # examples shown of an arm
CLASSES = 30  # at most; of more those with the largest differences are shown
TONES = {"better than random": "good", "worse than random": "bad"}
VAGUE = ("not significant after Holm", "indistinguishable from random")
# What an arm's examples are shown in the order of, where that is not rising alignment.
ORDER = {
    "harmful": ("trust", True),
    "harmful_loss": ("trust", True),
    "helpful": ("alignment", False),
    "loss": ("loss", False),
    "confident": ("label_quality", True),
    "self_influence": ("self_influence", False),
}


@dataclass(frozen=True)
class Report:
    """What the page is made of.

    Attributes:
        comparison: the result of the ablation stage.
        figures: files of the figures 'comparison' and, if more than one share was tried, 'curves'.
        quality: the table of `evaluate` for the same scores, if there is one.
        run_ids: of this run and of those that it was built on, by name ('trak run').
        versions: from machine.hardware.
    """

    config: Config
    data: ImageData
    comparison: Comparison
    figures: dict[str, Path]
    quality: pd.DataFrame | None
    run_ids: dict[str, str]
    versions: dict[str, Any]


def page(report: Report) -> str:
    """The whole page."""
    config, data, table = report.config, report.data, report.comparison.table
    embedded = {name: html.embedded(path.read_bytes()) for name, path in report.figures.items()}
    return html.render(
        "report",
        dataset=Path(config.dataset).name,
        sentences=sentences(config, data, table),
        comparisons=[_comparison(table, m) for m in JUDGED if f"{m}_mean" in table],
        power=terminal.power(table),
        figure=embedded["comparison"],
        curves=embedded.get("curves"),
        classes=_classes(report.comparison.per_class),
        arms=_arms(data, report.comparison),
        quality=_quality(report.quality) if report.quality is not None else None,
        run_ids=report.run_ids,
        settings=config.group("data", "training", "finetune", "trak", "ablation"),
        versions=report.versions,
        n_seeds=int(table["n_seeds"].iloc[0]),
        n_test=len(data.rows("test")),
    )


def sentences(config: Config, data: ImageData, table: pd.DataFrame) -> list[str]:
    """What was done, and what came of it, in three sentences."""
    n = {split: f"{len(data.rows(split)):,}" for split in ("train", "validation", "test")}
    share = f"{100 * config.subset_fraction:.3g} %"
    flips = int(data.table("train")["is_flipped"].sum())
    planted = f", {flips} of whose labels were flipped on purpose" if flips else ""
    seeds = int(table["n_seeds"].iloc[0])
    judged = table[~table["arm"].isin(CONTROLS) & (table["n_removed"] > 0)]
    acted = {"remove": "removed", "relabel": "relabelled", "both": "removed or relabelled"}
    return [
        f"{config.num_models} models ({Path(config.model).name}) were trained on {share} each of "
        f"{n['train']} training images of {len(data.class_names)} classes{planted}, and TRAK scored "
        f"every image for its effect on {n['validation']} validation images.",
        f"What each arm chose was {acted[config.action]}, the model was trained again under {seeds} "
        f"paired seeds, and its accuracy was read on {n['test']} test images that no choice had seen.",
        _finding(judged),
    ]


def _finding(judged: pd.DataFrame) -> str:
    found: dict[str, list[str]] = {}
    for _, row in judged.iterrows():
        name = trial_name(row["arm"], row["action"], row["frac"])
        difference = f"{name} ({100 * row['accuracy_vs_random']:+.2f} points)"
        found.setdefault(verdict(row), []).append(difference)
    if not found:
        return "No arm was compared."
    parts = [
        f"{words}: {', '.join(found.get(words, ['none']))}"
        for words in (*TONES, *VAGUE)
        if words in found or words == "better than random"
    ]
    return f"In test accuracy, against random choice of as many: {'; '.join(parts)}."


def _comparison(table: pd.DataFrame, metric: str) -> dict[str, Any]:
    versus, rows = f"{metric}_vs_random", []
    for _, row in table.iterrows():
        words, is_compared = verdict(row, metric), pd.notna(row[versus])
        low, high = row[f"{versus}_ci_low"], row[f"{versus}_ci_high"]
        rows.append(
            {
                "name": trial_name(row["arm"], row["action"]),
                "frac": row["frac"],
                "count": int(row["n_removed"]),
                "mean": row[f"{metric}_mean"],
                "half": (row[f"{metric}_ci_high"] - row[f"{metric}_ci_low"]) / 2,
                "difference": row[versus] if is_compared else None,
                "difference_half": (high - low) / 2,
                "low": low,
                "high": high,
                "p": row[f"{versus}_p_holm"],
                "verdict": words,
                "tone": TONES.get(words, ""),
            }
        )
    ends = table[[f"{versus}_ci_low", f"{versus}_ci_high"]].abs().max().max()
    scale = float(ends) if ends > 0 else 1.0
    return {"metric": metric.replace("_", " "), "rows": rows, "scale": scale}


def _classes(table: pd.DataFrame) -> dict[str, Any]:
    stem = "accuracy_vs_random"
    low, mean, high = (100 * table[name] for name in (f"{stem}_ci_low", stem, f"{stem}_ci_high"))
    table = table.assign(
        name=[trial_name(r.arm, r.action, r.frac) for r in table.itertuples()],
        mean=mean,
        half=(high - low) / 2,
        # Seeds that all agree, as few may, give no interval.
        excludes=((low > 0) | (high < 0)) & (low < high),
    )
    largest = mean.abs().groupby(table["label_name"]).max().sort_values(ascending=False)
    shown, groups = set(largest.index[:CLASSES]), table.groupby("label_name", sort=False)
    rows = [
        {
            "label": label,
            "n_test": int(part["n_test"].iloc[0]),
            "cells": part[["mean", "half", "excludes"]].to_dict("records"),
        }
        for label, part in groups
        if label in shown
    ]
    return {
        "columns": next((list(part["name"]) for _, part in groups), []),
        "rows": rows,
        "count": len(table),
        "by_chance": round(0.05 * len(table)),
        "excluding": int(table["excludes"].sum()),
        "left_out": len(largest) > CLASSES,
    }


def _arms(data: ImageData, comparison: Comparison) -> list[dict[str, Any]]:
    """The counts of every trial, and one gallery for each arm: a larger share begins with the same."""
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
    removed, metrics = comparison.removed(trial), comparison.removal_metrics(trial)
    value, rises = ORDER.get(trial.arm, ("alignment", True))
    count = GALLERY if with_gallery else 0
    shown = removed.sort_values(value, ascending=rises, kind="stable").head(count)
    per_class = {
        name.removeprefix("removed/"): mean
        for name, mean in metrics.items()
        if name.startswith("removed/")
    }
    return {
        "name": trial.name,
        "count": round(sum(per_class.values())),
        "different": len(removed),  # more than count, where every seed has a draw of its own
        "value": value.replace("_", " "),
        "precision": metrics.get("flips_precision"),
        "recall": metrics.get("flips_recall"),
        "per_class": sorted(per_class.items(), key=lambda item: -item[1]),
        "tiles": html.tiles(data, shown, value),
    }


def _quality(table: pd.DataFrame) -> dict[str, Any]:
    ceiling, rows = table["noise_ceiling"].iloc[0], []
    for _, row in table.iterrows():
        share = row["lds_share_of_ceiling"]
        rows.append(
            {
                "method": row["method"],
                "lds": terminal.interval(row, "lds", ".3f"),
                "share": f"{100 * share:.0f} %" if pd.notna(share) else "",
                "auroc": terminal.interval(row, "auroc", ".3f"),
            }
        )
    known = f" A noise ceiling of {ceiling:.3f} is about the most that any method could reach."
    sentence = (
        "LDS is the rank correlation between what scores predict for models trained on random "
        "subsets and what those models did, the mean over validation images, with a 95 % interval."
    )
    return {"rows": rows, "sentence": sentence + (known if np.isfinite(ceiling) else "")}
