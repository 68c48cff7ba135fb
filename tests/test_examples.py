"""The worked example: the tables and the figure of a small score artifact, and refused input."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from attribution.runtime.npy_blocks import write_matrix
from attribution.scores.artifact import Scores, load_scores, write_scores

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "analysis.py"
NAMES = np.array(["cost $1 or $2", "b", "c"])


def table(labels: np.ndarray, prefix: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "position": np.arange(len(labels)),
            "example_id": [f"{prefix}{i}" for i in range(len(labels))],
            "label": labels,
            "label_name": NAMES[labels],
            "loss": np.random.default_rng(1).exponential(size=len(labels)),
        }
    )


def write(folder: Path, flipped: bool) -> Path:
    """40 examples and 9 targets; with `flipped`, the first four examples lower every margin."""
    values = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
    is_flipped = np.arange(40) < 4
    if flipped:
        values[is_flipped] -= 10
    train = table(np.arange(40) % 3, "a").assign(
        alignment=values.mean(1, np.float64),
        row_weight=1.0,
        trust=values.mean(1, np.float64),
        self_influence=1.0,
    )
    if flipped:
        train = train.assign(is_flipped=is_flipped, true_label=(train["label"] + is_flipped) % 3)
    matrix = folder.with_name(f"{folder.name}.npy")
    write_matrix(matrix, [values], values.shape)
    write_scores(folder, matrix, Scores(values, train, table(np.arange(9) % 3, "b"), {}))
    return folder


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def run(example, *argv: str | Path) -> None:
    example.main([str(arg) for arg in argv])


@pytest.mark.slow
def test_it_runs_as_a_newcomer_types_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "scores", flipped=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, "--out", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "40 training examples, 9 targets" in done.stdout
    assert "the 4 labels flipped on purpose" in done.stdout
    assert plt.imread(tmp_path / "out" / "analysis.png").ndim == 3
    assert len(pd.read_csv(tmp_path / "out" / "by_class.csv")) == 3


def test_without_known_flips_it_says_so(example, tmp_path: Path, capsys) -> None:
    example.report(load_scores(write(tmp_path / "scores", flipped=False)))
    assert "no label is known to be flipped" in capsys.readouterr().out


@pytest.mark.parametrize("flipped", [True, False])
def test_the_figure_is_drawn_with_and_without_known_flips(
    example, tmp_path: Path, flipped: bool
) -> None:
    example.draw(load_scores(write(tmp_path / "scores", flipped)), tmp_path / "out.png")
    assert plt.imread(tmp_path / "out.png").ndim == 3


def test_the_extremes_are_those_of_the_tables(example, tmp_path: Path, capsys) -> None:
    scores = load_scores(write(tmp_path / "scores", flipped=True))
    example.report(scores)
    sections = capsys.readouterr().out.split("\n\n")
    (harmful,) = (s for s in sections if s.startswith("most harmful"))
    order = np.argsort(scores.train["alignment"], kind="stable")
    assert [line.split()[1] for line in harmful.splitlines()[2:]] == [f"a{i}" for i in order[:10]]


def test_the_class_matrix_is_the_mean_of_its_scores(example, tmp_path: Path) -> None:
    scores = load_scores(write(tmp_path / "scores", flipped=True))
    matrix = example.class_matrix(scores)
    for row in NAMES:
        for column in NAMES:
            own = [
                float(scores.values[i, j])
                for i in range(40)
                for j in range(9)
                if scores.train["label_name"][i] == row
                and scores.targets["label_name"][j] == column
            ]
            assert matrix.loc[row, column] == pytest.approx(sum(own) / len(own), rel=1e-6)


def test_shares_of_harm_are_of_the_negative_alignments(example, tmp_path: Path) -> None:
    scores = load_scores(write(tmp_path / "scores", flipped=True))
    found, train = example.by_class(scores), scores.train
    total = -sum(a for a in train["alignment"] if a < 0)
    for name in NAMES:
        own = [a for a, label in zip(train["alignment"], train["label_name"]) if label == name]
        assert found.loc[name, "examples"] == len(own)
        assert found.loc[name, "negative"] == pytest.approx(sum(a < 0 for a in own) / len(own))
        harm = -sum(a for a in own if a < 0)
        assert found.loc[name, "share_of_harm"] == pytest.approx(harm / total)


def test_flips_that_lower_every_margin_are_all_found(example, tmp_path: Path) -> None:
    scores = load_scores(write(tmp_path / "scores", flipped=True))
    found = example.flips(scores.train)
    assert found.loc["alignment", "auroc"] == 1
    assert found.loc["alignment", "recall_10pct"] == 1


def test_alignment_against_loss_by_hand(example) -> None:
    train = pd.DataFrame({"alignment": np.arange(20.0), "loss": -np.arange(20.0)})
    assert example.against_loss(train) == pytest.approx((-1, 1))
    assert example.against_loss(train.assign(loss=np.arange(20.0))) == pytest.approx((1, 0))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "no such folder, and not a run id"),
        ("0" * 32, "no such run"),
        (".", "metadata.json"),
    ],
)
def test_bad_input_is_one_line(
    example, new_place, source: str, words: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    with new_place("examples").active(), pytest.raises(SystemExit) as caught:
        run(example, source)
    told = capfd.readouterr()
    assert caught.value.code == 2 and told.out == ""
    lines = [line for line in told.err.splitlines() if " INFO " not in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: scores={source}: ")
    assert words in lines[0]


def test_an_out_that_is_a_file_is_refused_in_one_line(example, tmp_path: Path, capsys) -> None:
    folder = write(tmp_path / "scores", flipped=False)
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit):
        run(example, folder, "--out", tmp_path / "out")
    assert capsys.readouterr().err.startswith(f"error: out={tmp_path / 'out'}: cannot be written")


def test_a_run_that_was_built_on_scores_leads_to_them(example, new_place) -> None:
    import mlflow

    def finished_run(**tags: str) -> str:
        with mlflow.start_run(tags=tags) as found:
            return found.info.run_id

    with new_place("examples").active():
        scored = finished_run()
        built = finished_run(trak_run_id=scored)
        again = finished_run(reused_run_id=built)
        for run_id in (scored, built, again):
            assert example.find(run_id) == f"runs:/{scored}/scores"
