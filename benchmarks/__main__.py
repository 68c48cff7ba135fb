"""Measure what the project costs and what its settings are worth: `python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

WHAT = (
    "features", "scores", "training", "ablation", "precision", "peers", "defaults", "null", "faults",
)  # fmt: skip
NOT_A_COLUMN = ("part", "note")


def main() -> None:
    """Run one sub-benchmark, print its table, and write or log the table if asked."""
    options = _parser(sys.argv[1:2]).parse_args()
    import torch

    from attribution.runtime.machine import hardware

    if options.threads:
        torch.set_num_threads(options.threads)
    rows, machine = options.run(options), hardware()
    _print(rows, machine)
    if options.log or os.environ.get("MLFLOW_RUN_ID"):  # set by `mlflow run`, which made a run
        _log(options.what, rows, machine)
    if options.json:
        document = {"what": options.what, "hardware": machine, "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n")


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser, with the flags of the named sub-benchmark: importing all of them takes seconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(WHAT))
    for name in WHAT:
        source = Path(__file__).with_name(f"{name}.py")
        about = ast.get_docstring(ast.parse(source.read_text()))
        command = commands.add_parser(name, help=about.splitlines()[0], description=about)
        if name in words:
            module = importlib.import_module(f"benchmarks.{name}")
            command.set_defaults(run=module.run)
            command.add_argument("--repeats", type=int, default=5, help="measured rounds")
            command.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
            command.add_argument("--json", default="", help="file to write the table to")
            command.add_argument(
                "--log", action="store_true", help="log the table to an MLflow run"
            )
            module.add_options(command)
    return parser


def _log(what: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    import mlflow
    import pandas as pd

    with mlflow.start_run(run_name=f"benchmark {what}"):
        mlflow.set_tag("stage", "benchmark")
        mlflow.log_table(pd.DataFrame(rows), "benchmark.json")
        mlflow.log_params({"sub_benchmark": what, **machine})


def _print(rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Print one table per `part` of the rows, and under it each row's `note`."""
    from rich.console import Console

    console = Console(width=160)
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()), highlight=False)
    for part in dict.fromkeys(row.get("part", "") for row in rows):
        chosen = [row for row in rows if row.get("part", "") == part]
        console.print(_table(part, chosen))
        for row in chosen:
            if row.get("note"):
                console.print(f"{row['method']}: {row['note']}", highlight=False, markup=False)


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in NOT_A_COLUMN))
    for name in columns:
        table.add_column(name)
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in cells))
    return table


if __name__ == "__main__":
    main()
