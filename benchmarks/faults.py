"""Kill real commands at random moments, run them again, and compare with an undisturbed run."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient

from benchmarks.common import command_environment

# Each signal, and whether the command's whole process group gets it, as from a terminal.
SIGNALS = {
    "SIGKILL": (signal.SIGKILL, False),
    "SIGKILL twice": (signal.SIGKILL, False),
    "SIGKILL to all": (signal.SIGKILL, True),
    "SIGTERM": (signal.SIGTERM, False),
    "Ctrl-C": (signal.SIGINT, True),
}
KINDS = (*SIGNALS, "dead worker", "full disk")
GENTLE = ("SIGTERM", "Ctrl-C")  # signals that a command can answer
# Small, but with every kind of unit: checkpoints, features, retrainings alone and in stacks.
SETTINGS = {"num_models": 4, "epochs": 4, "jobs": 2}
COMMANDS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "ablation": {"num_seeds": 12, "arms": "none,random,harmful,loss"},
    "evaluate": {"num_subsets": 10, "num_repeats": 2, "brittleness_targets": 2},
    "explain": {},
}
# Files that have to be equal to the last bit, and metrics that differ each time.
RESULTS = ("model.safetensors", "logits.npz", "scores.npy", "suspects.csv", "comparison.csv",
           "per_class.csv", "margins.npy", "evaluation.csv", "brittleness.csv", "explanation.csv")  # fmt: skip
TIMES = ("seconds", "milliseconds_per_gradient")
# Seconds after which a process that is left is an orphan. The agents of a killed Ray driver wait a
# minute for their control server.
LEAVE = {"local": 5.0, "ray": 75.0}
TIME_LIMIT = 900.0  # seconds until a command counts as hanging
START_UP = 15.0  # seconds, at most, from the start to the kill of a command without a unit
PAUSE = 2.0  # seconds, at most, between a finished unit and the kill
COUNTED = ("failed", "kept", "lost", "different", "orphans", "badly_marked", "silent")
SLOWEST = ("slowest_stop", "last_left")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    parser.add_argument("--trials", type=int, default=25, help="trials per backend")
    parser.add_argument("--backends", nargs="+", default=["local"], choices=("local", "ray"))
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="full disk needs root"
    )
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=tuple(COMMANDS))
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the trials. One row per backend, kind of fault and stage that was interrupted.

    A moment is a number of finished units of work (a checkpoint, features of one checkpoint, a
    retraining), drawn from none to all of an undisturbed command, and a pause. So it does not depend
    on the speed of the machine. The columns count:

    failed: commands that hung, or did not end with exit code 0 when they were run again.
    kept: finished units at the time of the kill. lost: those of them that were computed again.
    different: result files and metrics that differ from the undisturbed run.
    orphans: processes left after LEAVE seconds. last_left: seconds until the last one had left.
    badly_marked: runs that a gentle signal left neither KILLED nor FINISHED.
    silent: commands that a full disk ended without a line `error: ...`.
    slowest_stop: seconds from a gentle signal to the end of the command.
    """
    trials = []
    for backend in options.backends:
        draw = random.Random(f"{options.seed}/{backend}")
        expected = {name: undisturbed(name, backend) for name in options.commands}
        for number in range(options.trials):
            name = options.commands[number % len(options.commands)]
            kind = draw.choice(options.kinds)
            trial: dict[str, Any] = {"backend": backend, "kind": kind, "stage": ""}
            with new_place(name, backend, small_disk=kind == "full disk") as place:
                try:
                    trial |= Trial(place, kind, draw, *expected[name]).run()
                except (RuntimeError, TimeoutError) as error:
                    trial |= {"failed": 1, "reason": str(error)}
            trials.append(trial)
            print(trial, file=sys.stderr, flush=True)
    return _summary(trials)


