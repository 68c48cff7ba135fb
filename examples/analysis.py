"""Read a score artifact: the extreme examples, which class harms which, and alignment against loss.

    python examples/analysis.py RUN_ID_OR_FOLDER [--out FOLDER]

RUN_ID is a trak run, or an ablation or evaluate run that was built on one. FOLDER holds scores.npy
and its tables. The script prints tables, and writes analysis.png and by_class.csv to --out. It trains
nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

# Makes the script run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attribution import InputError, Scores, load_scores
from attribution.experiments.statistics import detection
from attribution.runtime.npy_blocks import row_blocks
from attribution.scores.artifact import SIGN

HELPFUL, HARMFUL, NEUTRAL = "#1b7837", "#b2182b", "#4d4d4d"
SHOWN = ["example_id", "label_name", "alignment", "loss", "self_influence"]
# Rankings of suspects: the column, and the sign that makes low = suspect.
RANKINGS = {"trust": 1, "alignment": 1, "loss": -1, "label_quality": 1, "self_influence": -1}


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, print and draw. Bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="RUN_ID_OR_FOLDER")
    parser.add_argument(
        "--out", default="analysis", help="folder for the figure (default: analysis)"
    )
    options = parser.parse_args(argv)
    try:
        scores, out = load_scores(find(options.source)), Path(options.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            report(scores)
            by_class(scores).to_csv(out / "by_class.csv")
            draw(scores, out / "analysis.png")
        except OSError as error:
            raise InputError(f"out={out}: cannot be written ({error.strerror})") from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"\nwritten: {out / 'analysis.png'}, {out / 'by_class.csv'}")


def find(source: str) -> str:
    """Turn a folder, a run id or an address such as runs:/ID/scores into what load_scores takes.

    Raises:
        InputError: it is none of these, or there is no such run.
    """
    if Path(source).is_dir() or ":/" in source:
        return source
    if not re.fullmatch("[0-9a-f]{32}", source):
        raise InputError(f"scores={source}: no such folder, and not a run id (32 hex digits)")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    run_id = source
    try:
        for tag in ("reused_run_id", "trak_run_id"):
            run_id = mlflow.get_run(run_id).data.tags.get(tag, run_id)
    except mlflow.exceptions.MlflowException:
        uri = mlflow.get_tracking_uri()
        raise InputError(f"scores={source}: no such run in {uri}") from None
    return f"runs:/{run_id}/scores"


def report(scores: Scores) -> None:
    """Print the tables."""
    train, targets = scores.train, scores.targets
    n, m = scores.values.shape
    print(f"{n} training examples, {m} targets (validation examples); {SIGN}")

    by_alignment = train.sort_values("alignment", kind="stable")
    columns = SHOWN + [c for c in ("is_flipped", "true_label") if c in train]
    _print("most harmful examples by alignment", by_alignment[columns].head(10))
    _print("most helpful examples by alignment", by_alignment[columns].iloc[::-1].head(10))
    print(f"\n{(train['alignment'] < 0).mean():.1%} of the examples have a negative alignment")

    worst = int(targets["loss"].to_numpy().argmax())
    name = f"target {worst} ({targets['label_name'][worst]}), the one with the highest loss"
    _print(
        f"examples that lower the margin of {name}", scores.bottom(worst, 5)[["score", *SHOWN[:2]]]
    )
    _print(f"examples that raise the margin of {name}", scores.top(worst, 5)[["score", *SHOWN[:2]]])

    correlation, shared = against_loss(train)
    print(
        f"\nalignment and loss: Spearman correlation {correlation:+.2f}; {shared:.0%} of the most "
        "harmful tenth are also in the tenth with the highest loss"
    )
    _print("harm by class of the training examples", by_class(scores))
    found = flips(train)
    if len(found):
        _print(
            f"the {train['is_flipped'].sum()} labels flipped on purpose: how well each ranking finds them",
            found,
        )
    else:
        print("\nno label is known to be flipped, so the rankings cannot be judged")


def against_loss(train: pd.DataFrame) -> tuple[float, float]:
    """Spearman correlation of alignment and loss, and the overlap of their most suspect tenths."""
    tenth = max(1, len(train) // 10)
    harmful = train["alignment"].nsmallest(tenth).index
    lossy = train["loss"].nlargest(tenth).index
    correlation = train["alignment"].corr(train["loss"], method="spearman")
    return float(correlation), len(harmful.intersection(lossy)) / tenth


def by_class(scores: Scores) -> pd.DataFrame:
    """One row per class of the training examples: count, alignment, and share of all harm."""
    train = scores.train.assign(harm=(-scores.train["alignment"]).clip(lower=0))
    table = train.groupby("label_name").agg(
        examples=("alignment", "size"),
        mean_alignment=("alignment", "mean"),
        negative=("alignment", lambda values: (values < 0).mean()),
        harm=("harm", "sum"),
    )
    total = table["harm"].sum()
    table["share_of_harm"] = table.pop("harm") / (total or 1)
    return table


def class_matrix(scores: Scores) -> pd.DataFrame:
    """Mean score of a class's training examples (rows) on a class's targets (columns)."""
    rows, row_names = pd.factorize(scores.train["label_name"], sort=True)
    columns, column_names = pd.factorize(scores.targets["label_name"], sort=True)
    total = np.zeros((len(row_names), len(column_names)))
    start = 0
    for block in row_blocks(scores.values):  # the matrix may be larger than memory
        own = rows[start : start + len(block)]
        sums = np.stack([block[:, columns == c].sum(1, np.float64) for c in range(total.shape[1])])
        np.add.at(total, own, sums.T)
        start += len(block)
    counts = np.outer(np.bincount(rows), np.bincount(columns))
    return pd.DataFrame(total / counts, row_names, column_names)


def flips(train: pd.DataFrame) -> pd.DataFrame:
    """AUROC, average precision and recall of each ranking for the flips; empty without flips."""
    if "is_flipped" not in train:
        return pd.DataFrame()
    is_flipped = train["is_flipped"].to_numpy(bool)
    found = {
        name: detection(is_flipped, sign * train[name].to_numpy(), draws=0)
        for name, sign in RANKINGS.items()
        if name in train
    }
    return pd.DataFrame({name: row for name, row in found.items() if row}).T


def draw(scores: Scores, path: Path) -> None:
    """Draw the distribution of alignment, alignment against loss, harm between classes, and by class."""
    train = scores.train
    flipped = np.zeros(len(train), dtype=bool)
    if "is_flipped" in train:
        flipped = train["is_flipped"].to_numpy(bool)
    kinds = [("label as given", ~flipped, NEUTRAL)]
    if flipped.any():
        kinds.append(("label flipped on purpose", flipped, HARMFUL))
    figure, ((top_left, top_right), (left, right)) = plt.subplots(
        2, 2, figsize=(11, 8.5), constrained_layout=True
    )
    edges = np.histogram_bin_edges(train["alignment"], bins=60)
    for name, chosen, colour in kinds:
        part = train[chosen]
        top_left.hist(part["alignment"], edges, color=colour, alpha=0.6, label=name)
        top_right.scatter(part["alignment"], part["loss"], s=6, color=colour, alpha=0.6)
    for axes in (top_left, top_right):
        axes.axvline(0, color=NEUTRAL, linewidth=0.8)
        axes.set_xlabel("alignment (positive = helpful)")
        axes.locator_params(axis="x", nbins=5)
    top_left.set_ylabel("training examples")
    top_left.legend(fontsize=8)
    top_right.set_ylabel("ensemble loss (nats)")

    matrix = class_matrix(scores)
    most = np.abs(matrix.to_numpy()).max() or 1
    colours = LinearSegmentedColormap.from_list("harm", [HARMFUL, "white", HELPFUL])
    image = left.imshow(matrix, cmap=colours, vmin=-most, vmax=most)
    left.set_xticks(range(matrix.shape[1]), _plain(matrix.columns), rotation=90, fontsize=7)
    left.set_yticks(range(matrix.shape[0]), _plain(matrix.index), fontsize=7)
    left.set(xlabel="class of the target", ylabel="class of the training example")
    left.set_title("mean score (green: raises the margin)", fontsize=9)
    figure.colorbar(image, ax=left, shrink=0.8)

    table = by_class(scores).sort_values("share_of_harm")
    right.barh(_plain(table.index), table["share_of_harm"], color=HARMFUL, alpha=0.7)
    right.tick_params(axis="y", labelsize=7)
    right.set_xlabel("share of all negative alignment")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(names: pd.Index) -> list[str]:
    """Escape names for matplotlib, where a dollar sign starts a formula."""
    return [str(name).replace("$", r"\$") for name in names]


def _print(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(float_format='{:.4g}'.format)}")


if __name__ == "__main__":
    main()
