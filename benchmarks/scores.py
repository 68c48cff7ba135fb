"""Time and memory of scores from features on disk, against the bare matrix products."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from attribution.config import resolve
from attribution.data.splits import TARGETS
from attribution.runtime.npy_blocks import row_slices, write_matrix
from attribution.scores.alignment import group_alignment
from attribution.scores.artifact import Scores, write_scores
from attribution.scores.features import Store
from attribution.scores.trak import score
from benchmarks.common import measure, peak_memory_mib, ratio, reset_peak_memory, summary

LAMBDA_REG, GROUPS = 1.0, 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--n", type=int, default=50_000, help="training examples")
    parser.add_argument("--m", type=int, default=10_000, help="targets")
    parser.add_argument("--k", type=int, default=4096, help="length of the features")
    parser.add_argument("--checkpoints", type=int, default=1)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time three sides in turn, and the peak memory of the third in a process of its own.

    - bare GEMMs and Cholesky: the Gram matrix (n k^2) and the scores (n m k) in float32, one block of
      rows over and over, and one Cholesky factor (k^3 / 3) in float64. No file is read or written.
    - bare solves: the triangular solves of the ridge and of self-influence, also in memory: for m
      targets in float64 (m k^2), for n training examples in float32 (n k^2).
    - scores: the project's path, from feature files to a score artifact with its hash, alignment, and
      the ten most helpful examples of every target.

    `ratio` is to the first side, `ratio_to_both` to the sum of the first two.
    """
    n, m, k = options.n, options.m, options.k
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for model_id in range(options.checkpoints):
            write_features(work, model_id, n, m, k)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            arguments = work, options.checkpoints, options.threads
            peak = pool.submit(peak_of_scores, *arguments).result()
        sides = {
            "bare GEMMs and Cholesky": lambda: bare_products(n, m, k, options.checkpoints),
            "bare solves": lambda: bare_solves(n, m, k, options.checkpoints),
            "scores": lambda: make_scores(work, options.checkpoints),
        }
        seconds = measure(sides, options.repeats, warm_up=0)
    bare, solves, scores = (seconds[side] for side in sides)
    both = statistics.median(bare) + statistics.median(solves)
    setting = f"n {n}, m {m}, k {k}, {options.checkpoints} checkpoints"
    rows = [
        {"setting": setting, "side": side} | summary(values) | {"ratio": ratio(values, bare)}
        for side, values in seconds.items()
    ]
    rows[-1] |= {"ratio_to_both": statistics.median(scores) / both, "peak_mib": peak}
    return rows


def write_features(work: Path, model_id: int, n: int, m: int, k: int) -> None:
    """Write random features and 1 - p of one checkpoint where `trak` would write them."""

    rng = np.random.default_rng(model_id)
    for split, rows in (("train", n), (TARGETS, m)):
        store = _store(work, model_id)
        for file, columns in ((store.features_file(split), k), (store.one_minus_p_file(split), 1)):
            file.parent.mkdir(parents=True, exist_ok=True)
            blocks = (
                rng.random((part.stop - part.start, columns), np.float32) - (columns > 1) / 2
                for part in row_slices(rows, columns)
            )
            write_matrix(file, blocks, (rows, columns))


def _store(work: Path, model_id: int) -> Store:
    return Store(work / f"{model_id:03d}", model_id)


def make_scores(work: Path, checkpoints: int) -> None:
    """Do what `trak` does once it has features, and find the top examples of every target."""

    folder = work / "scores"
    stores = [_store(work, model_id) for model_id in range(checkpoints)]
    for store in stores:  # from the round before
        store.whitened_targets_file.unlink(missing_ok=True)
    (work / "scores.npy").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    k = stores[0].features(TARGETS)[0].shape[1]
    config = resolve({"proj_dim": k, "lambda_reg": LAMBDA_REG, "device": "cpu"})
    found = score(config, stores, work / "scores.npy")
    n, m = found.values.shape
    groups, weights = np.arange(m) % GROUPS, np.full(GROUPS, 1 / GROUPS)
    train = pd.DataFrame(
        {
            "position": np.arange(n),
            "alignment": group_alignment(found.values, groups, weights),
            "self_influence": found.self_influence,
        }
    )
    targets = pd.DataFrame({"position": np.arange(m)})
    write_scores(folder, found.file, Scores(found.values, train, targets, {}))


def peak_of_scores(work: Path, checkpoints: int, threads: int) -> float:
    """Peak resident memory in MiB of make_scores, including imports and mapped files."""
    if threads:
        torch.set_num_threads(threads)
    reset_peak_memory()
    make_scores(work, checkpoints)
    return peak_memory_mib()


def bare_products(n: int, m: int, k: int, checkpoints: int) -> None:
    """The Gram and score products in float32 and a Cholesky factor in float64, without I/O."""
    features, targets = torch.rand(4096, k), torch.rand(m, k)
    gram, scores = torch.empty(k, k), torch.empty(4096, m)
    spd = torch.eye(k, dtype=torch.float64) + 1 / k
    for _ in range(checkpoints):
        for rows in row_slices(n, 1):
            block = features[: rows.stop - rows.start]
            torch.mm(block.T, block, out=gram)
            torch.mm(block, targets.T, out=scores[: len(block)])
        torch.linalg.cholesky(spd)


def bare_solves(n: int, m: int, k: int, checkpoints: int) -> None:
    """Triangular solves: for the targets in float64, for the training examples in float32."""
    for dtype, count in ((torch.float64, m), (torch.float32, n)):
        features = torch.rand(4096, k, dtype=dtype)
        upper = torch.linalg.cholesky(torch.eye(k, dtype=torch.float64) + 1 / k).T.to(dtype)
        for _ in range(checkpoints):
            for rows in row_slices(count, 1):
                block = features[: rows.stop - rows.start]
                torch.linalg.solve_triangular(upper, block, upper=True, left=False)
