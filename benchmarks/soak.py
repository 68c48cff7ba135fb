"""One command left running for hours: do its memory, open files, threads or processes grow?"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import command_environment
from benchmarks.faults import PATIENCE

BLOCKS = 12  # of samples: neighbours are alike, so a slope is of the blocks' medians
NOTICEABLE = 0.05  # growth over the whole time, as a share of the median, that is called growth


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--minutes", type=float, default=120, help="until it is stopped")
    parser.add_argument("--every", type=float, default=20, help="seconds between samples")
    parser.add_argument("--warm_up", type=float, default=10, help="first minutes that are left out")
    parser.add_argument("--num_seeds", type=int, default=10000, help="more than it gets done")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start an ablation of the digits over very many seeds, sample its processes, and stop it.

    The driver and its children (two workers, and joblib's tracker) stay in this process group: all
    can be paused together (SIGSTOP to the group), and a pause takes no time here, as the sampler
    pauses too.

    A row a quantity of the driver and of the others: medians of the first and the last third after
    the warm-up, growth an hour with its 95 % interval, and whether that is `growth`.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        process = _start(Path(folder), options.num_seeds)
        samples, deadline = [], time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline and process.poll() is None:
            sample = {"stacks": _finished(Path(folder)), **_sample(process.pid)}
            samples.append(sample)
            print(json.dumps(sample), file=sys.stderr, flush=True)
            time.sleep(options.every)
        if process.poll() is not None:
            raise RuntimeError((Path(folder) / "err").read_text()[-2000:])
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)
    return [{**row, "exit_code": code} for row in summary(samples, options)]


def summary(samples: list[dict[str, float]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a quantity, of samples of equal distance."""
    from attribution.models.retrain import STACK

    kept = samples[int(60 * options.warm_up / options.every) :]
    told = {"samples": len(kept), "models_trained": STACK * samples[-1]["stacks"]}
    names = [name for name in samples[0] if name != "stacks"]
    return [_row(name, [s[name] for s in kept], options.every) | told for name in names]


def _start(folder: Path, num_seeds: int) -> subprocess.Popen:
    flags = [f"--num_seeds={num_seeds}", "--arms=none,random,harmful,loss", "--jobs=2"]
    with (folder / "err").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.ablation", *flags],
            cwd=folder, env=command_environment(folder / "cache"), stdout=err, stderr=err,
        )  # fmt: skip


def _finished(folder: Path) -> int:
    return len(list(folder.glob("cache/work/retrainings/[!.]*.npz")))


def _sample(driver: int) -> dict[str, float]:
    """What the driver has, and all its descendants together."""
    others = [measure(number) for number in descendants(driver)]
    sample = {f"driver {name}": value for name, value in measure(driver).items()}
    for name in measure(driver):
        sample[f"others {name}"] = sum(other.get(name, 0) for other in others)
    return {**sample, "processes": 1 + len(others)}


def measure(number: int) -> dict[str, float]:
    """MiB of memory (all that is resident, and what is no file's), open files and threads."""
    place, found = Path("/proc") / str(number), {}
    with contextlib.suppress(OSError, KeyError):  # it may have ended
        lines = (place / "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        found = {
            "MiB": int(status["VmRSS"].split()[0]) / 1024,
            "MiB anonymous": int(status["RssAnon"].split()[0]) / 1024,
            "open files": len(list((place / "fd").iterdir())),
            "threads": int(status["Threads"]),
        }
    return found


def descendants(number: int) -> list[int]:
    """Living processes that were started by this one, or by those."""
    children = []
    for file in Path("/proc").glob(f"{number}/task/*/children"):
        with contextlib.suppress(OSError):
            children += [int(word) for word in file.read_text().split()]
    return [found for child in children for found in (child, *descendants(child))]


def _row(name: str, values: list[float], every: float) -> dict[str, Any]:
    third = max(1, len(values) // 3)
    first, last = np.median(values[:third]), np.median(values[-third:])
    slope, half = growth(values, every)
    hours = len(values) * every / 3600
    grows = slope - half > 0 and slope * hours > NOTICEABLE * np.median(values)
    return {
        "what": name,
        "first_third": float(first),
        "last_third": float(last),
        "most": float(max(values)),
        "an_hour": slope,
        "an_hour_ci": half,
        "growth": "yes" if grows else "no",
    }


def growth(values: list[float], every: float) -> tuple[float, float]:
    """Growth an hour of values sampled every so many seconds, and half its 95 % interval's width."""
    from scipy import stats

    parts = [part for part in np.array_split(values, BLOCKS) if len(part)]
    hours = np.arange(len(parts)) * len(values) / len(parts) * every / 3600
    if len(parts) < 3:
        return float("nan"), float("nan")
    line = stats.linregress(hours, [np.median(part) for part in parts])
    half = float(line.stderr * stats.t.ppf(0.975, len(parts) - 2))
    return float(line.slope), 0.0 if np.ptp(values) == 0 else half
