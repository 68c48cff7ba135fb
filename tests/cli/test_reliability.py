"""Commands that are stopped, doubled, repeated, or left alone by their store."""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from places import Place, child_environment, refused

from attribution.errors import InputError
from attribution.runtime.signals import STOPPING, ended_by_signals
from attribution.tracking import database, replay
from attribution.tracking.run_lifecycle import end_dead_runs, open_run, signature
from benchmarks import faults

NewPlace = Callable[..., Place]
ROOT = Path(__file__).resolve().parents[2]


# -- signals ---------------------------------------------------------------------------------------


def cancel_timers() -> None:
    """Those that would end this process."""
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.cancel()


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_an_exception_and_the_next_one_is_not(number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)  # in a shell's background: ignored
    cleared_up = False
    with pytest.raises(KeyboardInterrupt), ended_by_signals() as asked:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)
            cleared_up = True
            cancel_timers()
    assert asked == [number] and cleared_up
    assert signal.signal(number, before) == signal.default_int_handler


def test_a_signal_is_not_lost_in_a_callback_whose_exceptions_python_drops() -> None:
    class Target:
        pass

    def callback(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    target = Target()
    kept = weakref.ref(target, callback)
    with pytest.raises(KeyboardInterrupt), ended_by_signals() as asked:
        del target
        time.sleep(2)
    assert kept() is None and asked == [signal.SIGTERM]
    cancel_timers()


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("block", ["signals.ended_by_signals()", "signals.stop_after()"])
def test_a_block_that_takes_too_long_to_end_is_cut_short(block: str) -> None:
    code = f"""if True:
        import os, signal, time
        from attribution.runtime import signals
        signals.GRACE_SECONDS = 0.1
        with signals.ended_by_signals(), {block}:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                time.sleep(60)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM


def test_the_end_runs_what_is_registered_and_does_not_take_itself_apart() -> None:
    code = """if True:
        import atexit
        from attribution.runtime import signals
        class Slow:
            def __del__(self):
                print("taken apart")
        slow = Slow()
        atexit.register(print, "cluster ended")
        print("said", end=", ")
        signals.end(3)"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, timeout=50, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said, cluster ended\n", "")


@pytest.mark.parametrize("code, expected", [(0, 1), (2, 2)])
def test_a_command_whose_output_could_not_be_written_has_failed(code: int, expected: int) -> None:
    program = f"from attribution.runtime import signals\nprint('said')\nsignals.end({code})"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, timeout=50, stdout=full, env=buffered)
    assert done.returncode == expected


def test_commands_stopped_at_random_moments_lose_nothing(
    new_place: NewPlace, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short version of `python -m benchmarks faults`."""
    place = new_place("faults")
    small = dict(flag[2:].split("=") for flag in place.argv("ablation"))
    monkeypatch.setattr(faults, "SETTINGS", small | {"jobs": 2})
    monkeypatch.setattr(faults, "COMMANDS", {"ablation": {}})
    options = argparse.Namespace(
        backends=["local"], commands=["ablation"], kinds=["Ctrl-C"], trials=2, seed=3, append=""
    )
    rows = faults.run(options)
    assert sum(row["trials"] for row in rows) == 2
    for name in ("failed", "lost", "different", "orphans", "badly_marked"):
        assert sum(row[name] for row in rows) == 0, rows


# -- two at once -----------------------------------------------------------------------------------


def test_two_commands_at_once_on_a_new_store_make_one_result(new_place: NewPlace) -> None:
    place = new_place("two")
    command = [sys.executable, "-m", "scripts.finetune", *place.argv("finetune")]
    environment = child_environment(place) | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{place.root / 'new.db'}",
        "MLFLOW_EXPERIMENT_NAME": "Default",
    }
    both = [
        subprocess.Popen(
            command, cwd=place.root, env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    ids = {out.split("finetune run: ")[1].split()[0] for out, _ in said}
    assert len(ids) == 1
    assert sum("reusing run" in err for _, err in said) == 1
    assert sum("another process is making it" in err for _, err in said) == 1


# -- the store -------------------------------------------------------------------------------------


@pytest.fixture
def new_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a store that is not there yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    return tmp_path / "new.db"


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'new.db'}")
    with pytest.raises(InputError, match="^MLFLOW_TRACKING_URI=sqlite:.*: cannot be written"):
        database.open_store(tmp_path / "cache")


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


def test_a_store_appears_whole_or_not_at_all(
    new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(database.os, "replace", killed)
        database.open_store(tmp_path / "cache")
    unfinished = new_store.with_name("new.db.unfinished")
    assert not new_store.exists() and unfinished.exists()
    # As a kill in the middle leaves it; under another name, for MLflow keeps what it has opened.
    other = tmp_path / "other.db.unfinished"
    other.write_bytes(unfinished.read_bytes()[:5000])
    (tmp_path / "other.db.unfinished-journal").write_bytes(b"half a journal")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    database.open_store(tmp_path / "cache")
    assert [file.name for file in tmp_path.glob("other*")] == ["other.db"]


def test_a_signal_that_a_library_turns_into_another_error_still_marks_the_run_killed(
    new_store: Path, tmp_path: Path
) -> None:
    database.open_store(tmp_path)
    with pytest.raises(RuntimeError), ended_by_signals(), open_run() as run:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            raise RuntimeError("of a library") from None
    cancel_timers()
    found = mlflow.MlflowClient().get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["stopped_by"]) == ("KILLED", "signal")
    with pytest.raises(RuntimeError), open_run() as run:  # which nobody stopped
        raise RuntimeError
    assert mlflow.MlflowClient().get_run(run.info.run_id).info.status == "FAILED"


def test_a_stopped_transaction_does_not_keep_the_run_from_being_marked(
    new_store: Path, tmp_path: Path
) -> None:
    """As where a signal comes between MLflow's opening of a transaction and its own clearing up."""
    database.open_store(tmp_path)

    def interrupted() -> None:
        connection = sqlite3.connect(new_store)
        connection.execute("BEGIN IMMEDIATE")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run() as run:
        interrupted()
    found = mlflow.MlflowClient().get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["stopped_by"]) == ("KILLED", "signal")


