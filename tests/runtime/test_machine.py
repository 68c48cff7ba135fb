"""The conditions of a measured result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from attribution.runtime import machine
from attribution.runtime.machine import PACKAGES, environment, hardware


def test_the_machine_is_told_with_the_versions_of_what_is_installed(monkeypatch) -> None:
    def known(name: str) -> str:
        if name == "ray":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(machine, "version", known)
    found = hardware()
    assert found["torch"] == version("torch") and found["mlflow"] == version("mlflow")
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1
    assert found["python"] == platform.python_version()
    others = {"date", "processor", "cores", "threads", "python", "gpu"}
    assert set(found) - others <= set(PACKAGES) - {"ray"}


def test_the_environment_has_the_command_without_credentials(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["finetune", "--model=https://ann:s3cret@host/x"])
    found = environment()
    assert found["command"] == ["finetune", "--model=https://***@host/x"]
    assert found.keys() - hardware().keys() == {"command"}


@pytest.mark.parametrize("text", ["processor: 0\nmodel name\t: A: B 9000\n", "no such line", None])
def test_the_processor_has_a_name_on_every_system(monkeypatch, text) -> None:
    def read(path: Path) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "")
    name = "A" if text and "model name" in text else platform.machine()
    assert machine._processor().startswith(f"{name} ({torch.backends.cpu.get_cpu_capability()}")
