"""Our scores next to those of traker, dattri, captum and kronfluence: quality, seconds and memory."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib.externals.loky import ProcessPoolExecutor

from attribution.config import resolve
from attribution.data.dataset import ImageData, load_data
from attribution.experiments.statistics import detection, lds, noise_ceiling
from attribution.experiments.subset_bank import Bank, build_bank
from attribution.models import classifier, model_facts
from attribution.models.checkpoints import Finetuned, subset_masks, train_checkpoints
from attribution.models.ensemble import Ensemble
from attribution.models.train import training_key
from attribution.runtime.hashing import digest
from attribution.runtime.progress import say
from attribution.scores.alignment import group_alignment, group_ids, group_weights
from benchmarks.common import (
    RESNET18,
    add_cache_dir,
    make_model,
    peak_memory_mib,
    reset_peak_memory,
)
from benchmarks.peer_methods import METHODS, Problem

RESAMPLES = 2000
# All figures are of a CPU, and progress bars would cost time.
QUIET = {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.set_defaults(repeats=3)
    parser.add_argument("--part", choices=("quality", "speed", "both"), default="both")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--limit", type=float, default=600, help="seconds that a method may take")
    quality = parser.add_argument_group("quality: resnet-mini on the digits, a tenth flipped")
    quality.add_argument(
        "--checkpoints", type=int, nargs="+", default=[5], help="on random halves; several: a curve"
    )
    quality.add_argument("--proj_dim", type=int, default=512)
    quality.add_argument("--subsets", type=int, default=50, help="random halves to retrain on")
    quality.add_argument("--subset_repeats", type=int, default=2, help="models a subset, 2 or more")
    add_cache_dir(quality)
    speed = parser.add_argument_group("speed: ResNet-18 with random weights")
    speed.add_argument("--sizes", type=int, nargs="*", default=[224], help="sides of the images")
    speed.add_argument("--speed_dim", type=int, default=2048, help="k")
    speed.add_argument("--images", type=int, default=32, help="at most, also in a batch")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every method in its own process. One that cannot run is a row that says why."""
    os.environ.update(QUIET)
    rows = []
    if options.part != "speed":
        rows += measure_quality(options)
    if options.part != "quality":
        for size in options.sizes:
            rows += measure_speed(options, size)
    return rows


# ---- one method in one process


@dataclass
class Outcome:
    """Seconds, memory and scores of a method, or the reason why it did not run.

    Attributes:
        fixed: seconds of a run that do not grow with the number of training images.
    """

    seconds: list[float] = field(default_factory=list)
    fixed: float = 0.0
    peak_mib: float = 0.0
    scores: np.ndarray | None = None
    self_influence: np.ndarray | None = None
    error: str = ""


def in_turn(
    tasks: dict[str, tuple[Callable[..., Outcome], tuple]], options: argparse.Namespace
) -> dict[str, Outcome]:
    """Run all tasks once per round, so that each is measured early and late; skip failed ones."""

    outcomes: dict[str, Outcome] = {}
    for number in range(options.repeats):
        for name, (function, arguments) in tasks.items():
            known = outcomes.get(name)
            if known and known.error:
                continue
            found = in_child(function, arguments, options.limit, options.threads)
            say(f"round {number + 1}, {name}: {found.error or f'{found.seconds[0]:.1f} s'}")
            if known:
                known.seconds += found.seconds
            else:
                outcomes[name] = found
    return outcomes