def _summary(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = ["backend", "kind", "stage"]
    table = pd.DataFrame(trials).reindex(columns=[*groups, *COUNTED, *SLOWEST]).fillna(0)
    columns: dict[str, Any] = {"trials": ("failed", "size")}
    columns |= {name: (name, "sum") for name in COUNTED}
    columns |= {name: (name, "max") for name in SLOWEST}
    return table.groupby(groups).agg(**columns).reset_index().to_dict("records")


@dataclass
class Place:
    """A tracking store and a cache of its own, and the command that fills them."""

    folder: Path
    command: str
    backend: str
    seen: set[str] = field(default_factory=set)  # every unit of work that was there at some time

    @property
    def err(self) -> Path:
        """What the commands wrote to stderr. Not in the folder, whose disk may be full."""
        return self.folder.with_name(f"{self.folder.name}.err")

    def start(self) -> subprocess.Popen:
        """Start the command as leader of a new session, whose other processes are its own."""
        given = {**SETTINGS, **COMMANDS[self.command], "backend": self.backend}
        flags = [f"--{name}={value}" for name, value in given.items()]
        with self.err.open("a") as err:
            return subprocess.Popen(
                [sys.executable, "-m", f"scripts.{self.command}", *flags],
                cwd=self.folder,
                env=command_environment(self.folder / "cache") | {"TMPDIR": str(self.folder)},
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
                # A shell starts background processes with Ctrl-C ignored, which children inherit.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait_for(self, process: subprocess.Popen, units: int, pause: float) -> None:
        """Wait until that many units have been seen and the pause is over, or the command ended."""
        while process.poll() is None and len(self.seen) < units:
            self.units()
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)

    def finish(self, process: subprocess.Popen, before: dict[str, int]) -> int:
        """Wait for the end; return how many of the units in `before` were computed again.

        Raises:
            RuntimeError: the command failed.
            TimeoutError: the command hangs.
        """
        again, deadline = set(), time.monotonic() + TIME_LIMIT
        while process.poll() is None:
            now = self.units()
            again |= {unit for unit in before if now.get(unit, before[unit]) != before[unit]}
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.command}: still running after {TIME_LIMIT:g} s")
            time.sleep(0.1)
        if process.returncode:
            raise RuntimeError(self.err.read_text()[-2000:])
        return len(again)

    def units(self) -> dict[str, int]:
        """The finished units of work in the cache, and when each was written, in nanoseconds."""
        work, found = self.folder / "cache" / "work", {}
        for name, _, files in os.walk(work):  # unlike rglob, walk accepts that folders disappear
            folder = Path(name)
            if any(part.startswith(".") for part in folder.relative_to(work).parts):
                continue
            units = [folder] if {"grads.mmap", "logits.npz"} & set(files) else []
            if folder.name == "retrainings":
                units = [folder / file for file in files if re.fullmatch(r"[^.].*\.npz", file)]
            for unit in units:
                with contextlib.suppress(OSError):
                    found[str(unit.relative_to(work))] = unit.stat().st_mtime_ns
        self.seen |= found.keys()
        return found

    def runs(self) -> list[Any]:
        """All MLflow runs, oldest first."""
        database = self.folder / "mlflow.db"
        if not database.exists():
            return []
        return list(
            MlflowClient(f"sqlite:///{database}").search_runs(["0"], order_by=["start_time"])
        )

    def stage(self) -> str:
        """The stage that is being computed, or was when the command ended."""
        runs = self.runs()
        unfinished = [
            r.data.tags.get("stage", "start") for r in runs if r.info.status != "FINISHED"
        ]
        return unfinished[-1] if unfinished else ("finished" if runs else "start")

    def results(self) -> dict[str, str]:
        """Hash of every result file and all metrics of the FINISHED runs, by stage and name."""
        found: dict[str, str] = {}
        for run in self.runs():
            tags = run.data.tags
            if run.info.status != "FINISHED" or "reused_run_id" in tags:
                continue
            nested = "" if "fingerprint" in tags else run.info.run_name
            name = f"{tags['stage']}/{nested}"
            metrics = {k: v for k, v in run.data.metrics.items() if k not in TIMES}
            found[f"{name}/metrics"] = json.dumps(metrics, sort_keys=True)
            for root in self.folder.rglob(f"{run.info.run_id}/artifacts"):
                for file in root.rglob("*"):
                    if file.name in RESULTS:
                        content = hashlib.sha256(file.read_bytes()).hexdigest()
                        found[f"{name}/{file.relative_to(root)}"] = content
        return found


