"""Much of everything: 100,000 images through data, features and alignment; 300 arms; 10,000 metrics."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from attribution.tracking.run_lifecycle import open_run
from benchmarks.common import command_environment
from benchmarks.outages import Server
from benchmarks.soak import descendants, measure

HELD_OUT = (
    1000  # images of the validation part, and of the test part: scores are linear in the rest
)
CLASSES = 10
PARTS = ("images", "ablation", "pages")
ARMS = 300
TRIALS = {  # 30 fracs times 10 arms, their controls, and three arms whose size is their own
    "frac": ",".join(f"{0.002 * i:.3f}" for i in range(1, 31)),
    "arms": "none,random,random_matched,helpful,harmful,loss,confident,self_influence,"
    "harmful_loss,majority,balanced,negative,oracle",
    "num_models": 2,
    "epochs": 1,
    "num_seeds": 2,
    "jobs": 2,
}
VERDICT = "(better|worse) than random|indistinguishable from random|after Holm"  # in every note
END = ("end", 0.0)
SECONDS = 120  # until an answer counts as none
Stage = tuple[str, float, dict[str, float]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument(
        "--parts", nargs="+", default=["images", "ablation"], choices=PARTS,
        help="pages: those of runs that nobody computed, in place of an ablation's",
    )  # fmt: skip
    parser.add_argument("--sizes", nargs="+", type=int, default=[25000, 50000, 100000])
    parser.add_argument("--metrics", type=int, default=10000, help="of one run")
    parser.add_argument("--jobs", type=int, default=2)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the parts: a stage, a request or a page each."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        if "images" in options.parts:
            for size in options.sizes:
                rows += _images(Path(folder) / str(size), size, options.jobs)
        for part in ("ablation", "pages"):
            if part in options.parts:
                (Path(folder) / part).mkdir()
                rows += _runs(Path(folder) / part, part, options)
    return rows


# -- images ----------------------------------------------------------------------------------------


def _images(folder: Path, size: int, jobs: int) -> list[dict[str, Any]]:
    """A row a stage: seconds, and the most memory of the driver and of its workers together.

    `processor_seconds` are of all processes; features begin with the start of the workers.
    `anonymous` leaves out mapped files (the pixel cache, features and scores), whose pages the
    machine takes back when it needs them.
    """
    make_images(folder / "images", {"train": size, "validation": HELD_OUT, "test": HELD_OUT})
    rows = []
    for stage, seconds, most in watched(_stages, folder, jobs):
        row = {"part": "images", "images": size, "stage": stage, "seconds": seconds}
        rows.append(row | most)
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def make_images(folder: Path, parts: dict[str, int]) -> None:
    """Random PNGs of 8x8 pixels in class folders, no two alike."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in parts.items():
        for label in range(CLASSES):
            (folder / part / f"class {label}").mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            pixels[i % CLASSES % 8] //= 2
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG", compress_level=1)
            file = folder / part / f"class {i % CLASSES}" / f"{i:06d}.png"
            file.write_bytes(content.getvalue())


def _stages(folder: Path, jobs: int) -> Iterator[str]:
    """The library's steps of `trak` one by one, with a checkpoint of random weights."""
    from attribution.config import resolve
    from attribution.data.dataset import list_data, load_data
    from attribution.models import classifier
    from attribution.scores import alignment, trak
    from attribution.scores.features import featurize

    config = resolve(
        {"dataset": str(folder / "images"), "cache_dir": str(folder / "cache"), "image_size": 16,
         "num_models": 1, "jobs": jobs, "feature_precision": "float32", "augment": "none"}
    )  # fmt: skip
    listing = list_data(config)
    yield "list and hash"
    data = load_data(config, listing)
    yield "decode and split"
    model = classifier.build(config.model, data.class_names, seed=0)
    classifier.save(model, folder / "model", 16, *classifier.normalisation(config.model))
    stores = featurize(config, data, [folder / "model"], folder / "work")
    yield "features"
    scores = trak.score(config, stores, folder / "work" / "scores.npy")
    yield "scores"
    groups = alignment.group_ids(data.table("validation"), "label")
    weights = alignment.group_weights(np.zeros(len(groups)), groups, "uniform")
    alignment.group_alignment(scores.values, groups, weights)
    yield "alignment"


