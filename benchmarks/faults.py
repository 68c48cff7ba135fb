"""Real commands, killed at seeded random moments or starved: is all that was finished kept, bit by bit?"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import command_environment

KINDS = ("SIGKILL", "SIGKILL to all", "SIGTERM", "Ctrl-C", "dead worker", "twice", "full disk")
TOGETHER = {"two at once": 2, "three at once": 3}  # commands on a new store; asked for by name
# Small, but with every kind of unit: checkpoints, shards, factors, retrainings alone and in stacks.
SETTINGS = {"num_models": 4, "epochs": 4, "jobs": 2}
COMMANDS = {
    "finetune": {},
    "ablation": {"num_seeds": 12, "arms": "none,random,harmful,loss"},
    "evaluate": {"num_subsets": 10, "num_repeats": 2, "brittleness_targets": 2},
    "explain": {},
}
# What has to be equal to the last bit.
RESULTS = ("model.safetensors", "logits.npz", "scores.npy", "suspects.csv", "comparison.csv",
           "per_class.csv", "margins.npy", "evaluation.csv", "brittleness.csv", "explanation.csv")  # fmt: skip
TIMES = ("seconds", "milliseconds_per_gradient")  # metrics that differ each time
GENTLE = ("SIGTERM", "Ctrl-C")  # signals that a process can answer
# Seconds after which what is left is an orphan. Ray's agents notice that their cluster was killed, and
# then wait a minute for its control server, to tell it.
LEAVE = {"local": 5.0, "ray": 75.0}
PATIENCE = 900  # seconds until a command counts as hanging
PAUSE = 2.0  # seconds, at most, between a finished unit and what is done then


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--trials", type=int, default=25, help="of each backend")
    parser.add_argument("--backends", nargs="+", default=["local"], choices=("local", "ray"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=(*KINDS, *TOGETHER))
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=tuple(COMMANDS))
    parser.add_argument("--seed", type=int, default=0, help="of moments, kinds and commands")
    parser.add_argument("--append", default="", help="file of trials, all of which are counted")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Interrupt each kind of command at random moments, and start it again.

    A moment is a number of finished units of work, drawn from none to all that an undisturbed
    command makes, and a pause: how fast the machine is just then does not matter.

    A row a backend, kind and stage that was being made: `failed`, commands that hung or did not go
    on; `kept`, finished units of work that lay in the cache when it was stopped, and `lost`, those
    of them that were made again;
    `different`, results not identical to an undisturbed run's; `orphans`, processes left (see LEAVE);
    `untold`, commands that a full disk ended without a line that says so; `badly_marked`, runs that a
    signal which can be answered did not leave KILLED; `slowest_stop`, seconds from such a signal to
    the end; `last_left`, seconds from then until the last process of the command had left.
    """
    rows = []
    for backend in options.backends:
        draw = random.Random(f"{options.seed}/{backend}")
        expected = {name: undisturbed(name, backend) for name in options.commands}
        for number in range(options.trials):
            name = options.commands[number % len(options.commands)]
            kind = draw.choice(options.kinds)
            trial = {"backend": backend, "kind": kind, "stage": "", "command": name}
            try:
                if kind in TOGETHER:
                    trial |= together(name, backend, TOGETHER[kind], expected[name])
                else:
                    trial |= interrupt(name, backend, kind, draw, expected[name])
            except (RuntimeError, TimeoutError) as error:
                trial |= {"failed": 1, "reason": str(error)}
            rows.append(trial)
            print(trial, file=sys.stderr, flush=True)
            if options.append:
                with Path(options.append).open("a") as file:
                    file.write(json.dumps(trial) + "\n")
    if options.append:
        rows = [json.loads(line) for line in Path(options.append).read_text().splitlines()]
    return summary(rows)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials counted by backend, kind and stage."""
    import pandas as pd

    table = pd.DataFrame(rows)
    table = table.reindex(columns=list(dict.fromkeys([*table, "failed", "told", "last_left"])))
    table = table.fillna({"failed": 0, "told": 1, "last_left": 0.0})
    table["untold"] = 1 - table["told"]
    counted = ("failed", "untold", "kept", "lost", "different", "orphans", "badly_marked")
    wanted = {"trials": ("kind", "size"), **{name: (name, "sum") for name in counted}}
    slowest = {name: (name, "max") for name in ("slowest_stop", "last_left")}
    counts = table.groupby(["backend", "kind", "stage"]).agg(**wanted, **slowest)
    return counts.reset_index().to_dict("records")


@dataclass
class Place:
    """A store and a cache of their own, and the command that fills them."""

    folder: Path
    name: str
    backend: str = "local"
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)  # every unit of work that was there at some time

    @property
    def err(self) -> Path:
        """What its commands wrote to stderr, beside the folder: that one's disk may be full."""
        return self.folder.with_name(f"{self.folder.name}.err")

    def start(self) -> subprocess.Popen:
        """The command, at the head of a session of its own: what it leaves there is an orphan."""
        given = {**SETTINGS, **COMMANDS[self.name], "backend": self.backend, **self.settings}
        flags = [f"--{name}={value}" for name, value in given.items()]
        environment = command_environment(self.folder / "cache") | {"TMPDIR": str(self.folder)}
        with self.err.open("a") as err:
            return subprocess.Popen(
                [sys.executable, "-m", f"scripts.{self.name}", *flags],
                cwd=self.folder,
                env=environment | self.environment,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
                # Started in a shell's background this process ignores Ctrl-C, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def finish(self) -> int:
        """Start it and wait; how many units of work that were finished before it made again.

        Raises:
            RuntimeError: it failed.
            TimeoutError: it hangs.
        """
        before, again = self.units(), set()
        process, deadline = self.start(), time.monotonic() + PATIENCE
        while process.poll() is None:
            now = self.units()
            again |= {unit for unit in before if now.get(unit, before[unit]) != before[unit]}
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.name}: no end after {PATIENCE} s")
            time.sleep(0.1)
        self.check(process)
        return len(again)

    def check(self, process: subprocess.Popen) -> None:
        """Raise RuntimeError where it failed."""
        if process.wait(PATIENCE):
            raise RuntimeError(self.err.read_text()[-2000:])

    def units(self) -> dict[str, int]:
        """When each finished unit of work that the cache holds was written, in nanoseconds."""
        work, found = self.folder / "cache" / "work", {}
        for folder, _, names in os.walk(work):  # which does not mind what is discarded meanwhile
            place = Path(folder)
            if any(part.startswith(".") for part in place.relative_to(work).parts):
                continue
            units = [place] if {"done", "logits.npz"} & set(names) else []
            if place.name == "retrainings":
                units = [place / name for name in names if re.fullmatch(r"[^.].*\.npz", name)]
            for unit in units:
                with contextlib.suppress(OSError):
                    found[str(unit.relative_to(work))] = unit.stat().st_mtime_ns
        self.seen |= found.keys()
        return found

    def wait(self, process: subprocess.Popen, units: int, pause: float) -> None:
        """Until it has ended, or so many units have been seen and the pause is over."""
        while process.poll() is None and len(self.seen) < units:
            self.units()
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)

    def stage(self) -> str:
        """What is being made, or was when it was stopped."""
        runs = sorted(self.runs(), key=lambda run: run.info.start_time)
        stages = [r.data.tags.get("stage", "start") for r in runs if r.info.status != "FINISHED"]
        return stages[-1] if stages else ("finished" if runs else "start")

    def results(self) -> dict[str, str]:
        """Hash of every result file and of all metrics of FINISHED runs, by stage and name."""
        found: dict[str, str] = {}
        for run in self.runs():
            if run.info.status != "FINISHED" or "reused_run_id" in run.data.tags:
                continue
            name = f"{run.data.tags['stage']}/{run.info.run_name if 'fingerprint' not in run.data.tags else ''}"
            metrics = {k: v for k, v in run.data.metrics.items() if k not in TIMES}
            found[f"{name}/metrics"] = json.dumps(metrics, sort_keys=True)
            for root in self.folder.rglob(f"{run.info.run_id}/artifacts"):
                for file in root.rglob("*"):
                    if file.name in RESULTS:
                        content = hashlib.sha256(file.read_bytes()).hexdigest()
                        found[f"{name}/{file.relative_to(root)}"] = content
        return found

    def runs(self) -> list[Any]:
        """All runs of the store."""
        from mlflow import MlflowClient

        uri = self.environment.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            database = self.folder / "mlflow.db"
            if not database.exists():
                return []
            uri = f"sqlite:///{database}"
        return list(MlflowClient(uri).search_runs(["0"]))