@contextlib.contextmanager
def new_place(command: str, backend: str, small_disk: bool = False) -> Iterator[Place]:
    """An empty place; with `small_disk` on a disk of 400 MiB, which only root can mount."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = Place(Path(folder), command, backend)
        if small_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", folder], check=True)
        try:
            yield place
        finally:
            place.err.unlink(missing_ok=True)
            if small_disk:
                subprocess.run(["umount", "--lazy", folder], check=True)


def undisturbed(command: str, backend: str) -> tuple[int, dict[str, str]]:
    """Run the command once without a fault; return its number of units and its results."""
    with new_place(command, backend) as place:
        place.finish(place.start(), before={})
        return len(place.seen), place.results()


@dataclass
class Trial:
    """One command that is disturbed once or twice, and then run to its end.

    Attributes:
        units, results: of an undisturbed run.
    """

    place: Place
    kind: str
    draw: random.Random
    units: int
    results: dict[str, str]

    def run(self) -> dict[str, Any]:
        """Disturb the command, run it again, and count what went wrong, as `run` above says."""
        times = 2 if self.kind == "SIGKILL twice" else 1
        moments = sorted(self.draw.randint(0, self.units) for _ in range(times))
        outcomes = [self.disturb(units) for units in moments]
        orphans = sum(each.get("orphans", 0) for each in outcomes)
        found: dict[str, Any] = {"moments": moments, **outcomes[-1], "orphans": orphans}
        if self.kind != "dead worker":  # there the disturbed command itself has to finish
            before = self.place.units()
            found |= {"kept": len(before), "lost": self.place.finish(self.place.start(), before)}
        results = self.place.results()
        found["different"] = sum(results.get(key) != wanted for key, wanted in self.results.items())
        return found

    def disturb(self, units: int) -> dict[str, Any]:
        """Start the command, do what the kind says after that many units, and wait for its end."""
        process = self.place.start()
        pause = self.draw.uniform(0, PAUSE if units else START_UP)
        self.place.wait_for(process, units, pause)
        if self.kind == "dead worker":
            stage = self.place.stage()
            workers = _workers(process.pid)
            if workers:
                _kill(self.draw.choice(workers))
            self.place.finish(process, before={})
            return {"stage": stage}
        if self.kind == "full disk":
            silent = self.fill_disk(process)
            return {"stage": self.place.stage(), "silent": int(silent)}
        start = time.monotonic()
        if process.poll() is None:
            number, to_all = SIGNALS[self.kind]
            (os.killpg if to_all else os.kill)(process.pid, number)
            process.wait(TIME_LIMIT)
        found: dict[str, Any] = {"stage": self.place.stage()}
        if self.kind in GENTLE:
            found["slowest_stop"] = time.monotonic() - start
            states = [run.info.status for run in self.place.runs()]
            found["badly_marked"] = sum(state not in ("KILLED", "FINISHED") for state in states)
            if found["badly_marked"]:
                found["stderr"] = self.place.err.read_text()[-2000:]
        found["orphans"], found["last_left"] = _orphans(
            process.pid, LEAVE["local" if self.kind in GENTLE else self.place.backend]
        )
        return found

    def fill_disk(self, process: subprocess.Popen) -> bool:
        """Fill the disk until the command ends; whether it failed without saying why."""
        filler = self.place.folder / "filler"
        with filler.open("wb", buffering=0) as out, contextlib.suppress(OSError):
            while True:
                out.write(bytes(1 << 16))
        code = process.wait(TIME_LIMIT)
        filler.unlink()
        lines = self.place.err.read_text().splitlines()[-3:]
        return code != 0 and not any(line.startswith("error: ") for line in lines)


def _session(leader: int) -> list[int]:
    """Living processes of a session, without its leader."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, *fields = stat.read_text().rpartition(")")[2].split()
            number = int(stat.parent.name)
            if int(fields[2]) == leader and state != "Z" and number != leader:
                found.append(number)
    return found


def _workers(leader: int) -> list[int]:
    """The session's processes that compute: loky's or Ray's workers."""
    found = []
    for number in _session(leader):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{number}/cmdline").read_bytes()
            if b"popen_loky" in words or b"ray::" in words:
                found.append(number)
    return found


def _orphans(leader: int, seconds: float) -> tuple[int, float]:
    """Kill what is left of a session after that time: how many, and when the last one had left."""
    start = time.monotonic()
    while (left := _session(leader)) and time.monotonic() < start + seconds:
        time.sleep(0.1)
    took = time.monotonic() - start
    for number in left:
        _kill(number)
    return len(left), took


def _kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
