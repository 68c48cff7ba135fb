"""The start and the end of every command: flags, signals, errors, exit codes.

What takes seconds to import (torch, MLflow) is imported after the flags have been checked.
"""

from __future__ import annotations

import importlib
import io
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from attribution.cli import flags
from attribution.config import resolve
from attribution.errors import InputError, StoreFailure, redact
from attribution.runtime.progress import say
from attribution.runtime.signals import end, ended_by_signals
from attribution.stages import STAGES

BAD_INPUT, FAILED = 2, 1


def main(stage: str) -> NoReturn:
    """Run the stage's command with this process's arguments, and end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack characters such as ±
    code = run_command(stage, sys.argv[1:])
    if "torch" in sys.modules:  # which Python would take seconds to take apart
        end(code)
    sys.exit(code)


def run_command(stage: str, argv: Sequence[str]) -> int:
    """Run one command: parse its flags, reuse or compute the stage, show the result.

    Returns:
        The exit code: 0; 2 for bad input; 1 where the tracking store or a disk failed, or a replay
        differs; 128 + the signal's number where a signal stopped the command.
    """
    with ended_by_signals() as received:
        try:
            given = flags.parse(stage, argv)
            flags.check(given)
            if not any(given.get(name) for name in ("trak_run_id", "finetune_run_id", "replay")):
                resolve(given)  # a value out of bounds is refused before the slow imports
            if sys.stderr.isatty():
                say("loading PyTorch and MLflow, which takes some seconds")
            kind = "replicate" if given.get("num_splits", 1) > 1 else "command"
            return importlib.import_module(f"attribution.cli.{kind}").run(STAGES[stage], given)
        except KeyboardInterrupt:
            return _stopped(received)
        except Exception as error:
            return _stopped(received) if received else _failed(error, stage, argv)


def _failed(error: Exception, stage: str, argv: Sequence[str]) -> int:
    if not isinstance(error, InputError | StoreFailure):  # an error of the code itself
        say(redact(traceback.format_exc()))
        return FAILED
    say(f"error: {error}")
    if isinstance(error, InputError):
        return BAD_INPUT
    say(f"what is finished is kept in {error.kept}. To continue from there and log it, type:")
    say(shlex.join(["python", "-m", f"scripts.{stage}", *argv]))
    return FAILED


def _stopped(received: list[int]) -> int:
    say("stopped; the same command continues from what is finished")
    return 128 + (received[0] if received else signal.SIGINT)
