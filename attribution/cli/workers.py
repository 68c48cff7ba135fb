"""Worker processes that start while the command itself still imports and prepares."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from attribution.config import Config, resolve


def start(stage: str, given: dict[str, Any]) -> None:
    """Let workers import what tasks need, if there is a core for them and probably work."""
    known = ("backend", "jobs", "device", "num_models")
    config = resolve({name: given[name] for name in known if name in given})
    if config.backend != "local" or stage == "explain" or config.jobs == 1 or _may_use_gpu(config):
        return
    from attribution.runtime import parallel  # numpy: not for --help

    jobs = parallel.resolve_jobs(config.jobs, "cpu", config.num_models)
    if jobs > 1 and parallel.resolve_jobs(0, "cpu", 2) > 1:
        parallel.start_workers(jobs, _warm_up)


def _may_use_gpu(config: Config) -> bool:
    """Whether a GPU may be there, without importing torch to ask."""
    return config.device != "cpu" and (config.device != "auto" or Path("/dev/nvidiactl").exists())


def _warm_up() -> None:
    from attribution.models import classifier

    classifier.warm_up()


def end() -> None:
    """End this process's workers, which would take seconds to end by themselves."""
    parallel = sys.modules.get("attribution.runtime.parallel")
    if parallel:
        parallel.end_workers()
