"""What a score artifact says: its extreme examples, who harms whom, and alignment beside loss.

    python examples/analysis.py RUN_ID_OR_FOLDER [--out FOLDER]

RUN_ID is a run of trak, or of ablation or evaluate, which name theirs; FOLDER holds scores.npy and
its tables. Tables are printed; analysis.png and by_class.csv are written to --out. Nothing is trained.
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

# So that it runs from a checkout that is not installed.
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
    """Parse, read, print, draw; bad input is one line and exit code 2."""
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
    """What load_scores takes, for a folder, a run's id, or an address such as runs:/ID/scores.

    Raises:
        InputError: it is none of them, or there is no such run.
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
    """Print everything that a terminal can show."""
    train, targets = scores.train, scores.targets
    n, m = scores.values.shape
    print(f"{n} training examples, {m} targets (validation examples); {SIGN}")

    by_alignment = train.sort_values("alignment", kind="stable")
    columns = SHOWN + [c for c in ("is_flipped", "true_label") if c in train]
    _print("most harmful on the whole", by_alignment[columns].head(10))
    _print("most helpful on the whole", by_alignment[columns].iloc[::-1].head(10))
    print(f"\n{(train['alignment'] < 0).mean():.1%} of the examples have a negative alignment")

    worst = int(targets["loss"].to_numpy().argmax())
    name = f"target {worst} ({targets['label_name'][worst]}), the one with the highest loss"
    _print(f"what lowers the margin of {name}", scores.bottom(worst, 5)[["score", *SHOWN[:2]]])
    _print(f"what raises the margin of {name}", scores.top(worst, 5)[["score", *SHOWN[:2]]])

    correlation, shared = beside_loss(train)
    print(
        f"\nalignment beside loss: Spearman {correlation:+.2f}; of the most harmful tenth "
        f"{shared:.0%} are in the tenth of the highest loss"
    )
    _print("harm by class of the training example", by_class(scores))
    found = flips(train)
    if len(found):
        _print(f"the {train['is_flipped'].sum()} labels flipped on purpose, as ranked by", found)
    else:
        print("\nno label is known to be flipped, so that no ranking can be judged by it")


def beside_loss(train: pd.DataFrame) -> tuple[float, float]:
    """Spearman's correlation of alignment and loss, and the overlap of the two most suspect tenths."""
    tenth = max(1, len(train) // 10)
    harmful = train["alignment"].nsmallest(tenth).index
    lossy = train["loss"].nlargest(tenth).index
    correlation = train["alignment"].corr(train["loss"], method="spearman")
    return float(correlation), len(harmful.intersection(lossy)) / tenth


def by_class(scores: Scores) -> pd.DataFrame:
    """One row a class of training examples: how many, how they align, and their share of all harm."""
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
    """How well each ranking finds the flips: AUROC, average precision, recall; empty without flips."""
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
    """Alignment's distribution, alignment beside loss, who harms whom, and harm by class."""
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
    """Names that matplotlib draws as they are: a dollar sign would start a formula."""
    return [str(name).replace("$", r"\$") for name in names]


def _print(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(float_format='{:.4g}'.format)}")


if __name__ == "__main__":
    main()