@pytest.mark.parametrize(
    ("function", "expected"), [("start_run", "KILLED"), ("end_run", "FINISHED")]
)
def test_a_run_is_begun_and_ended_whole(
    new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, expected: str
) -> None:
    database.open_store(tmp_path)
    whole = getattr(mlflow, function)

    def stopped(*given: Any, **named: Any) -> Any:
        if function == "end_run":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        found = whole(*given, **named)
        if function == "start_run":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return found

    monkeypatch.setattr(mlflow, function, stopped)
    reached = False
    with pytest.raises(KeyboardInterrupt), ended_by_signals(), open_run():
        reached = True
    cancel_timers()
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == expected and reached == (function == "end_run")
    assert mlflow.active_run() is None


def test_a_run_that_the_store_could_not_end_is_marked_when_it_answers_again(
    new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.open_store(tmp_path)
    client, whole = mlflow.MlflowClient, mlflow.MlflowClient.set_terminated
    failures = [MlflowException("the store does not answer")]

    def once(*given: Any) -> None:
        if failures:
            raise failures.pop()
        whole(*given)

    monkeypatch.setattr(client, "set_terminated", once)
    with pytest.raises(MlflowException), open_run() as run:
        pass
    assert client().get_run(run.info.run_id).info.status == "FAILED"


def test_what_a_dead_process_left_running_is_marked_by_the_next_command(
    new_store: Path, tmp_path: Path
) -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    database.open_store(tmp_path)
    client = mlflow.MlflowClient()

    def left(process: int, cache: Path = tmp_path) -> str:
        tags = {**signature(cache), "process": str(process)}
        return client.create_run("0", tags=tags).info.run_id

    def failed(**tags: str) -> str:
        run = client.create_run("0", tags={**signature(tmp_path), **tags}).info
        client.set_terminated(run.run_id, "FAILED", end_time=12345)
        return run.run_id

    expected = {
        left(dead.pid): "KILLED",
        left(os.getpid()): "KILLED",  # another process had this number
        left(sleeping.pid): "RUNNING",
        left(dead.pid, tmp_path / "another"): "RUNNING",  # perhaps of another container
        failed(stopped_by="signal"): "KILLED",  # as `mlflow run` leaves it after Ctrl-C
        failed(): "FAILED",
    }
    with open_run(tags=signature(tmp_path)) as run:
        end_dead_runs(tmp_path)
        expected[run.info.run_id] = "RUNNING"
        runs = {name: client.get_run(name).info for name in expected}
        found = {name: info.status for name, info in runs.items()}
        assert {info.end_time for info in runs.values() if info.end_time} >= {12345}
    sleeping.kill()
    sleeping.wait()
    assert found == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MlflowException("API request failed with 401 Client Error"), "MLFLOW_TRACKING_PASSWORD"),
        (MlflowException("Max retries exceeded"), "Max retries exceeded"),
        (OSError(28, "No space left on device", "/disk/file"), "/disk/file"),
        (ValueError("a mistake of the code"), ""),
        (FileNotFoundError(2, "no such file", "x"), ""),
        (MlflowException.invalid_parameter_value("of the code too"), ""),
    ],
)
def test_what_is_told_in_a_line_and_what_is_not(error: Exception, words: str) -> None:
    told = database.failure(error)
    assert (words in told) if words else not told