def in_child(
    function: Callable[..., Outcome], arguments: tuple, limit: float, threads: int
) -> Outcome:
    """Call the function in a new process, so that the peak of memory is the method's own."""
    prepare = (torch.set_num_threads, (threads,)) if threads else (None, ())
    pool = ProcessPoolExecutor(1, initializer=prepare[0], initargs=prepare[1])
    try:
        return pool.submit(function, *arguments).result(limit)
    except TimeoutError:
        return Outcome(error=f"not done within {limit:g} s")
    except BrokenProcessPool:
        return Outcome(error="its process died (out of memory?)")
    except Exception as error:  # a peer may fail in any way; the table goes on without it
        return Outcome(error=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    finally:
        pool.shutdown(kill_workers=True)


def measured(prepared: Callable[[], Any]) -> tuple[Any, Outcome]:
    """Call once: the result, its seconds, and the peak memory since the last reset."""
    start = time.perf_counter()
    result = prepared()
    seconds = time.perf_counter() - start
    return result, Outcome([seconds], peak_mib=peak_memory_mib())


# ---- quality


def score_once(name: str, problem: Problem) -> Outcome:
    """All scores of one method, including loading the checkpoints."""

    with tempfile.TemporaryDirectory() as folder:
        problem = dataclasses.replace(problem, work=Path(folder), batch=METHODS[name].batch)
        reset_peak_memory()
        scores, outcome = measured(partial(METHODS[name].scores, problem))
        outcome.scores = np.asarray(scores.values, np.float32)
        outcome.self_influence = scores.self_influence and scores.self_influence()
    return outcome


def measure_quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of checkpoints and method: LDS, AUROC of the flips, seconds, MiB."""

    most = max(options.checkpoints)
    given = {"preset": "digits", "cache_dir": options.cache_dir, "device": "cpu"}
    config = resolve(given | {"num_models": most, "proj_dim": options.proj_dim})
    data = load_data(config)
    n = len(data.rows("train"))
    masks = subset_masks(n, most, config.subset_fraction, config.seed)
    alone = dataclasses.replace(config, jobs=1)  # one process, like the peers
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start = time.perf_counter()
        runs = train_checkpoints(config, data, masks, work)
        training = (time.perf_counter() - start) / most
        cache = Path(config.cache_dir) / f"peers-{digest(training_key(config, data))}"
        bank = build_bank(config, data, options.subsets, options.subset_repeats, 0.5, cache)
        for m in options.checkpoints:
            problem = Problem(alone, data, [run.folder for run in runs[:m]], work)
            judge = Judge(data, Finetuned.of(masks[:m], runs[:m]).members, bank)
            tasks = {name: (score_once, (name, problem)) for name in options.methods}
            outcomes = in_turn(tasks, options)
            ours = outcomes.get("ours", Outcome()).scores
            for name, outcome in outcomes.items():
                row = {"part": f"quality, {m} checkpoints", "method": name}
                row |= judge(outcome, ours) | _cost(outcome, n * m, METHODS[name].note)
                if outcome.seconds:
                    row["with_training_s"] = m * training + statistics.median(outcome.seconds)
                rows.append(row)
    ceiling = float(np.nanmean(noise_ceiling(bank.margins)))
    rows.append({"part": "quality", "method": "noise ceiling", "lds": ceiling})
    note = {"note": "out of sample; for flips only"}
    loss = {"part": "quality", "method": "loss", "auroc": judge.auroc(-judge.train_loss)}
    return [*rows, loss | note]


class Judge:
    """Judges scores by retrained margins and by planted flips."""

    def __init__(self, data: ImageData, ensemble: Ensemble, bank: Bank) -> None:

        self.groups = group_ids(data.table("validation"), "label")
        loss = ensemble.loss("validation", data.labels("validation"))
        self.weights = group_weights(loss, self.groups, "exp_loss")
        self.flipped = data.table("train")["is_flipped"].to_numpy()
        self.train_loss = ensemble.loss("train", data.labels("train"))
        self.masks, self.margins = bank.masks, bank.margins.mean(axis=1)

    def __call__(self, outcome: Outcome, ours: np.ndarray | None) -> dict[str, float]:
        """LDS, its difference from ours, and AUROC of flips by alignment and by self-influence."""

        if outcome.scores is None:
            return {}
        each = lds(outcome.scores, self.masks, self.margins)
        row = dict(zip(("lds", "lds_low", "lds_high"), bootstrap(each)))
        if ours is not None and ours is not outcome.scores:
            paired = bootstrap(each - lds(ours, self.masks, self.margins))
            row |= dict(zip(("minus_ours", "minus_low", "minus_high"), paired))
        row["auroc"] = self.auroc(group_alignment(outcome.scores, self.groups, self.weights))
        if outcome.self_influence is not None:
            row["auroc_self"] = self.auroc(-outcome.self_influence)
        return row

    def auroc(self, values: np.ndarray) -> float:
        """How well low values find the flips."""

        return detection(self.flipped, values, draws=0)["auroc"]


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (m,) values over targets, with its 95 % percentile interval."""
    values = values[np.isfinite(values)]
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _cost(outcome: Outcome, examples: int, note: str) -> dict[str, Any]:
    """Seconds per 1,000 examples and checkpoint, from runs over that many examples; n; memory."""
    if outcome.error:
        return {"note": f"did not run: {outcome.error}"}
    growing = statistics.median(outcome.seconds) - outcome.fixed
    return {
        "s_per_1000": outcome.fixed + 1000 * growing / examples,
        "n": len(outcome.seconds),
        "peak_mib": outcome.peak_mib,
        "note": note,
    }


# ---- speed


def features_once(name: str, problem: Problem) -> Outcome:
    """Featurise the training split; loading before that counts as memory, not as time."""

    with tempfile.TemporaryDirectory() as folder:
        reset_peak_memory()
        prepared = METHODS[name].features(dataclasses.replace(problem, work=Path(folder)))
        fixed, outcome = measured(prepared)
        outcome.fixed = fixed or 0.0
        return outcome


def measure_speed(options: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """One row per method and batch size: seconds per 1,000 images, also as times ours, and MiB."""

    with tempfile.TemporaryDirectory() as folder:
        tasks, shapes = {}, {}
        for name in options.methods:
            for batch, images in METHODS[name].speed:
                batch, images = min(batch, options.images), min(images, options.images)
                problem = synthetic(Path(folder), size, images, options.speed_dim)
                label = f"{name}, batch {batch}"
                tasks[label] = features_once, (name, dataclasses.replace(problem, batch=batch))
                shapes[label] = name, images
        outcomes = in_turn(tasks, options)
    rows = []
    for label, (name, images) in shapes.items():
        row = {"part": f"speed, ResNet-18, {size} x {size}, k {options.speed_dim}"}
        row |= {"method": label, "images": images}
        rows.append(row | _cost(outcomes[label], images, METHODS[name].note))
    ours = next((r.get("s_per_1000") for r in rows if r["method"].startswith("ours,")), None)
    for row in rows:
        if ours and "s_per_1000" in row:
            row["times_ours"] = row["s_per_1000"] / ours
    return rows


def synthetic(folder: Path, size: int, n: int, k: int) -> Problem:
    """A ResNet-18 with random weights and n random training images, with one target per class."""

    config = resolve({"preset": "digits", "image_size": size, "proj_dim": k, "device": "cpu"})
    rng = np.random.default_rng(0)
    classes = 10
    labels = rng.integers(0, classes, n + classes)
    pixels = folder / f"{n}.npy"
    np.save(pixels, rng.integers(0, 256, (len(labels), size, size, 3), np.uint8))
    split = ["train"] * n + ["validation"] * classes
    examples = pd.DataFrame({"split": split, "label": labels})
    names = tuple(map(str, range(classes)))
    data = ImageData(pixels, names, examples, f"random-{n}-{size}", (), 0)
    checkpoint = folder / "checkpoint" / "model"
    if not checkpoint.exists():
        model, normalisation = (
            make_model(RESNET18, classes),
            model_facts.normalisation("resnet-mini"),
        )
        classifier.save(model, checkpoint, size, *normalisation)
    return Problem(config, data, [checkpoint], folder)
