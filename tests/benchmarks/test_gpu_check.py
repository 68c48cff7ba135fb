"""gpu_check.sh with a `python` that plays the parts: exit codes, the summary, and the time limits."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.sh"


def run(folder: Path, device: str, failing: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script where torch sees `device` and the module `failing` ends with exit code 3."""
    fake = folder / "python"
    fake.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = -c ] && echo "{device}" && exit\n'
        'echo "$2 prints: the plain path is used"\n'
        f'[ "$2" != "{failing}" ] || exit 3\n'
    )
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", SCRIPT, folder / "logs"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, device="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("no GPU: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("failing", ["", "pytest", "scripts.ablation", "benchmarks"])
def test_each_part_has_a_summary_line_and_one_failure_fails_the_check(
    tmp_path: Path, failing: str
) -> None:
    done = run(tmp_path, device="Some GPU, 8 GiB", failing=failing)
    assert done.returncode == (1 if failing else 0), done.stderr
    before, _, summary = done.stdout.partition("== summary: Some GPU, 8 GiB\n")
    assert "prints: the plain path is used" in before
    parts = {"tests": "pytest", "ablation": "scripts.ablation", "features": "benchmarks"}
    lines = dict(line.split(": ", 1) for line in summary.splitlines())
    assert list(lines) == list(parts)
    for name, module in parts.items():
        wanted = "FAILED: exit code 3" if module == failing else "passed"
        assert lines[name].startswith(f"{wanted}, with 1 lines about the plain path")


def test_the_time_limits_add_up_to_less_than_8_minutes() -> None:
    limits = [int(each) for each in re.findall(r"^part \w+ (\d+) ", SCRIPT.read_text(), re.M)]
    assert len(limits) == 3 and sum(limits) + 3 * 5 < 480