@contextlib.contextmanager
def new_place(name: str, backend: str) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = Place(Path(folder), name, backend)
        try:
            yield place
        finally:
            place.err.unlink(missing_ok=True)


@dataclass(frozen=True)
class Undisturbed:
    """A command that ran to its end: its units of work, seconds until the first of them, its results."""

    units: int
    start_up: float
    results: dict[str, str]


def undisturbed(name: str, backend: str) -> Undisturbed:
    with new_place(name, backend) as place:
        process, start = place.start(), time.monotonic()
        place.wait(process, 1, 0)
        start_up = time.monotonic() - start
        place.wait(process, 1 << 30, 0)
        place.check(process)
        return Undisturbed(len(place.seen), start_up, place.results())


def interrupt(
    name: str, backend: str, kind: str, draw: random.Random, expected: Undisturbed
) -> dict[str, Any]:
    """One trial; `draw` is of the moments."""
    with new_place(name, backend) as place, _small_disk(place.folder, kind == "full disk"):
        found: dict[str, Any] = dict.fromkeys(("kept", "lost", "orphans", "badly_marked"), 0)
        moments = sorted(draw.randint(0, expected.units) for _ in range(1 + (kind == "twice")))
        slowest = 0.0
        for units in moments:
            process = place.start()
            place.wait(process, units, draw.uniform(0, PAUSE if units else expected.start_up))
            if kind == "full disk":
                found |= _starve(place, process)
            if kind == "dead worker":
                found["stage"] = place.stage()
            took = _stop(process, kind, draw)
            if kind == "dead worker":
                place.check(process)
                break
            found["stage"] = place.stage()
            found["kept"] += len(place.units())
            if kind == "full disk":
                break
            left, until = _orphans(process.pid, LEAVE["local" if kind in GENTLE else backend])
            found["orphans"] += left
            found["last_left"] = max(found.get("last_left", 0.0), until)
            if kind in GENTLE:
                slowest = max(slowest, took)
                states = ("KILLED", "FINISHED")
                badly = [r.info.status for r in place.runs() if r.info.status not in states]
                if badly:
                    found["badly_marked"] += len(badly)
                    found["said"] = [
                        process.returncode,
                        *badly,
                        *place.err.read_text().splitlines(),
                    ]
        if kind != "dead worker":
            found["lost"] = place.finish()
        differ = different(place.results(), expected.results)
        return {"moments": moments, **found, "different": differ, "slowest_stop": slowest}