def watched(stages: Callable[..., Iterator[str]], *arguments: Any) -> Iterator[Stage]:
    """Run stages in a process of its own: (name, seconds, most MiB by name) of each."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_report, args=[theirs, stages, *arguments])
    process.start()
    theirs.close()
    most, before = {}, 0.0
    with contextlib.suppress(EOFError):  # it has failed
        while (stage := ours.recv() if ours.poll(0.1) else ("", 0.0)) != END:
            most = _higher(most, process.pid)
            if stage[1]:
                spent = _processor_seconds(process.pid)
                yield *stage, {"processor_seconds": spent - before, **most}
                most, before = {}, spent
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit code {process.exitcode}")


def _report(pipe: Any, stages: Callable[..., Iterator[str]], *arguments: Any) -> None:
    import attribution.scores.trak  # noqa: F401  (not a part of the first stage)
    from attribution.runtime import parallel

    start = time.monotonic()
    for name in stages(*arguments):
        now = time.monotonic()
        pipe.send((name, now - start))
        start = now
    parallel.end_workers()
    pipe.send(END)


def _processor_seconds(process: int) -> float:
    """That it and its living descendants have used; other work on the machine does not count."""
    ticks = 0
    for each in (process, *descendants(process)):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _higher(most: dict[str, float], process: int) -> dict[str, float]:
    """The most so far, or what the process and its descendants have now."""
    driver, others = measure(process), [measure(each) for each in descendants(process)]
    now = {}
    for name in ("MiB", "MiB anonymous"):
        now[f"driver {name}"] = driver.get(name, 0.0)
        now[f"workers {name}"] = sum(each.get(name, 0.0) for each in others)
    return {name: max(value, most.get(name, 0.0)) for name, value in now.items()}


# -- runs ------------------------------------------------------------------------------------------


def _runs(folder: Path, part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """300 arms, a run of very many metrics, and how soon MLflow's server shows them."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_tracking_uri(client.tracking_uri)
    start, most = time.monotonic(), {}
    if part == "ablation":
        most = _ablation(folder)
    else:
        _arms()
    seconds = time.monotonic() - start
    [parent] = client.search_runs(["0"], "tags.stage = 'ablation'")
    arms = client.search_runs(["0"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    count = f"{len(arms)} arms, {sum(len(arm.data.metrics) for arm in arms):,} metrics"
    rows = [{"what": count, "n": 1, "seconds": seconds, **most}]
    start = time.monotonic()
    run_id = _many_metrics(options.metrics)
    rows.append({"what": f"log {options.metrics:,} metrics", "n": 1})
    rows[-1]["seconds"] = time.monotonic() - start
    with Server(folder, f"sqlite:///{folder / 'mlflow.db'}", []) as server, _browser() as open_page:
        address = f"http://127.0.0.1:{server.port}"
        asked = _requests(address, parent.info.run_id, run_id)
        if open_page:
            asked |= _pages(address, parent, run_id, open_page)
        for what, ask in asked.items():
            taken = [_timed(ask) for _ in range(1 + options.repeats)][1:]
            rows.append({"what": what, "n": len(taken), "seconds": median(taken)})
            rows[-1]["slowest"] = max(taken)
    return [{"part": part, **row} for row in rows]


def _ablation(folder: Path) -> dict[str, float]:
    """The most memory of a command with TRIALS."""
    most: dict[str, float] = {}
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.ablation", *(f"--{k}={v}" for k, v in TRIALS.items())],
        cwd=folder, env=command_environment(folder / "cache"), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        most = _higher(most, process.pid)
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    return most


def _arms() -> None:
    """What such a command leaves in the store, without the work: ARMS nested runs of 34 metrics."""
    import mlflow

    from attribution.reporting import mlflow_notes
    from attribution.tracking import stage_runs

    with open_run(run_name="ablation", tags={"stage": "ablation"}):
        for i in range(ARMS):
            with open_run(run_name=f"arm {i}", nested=True):
                series = [(f"metric {j}", j / 33, 0) for j in range(33)]
                stage_runs.log_series([("accuracy_mean", i / ARMS, 0), *series])
        mlflow.set_tag(mlflow_notes.NOTE, "- **arm 0** 0.0000, better than random")
        stage_runs.save_arms_view()


def _many_metrics(count: int) -> str:
    """The id of a run of so many metrics, logged as the project's own are."""
    from attribution.tracking import stage_runs

    with open_run(run_name="many metrics") as run:
        stage_runs.log_series([(f"metric/{i:05d}", i / count, 0) for i in range(count)])
    return run.info.run_id


def _timed(ask: Callable[[], None]) -> float:
    start = time.monotonic()
    ask()
    return time.monotonic() - start


def _requests(address: str, parent: str, many: str) -> dict[str, Callable[[], None]]:
    """What MLflow's pages ask for."""
    arms = {"filter": f"tags.`mlflow.parentRunId` = '{parent}'", "max_results": 1000}
    best = {"order_by": ["metrics.`accuracy_mean` DESC"]}

    def ask(path: str, body: dict[str, Any] | None = None) -> Callable[[], None]:
        request = urllib.request.Request(f"{address}/api/2.0/mlflow/{path}")
        if body:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps({"experiment_ids": ["0"], **body}).encode()

        def answer() -> None:
            with urllib.request.urlopen(request, timeout=SECONDS) as found:
                json.load(found)

        return answer

    return {
        "request: first 100 runs": ask("runs/search", {"max_results": 100}),
        "request: all arms, best first": ask("runs/search", arms | best),
        "request: run of many metrics": ask(f"runs/get?run_id={many}"),
        "request: one metric": ask(f"metrics/get-history?run_id={many}&metric_key=metric/00007"),
    }


@contextlib.contextmanager
def _browser() -> Iterator[Callable[[str, str], None] | None]:
    """What opens an address in Chromium and waits for a text; None where there is no browser."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if not found:
        yield None
        return
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])

        def open_page(address: str, text: str) -> None:
            context = browser.new_context(viewport={"width": 1440, "height": 1000})
            page = context.new_page()
            page.goto(address)
            page.get_by_text(re.compile(text)).first.wait_for(timeout=1000 * SECONDS)
            context.close()

        yield open_page
        browser.close()


def _pages(
    address: str, parent: Any, many: str, open_page: Callable[[str, str], None]
) -> dict[str, Callable[[], None]]:
    """Pages and a text that is there once they are drawn."""
    from attribution.reporting import mlflow_notes

    run_id, where = parent.info.run_id, parent.info.experiment_id
    wanted = {
        "page: all runs": (f"#/experiments/{where}/runs?{mlflow_notes.TRAINING}", "matching runs"),
        "page: arms, best first": (mlflow_notes.arms_link(where, run_id), "matching runs"),
        "page: the ablation": (mlflow_notes.run_link(where, run_id), VERDICT),
        "page: run of many metrics": (mlflow_notes.run_link(where, many), "metric/00000"),
    }
    return {
        what: functools.partial(open_page, f"{address}/{link}", text)
        for what, (link, text) in wanted.items()
    }
