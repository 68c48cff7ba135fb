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
from unittest import mock

from benchmarks.faults import (
    PATIENCE,
    PAUSE,
    Undisturbed,
    different,
    new_place,
    undisturbed,
)

KINDS = ("stopped", "500s", "silent", "for good", "wrong password")
PASSWORD = "the-right-password"
REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--trials", type=int, default=2, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--outage", type=float, default=30, help="seconds")
    parser.add_argument("--store", default="", help="where the server's databases are made, if not "
                        "sqlite: postgresql+psycopg2://USER@HOST:PORT/postgres")  # fmt: skip
    parser.add_argument("--command", default="ablation", help="that is disturbed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a command against `mlflow server`, and disturb what lies between at a random moment.

    A moment is a number of finished units of work, as in `faults`. Where the command ended with an
    error, the same one is typed again once the server is well (and the password right).

    A row a kind: `first_exit`, exit codes of the disturbed commands, and `told`, those of them that
    named the server in a line of their own; `lost`, finished units of work that the second command
    made again; `different`, results or metrics that did not arrive as in an undisturbed run;
    `running`, runs that are RUNNING when all has ended; `seconds`, of the slowest first command.
    """
    name, draw = options.command, random.Random(options.seed)
    expected = undisturbed(name, "local")
    rows = []
    for kind in options.kinds:
        trials = [disturb(kind, options, draw, expected) for _ in range(options.trials)]
        row: dict[str, Any] = {"store": options.store.partition(":")[0] or "sqlite", "kind": kind}
        row |= {"trials": len(trials), "first_exit": str(sorted({t["exit"] for t in trials}))}
        row |= {k: sum(t[k] for t in trials) for k in ("told", "lost", "different", "running")}
        rows.append(row | {"seconds": max(t["seconds"] for t in trials)})
    return rows


def disturb(
    kind: str, options: argparse.Namespace, draw: random.Random, expected: Undisturbed
) -> dict[str, Any]:
    """One trial."""
    wrong = kind == "wrong password"
    with (
        new_place(options.command, "local") as place,
        database(options.store, place.folder) as store,
        Server(place.folder, store, ["--app-name", "basic-auth"] if wrong else []) as server,
        Gate(server.port) as gate,
    ):
        place.environment = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{gate.port}",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        }
        if kind == "for good":  # so that the benchmark does not take minutes
            place.environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "3"
        if wrong:
            place.environment |= {"MLFLOW_TRACKING_USERNAME": "admin"}
            place.environment |= {"MLFLOW_TRACKING_PASSWORD": "not-the-password"}
        process, start = place.start(), time.monotonic()
        if not wrong:
            place.wait(process, draw.randint(0, expected.units), draw.uniform(0, PAUSE))
            _outage(kind, options.outage, server, gate, process)
        code, seconds = process.wait(PATIENCE), time.monotonic() - start
        said, lost = place.err.read_text().strip().splitlines(), 0
        if kind == "for good":
            server.start()
        if wrong:
            place.environment["MLFLOW_TRACKING_PASSWORD"] = PASSWORD
        if code:
            lost = place.finish()
        # For this process too: MLflow's client takes the password from there.
        with mock.patch.dict(os.environ, place.environment):
            found, states = place.results(), [run.info.status for run in place.runs()]
    trial = {
        "kind": kind,
        "exit": code,
        "seconds": seconds,
        "told": int(any(line.startswith("error: MLFLOW_TRACKING_URI=") for line in said[-3:])),
        "lost": lost,
        "different": different(found, expected.results),
        "running": states.count("RUNNING"),
    }
    print(trial, *said[-2:] * bool(code), sep="\n  ", file=sys.stderr, flush=True)
    return trial


@contextlib.contextmanager
def database(address: str, folder: Path) -> Iterator[str]:
    """The address of a new database, in a file or where this one lies."""
    if not address:
        yield f"sqlite:///{folder / 'server.db'}"
        return
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url

    name = f"outages_{os.getpid()}_{time.time_ns()}"
    engine = create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        yield make_url(address).set(database=name).render_as_string(hide_password=False)
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


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

    def __init__(self, folder: Path, store: str, options: list[str]) -> None:
        self.folder, self.store, self.options = folder, store, options
        self.port = _free_port()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        words = ["--backend-store-uri", self.store, "--port", str(self.port), "--workers", "1"]
        words += ["--artifacts-destination", str(self.folder / "mlartifacts"), *self.options]
        environment = {**os.environ, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-no-worth"}
        environment["MLFLOW_AUTH_ADMIN_PASSWORD"] = PASSWORD
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
