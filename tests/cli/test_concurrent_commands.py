"""Two commands at once, and commands whose tracking server fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from places import Place

from attribution.cli.main import run_command

NewPlace = Callable[..., Place]

pytestmark = pytest.mark.slow


def finetune(folder: Path, environment: dict[str, str], argv: list[str], name: str) -> None:
    """The command in a process of its own; what it says goes to two files."""
    os.chdir(folder)
    os.environ.update(environment)
    out, err = (folder / f"{name}.{end}" for end in ("out", "err"))
    with (
        contextlib.redirect_stdout(out.open("w", buffering=1)),
        contextlib.redirect_stderr(err.open("w", buffering=1)),
    ):
        sys.exit(run_command("finetune", argv))


def test_two_commands_at_once_on_a_new_store_make_one_result(new_place: NewPlace) -> None:
    place = new_place("two")
    environment = place.environment | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{place.root / 'new.db'}",
        "MLFLOW_EXPERIMENT_NAME": "Default",
    }
    # Processes that are forked from one that has imported everything start at the same time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.finetune"])
    argv = place.argv("finetune", num_models=1, epochs=1)
    both = [
        context.Process(target=finetune, args=(place.root, environment, argv, name))
        for name in ("one", "two")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=300)
    out, err = (
        [(place.root / f"{n}.{end}").read_text() for n in ("one", "two")] for end in ("out", "err")
    )
    assert [process.exitcode for process in both] == [0, 0], err
    ids = {text.split("finetune run: ")[1].split()[0] for text in out}
    assert len(ids) == 1
    assert sum("reusing run" in text for text in err) == 1
    assert sum("another process is making it" in text for text in err) == 1


def test_a_result_is_finished_before_another_process_may_look_for_it(
    new_place: NewPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock, Timeout

    place, held = new_place("order"), []
    end_run = mlflow.end_run

    def watched(*args: Any) -> None:
        if mlflow.active_run():
            for file in (place.cache / "locks").glob("????????????????.lock"):
                try:
                    FileLock(file).acquire(timeout=0)
                except Timeout:
                    held.append(file.stem)
        end_run(*args)

    monkeypatch.setattr(mlflow, "end_run", watched)
    result = place.done("finetune")
    assert [result.tags["fingerprint"][:16]] == held


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A tracking server that answers everything with `server.status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(self.server.status)

        do_POST = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "MLFLOW_TRACKING_USERNAME"), (403, "MLFLOW_TRACKING_USERNAME"), (500, "500")],
)
def test_a_server_that_refuses_or_fails(
    new_place: NewPlace, server, monkeypatch, capsys, status: int, words: str
) -> None:
    server.status = status
    place = new_place("server")
    uri = f"http://127.0.0.1:{server.server_port}"
    with place.active():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        code = run_command("finetune", place.argv("finetune"))
    err = capsys.readouterr().err
    error, kept, command = err.strip().splitlines()[-3:]
    assert code == 1 and error.startswith(f"error: MLFLOW_TRACKING_URI={uri}: ")
    assert words in error and "Traceback" not in err
    assert str(place.cache / "work") in kept
    assert command.startswith("python -m scripts.finetune --dataset=")  # alone on its line