def together(name: str, backend: str, count: int, expected: Undisturbed) -> dict[str, Any]:
    """The same command so many times at once; `lost` is results that were made more than once."""
    with new_place(name, backend) as place:
        for process in [place.start() for _ in range(count)]:
            place.check(process)
        tags = [run.data.tags for run in place.runs() if run.info.status == "FINISHED"]
        made = [each["fingerprint"] for each in tags if "fingerprint" in each]
        return {
            "stage": "start",
            **dict.fromkeys(("kept", "orphans", "badly_marked"), 0),
            "lost": len(made) - len(set(made)),
            "different": different(place.results(), expected.results),
            "slowest_stop": 0.0,
        }


def different(found: dict[str, str], expected: dict[str, str]) -> int:
    return sum(found.get(key) != value for key, value in expected.items())


def _stop(process: subprocess.Popen, kind: str, draw: random.Random) -> float:
    """Do what the kind says; seconds until the command has ended, if it is to end."""
    start = time.monotonic()
    if process.poll() is not None:
        return 0.0
    if kind == "dead worker":
        workers = _workers(process.pid)
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(workers), signal.SIGKILL)
        return 0.0
    actions: dict[str, Callable[[], None]] = {
        "SIGKILL": process.kill,
        "twice": process.kill,
        "SIGKILL to all": lambda: os.killpg(process.pid, signal.SIGKILL),
        "SIGTERM": process.terminate,
        "Ctrl-C": lambda: os.killpg(process.pid, signal.SIGINT),  # as a terminal sends it
        "full disk": lambda: None,
    }
    actions[kind]()
    process.wait(PATIENCE)
    return time.monotonic() - start


def _starve(place: Place, process: subprocess.Popen) -> dict[str, Any]:
    """Fill the disk until the command has ended; whether it told why, if it failed, or what instead."""
    filler = place.folder / "filler"
    with filler.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(bytes(1 << 16))
    code = process.wait(PATIENCE)
    filler.unlink()
    lines = place.err.read_text().splitlines()
    told = not code or any(line.startswith("error: ") for line in lines[-3:])
    return {"told": 1} if told else {"told": 0, "said": lines[-5:]}


@contextlib.contextmanager
def _small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """A disk of 400 MiB of its own in this folder, for which one has to be root."""
    if not wanted:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def session(leader: int) -> list[int]:
    """Living processes of a session, its leader left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, *fields = stat.read_text().rpartition(")")[2].split()
            number = int(stat.parent.name)
            if int(fields[2]) == leader and state != "Z" and number != leader:
                found.append(number)
    return found


def _workers(leader: int) -> list[int]:
    """Worker processes: those of the session that compute."""
    found = []
    for number in session(leader):
        with contextlib.suppress(OSError):
            words = (Path("/proc") / str(number) / "cmdline").read_bytes()
            if b"popen_loky" in words or b"ray::" in words:
                found.append(number)
    return found


def _orphans(leader: int, seconds: float) -> tuple[int, float]:
    """Processes of the session that are there so long after it was stopped; seconds until all had left."""
    start = time.monotonic()
    while (left := session(leader)) and time.monotonic() < start + seconds:
        time.sleep(0.1)
    took = time.monotonic() - start
    for number in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return len(left), took
