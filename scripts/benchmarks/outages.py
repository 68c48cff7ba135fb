"""A tracking server that misbehaves in the middle of a command: does everything arrive in the end?"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks.faults import PATIENCE, different, new_place

KINDS = ("stopped", "500s", "silent", "for good", "wrong password")
REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--trials", type=int, default=2, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--outage", type=float, default=30, help="seconds")
    parser.add_argument("--store", default="", help="the server's, if not sqlite: postgresql://…")
    parser.add_argument("--command", default="ablation", help="that is disturbed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a command against `mlflow serve-artifacts`, and disturb what lies between.

    A row a kind: `first_exit`, exit codes of the disturbed commands; `ended`, commands that finished
    (for good: by the same command, once the server was there again); `different`, results or metrics
    that did not arrive as in an undisturbed run; `told`, error lines with the path and the command.
    """
    name, draw = options.command, random.Random(options.seed)
    with new_place(name, "local") as place:
        start = time.monotonic()
        place.finish()
        expected, seconds = place.results(), time.monotonic() - start
    rows = []
    for kind in options.kinds:
        trials = [disturb(kind, options, draw, seconds, expected) for _ in range(options.trials)]
        row: dict[str, Any] = {"store": options.store.partition(":")[0] or "sqlite", "kind": kind}
        row |= {"trials": len(trials), "first_exit": str(sorted({t["exit"] for t in trials}))}
        row |= {key: sum(t[key] for t in trials) for key in ("ended", "different", "told")}
        rows.append(row)
    return rows


def disturb(
    kind: str,
    options: argparse.Namespace,
    draw: random.Random,
    seconds: float,
    expected: dict[str, str],
) -> dict[str, Any]:
    """One trial."""
    with (
        new_place(options.command, "local") as place,
        Server(place.folder, options.store) as server,
    ):
        if kind == "wrong password":
            server.stop()
            server.start("--app-name", "basic-auth")
        with Gate(server.port) as gate:
            place.environment = {
                "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{gate.port}",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            }
            if kind == "for good":  # so that the benchmark does not take minutes
                place.environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "3"
            if kind == "wrong password":
                place.environment |= {"MLFLOW_TRACKING_USERNAME": "admin"}
                place.environment |= {"MLFLOW_TRACKING_PASSWORD": "wrong-password"}
            process = place.start()
            if kind != "wrong password":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0.3 * seconds, seconds))
                _outage(kind, options.outage, server, gate, process)
            code = process.wait(PATIENCE)
            said = place.err.read_text().strip().splitlines()
            if kind == "for good":
                gate.mode = "pass"
                server.start()
                place.finish()
            if kind == "wrong password":
                ended, differ = 1, 0
            else:
                ended, differ = 1, different(place.results(), expected)
        if code and os.environ.get("VERBOSE"):
            print(said[-4:], file=sys.stderr)
        told = any(line.startswith("error: MLFLOW_TRACKING_URI=") for line in said[-3:])
        print({"kind": kind, "exit": code, "different": differ, "said": said[-2:]}, file=sys.stderr)
        return {"exit": code, "ended": ended, "different": differ, "told": int(told)}


def _outage(kind: str, seconds: float, server: Server, gate: Gate, process: Any) -> None:
    if kind in ("stopped", "for good"):
        server.stop()
        if kind == "for good":
            return
    else:
        gate.mode = kind
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    if kind == "stopped":
        server.start()
    gate.mode = "pass"


class Server:
    """`mlflow server` on this machine, artifacts through it, which can be stopped and started."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store or f"sqlite:///{folder / 'server.db'}"
        self.port = _free_port()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        words = ["--backend-store-uri", self.store, "--port", str(self.port), "--workers", "1"]
        words += ["--artifacts-destination", str(self.folder / "mlartifacts"), *options]
        environment = {**os.environ, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-no-worth"}
        with (self.folder / "server.txt").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise RuntimeError((self.folder / "server.txt").read_text()[-2000:]) from None
                time.sleep(0.3)

    def stop(self) -> None:
        """End it, with all its processes, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Gate:
    """A port that passes everything on to another one, or as `mode` says: '500s', 'silent'."""

    def __init__(self, target: int) -> None:
        self.target, self.mode = target, "pass"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self) -> Gate:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.mode == "silent":
                while self.mode == "silent":
                    time.sleep(0.2)
                return
            if self.mode == "500s":
                client.recv(1 << 16)
                client.sendall(REFUSAL)
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                back = threading.Thread(target=_pump, args=[server, client], daemon=True)
                back.start()
                for data in self._received(client):
                    server.sendall(data)

    def _received(self, client: socket.socket) -> Iterator[bytes]:
        """What comes until the mode changes: a connection that is kept open would miss it."""
        while self.mode == "pass":
            if not select.select([client], [], [], 0.2)[0]:
                continue
            data = client.recv(1 << 16)
            if not data:
                return
            yield data


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