def test_a_port_or_run_id_that_looks_like_a_refusal_is_none() -> None:
    error = MlflowException("host='127.0.0.1', port=46403: Max retries: /get?run_id=9401f and a403")
    assert "Max retries" in database.failure(error) and "PASSWORD" not in database.failure(error)


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
    new_place: NewPlace, server, status: int, words: str
) -> None:
    server.status = status
    place = new_place("server")
    uri = f"http://127.0.0.1:{server.server_port}"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.finetune", *place.argv("finetune")],
        cwd=place.root,
        env=child_environment(place)
        | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
        | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    error, go_on = done.stderr.strip().splitlines()[-2:]
    assert done.returncode == 1 and error.startswith(f"error: MLFLOW_TRACKING_URI={uri}: ")
    assert words in error and "Traceback" not in done.stderr
    assert str(place.cache / "work") in go_on and "python -m scripts.finetune --dataset=" in go_on


# -- replay ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(new_place: NewPlace) -> tuple[Place, Any, Any]:
    """A place with an ablation, and that run's replay."""
    place = new_place("replay")
    first = place.done("ablation")
    return place, first, place.done("ablation", replay=first.run_id)


def test_a_replay_makes_everything_anew_and_says_that_it_is_the_same(replayed) -> None:
    place, first, again = replayed
    assert again.made() == {"finetune", "trak", "ablation"}
    lines = dict(line.rsplit(None, 1) for line in again.out.splitlines() if line[:1] != " ")
    for name in (
        "finetune  checkpoints",
        "trak      scores/scores.npy",
        "ablation  comparison.csv",
    ):
        assert lines[name] == "identical", again.out
    assert f"replay of run {first.run_id}: identical" in again.out
    tags = place.client().get_run(again.run_id).data.tags
    assert tags["replay_of"] == first.run_id and tags["replay_result"] == "identical"
    assert not list((place.cache / "replays").rglob("*.*"))


def test_a_replay_is_never_reused_by_another_command(replayed) -> None:
    place, first, again = replayed
    assert first.run_id in place.done("ablation").err
    assert place.runs("trak")[-1].info.run_id != first.tags["trak_run_id"]
    assert again.tags["trak_run_id"] not in place.done("trak").err


def test_a_replay_that_differs_says_where_and_fails(replayed) -> None:
    place, first, _ = replayed
    file = place.artifacts(first.run_id) / "comparison.csv"
    kept = file.read_text()
    environment = place.artifacts(first.run_id) / "environment.json"
    then = environment.read_text()
    try:
        header, line, *rest = kept.splitlines()
        column = header.split(",").index("accuracy_mean")
        cells = line.split(",")
        cells[column] = str(float(cells[column]) + 0.25)
        file.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
        environment.write_text(then.replace('"torch": "', '"torch": "1'))
        result = place.run("ablation", replay=first.run_id)
    finally:
        file.write_text(kept)
        environment.write_text(then)
    assert result.code == 1
    assert "differs by at most 0.25 (accuracy_mean)" in result.out
    assert f"replay of run {first.run_id}: differs" in result.out
    assert "torch: 12." in result.err and " then, 2." in result.err


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a": [1.0, 2.0]}, ""),
        ({"a": [1.0, 2.5]}, "differs by at most 0.5 (a)"),
        ({"a": [1.0, np.nan]}, "not identical bit by bit"),
        ({"a": np.float32([1, 2])}, "not identical bit by bit"),
        ({"a": [1.0]}, "a: another shape"),
        ({"a": [1.0, 2.0], "b": [0]}, "b: another shape"),
    ],
)
def test_results_are_the_same_in_every_bit_or_are_said_to_differ(tmp_path, now, said) -> None:
    np.savez(tmp_path / "then.npz", a=[1.0, 2.0])
    np.savez(tmp_path / "now.npz", **now)
    assert replay._difference(tmp_path / "then.npz", tmp_path / "now.npz") == said


def test_what_cannot_be_replayed(replayed, images: Path, tmp_path: Path) -> None:
    place, first, _ = replayed
    refused(place, "ablation", "replay=nothing: no such run", replay="nothing")
    trak_id = first.tags["trak_run_id"]
    refused(place, "ablation", f"replay={trak_id}: is a run of stage trak", replay=trak_id)
    refused(place, "ablation", "frac=0.3: the run built on", replay=first.run_id, frac=0.3)


def test_a_run_records_what_it_was_made_with(replayed) -> None:
    import json

    place, first, _ = replayed
    trak_id = first.tags["trak_run_id"]
    finetune_id = place.client().get_run(trak_id).data.tags["finetune_run_id"]
    for run_id in (first.run_id, trak_id, finetune_id):
        found = json.loads((place.artifacts(run_id) / "environment.json").read_text())
        assert found["torch"] and found["cores"] and "processor" in found
        if (ROOT / ".git").exists():
            assert len(found["commit"]) == 40 and isinstance(found["commit_is_dirty"], bool)
