"""Looks for known vulnerabilities of the locked packages with pip-audit; exit code 1 where there is one.

    python .ci/audit.py locks/requirements-dev.lock

A finding is excused by a line `ID reason` in audit-excused.txt beside this file. Where the data cannot
be had, the last line says NOT AUDITED: neither a finding nor a clean bill.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

EXCUSED = Path(__file__).with_name("audit-excused.txt")
NO_DATA = re.compile(r"^requests\.exceptions\.|ServiceError|connect", re.IGNORECASE)


def excused(text: str) -> list[str]:
    """The ids of a list of excuses.

    Raises:
        ValueError: one has no reason.
    """
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line[:1] not in ("", "#")]
    for line in lines:
        if len(line) < 2:
            raise ValueError(f"{EXCUSED.name}: {line[0]} has no reason")
    return [line[0] for line in lines]


def verdict(out: str, err: str) -> tuple[int, str]:
    """An exit code and what to say, from what pip-audit left on its two streams."""
    try:
        packages = json.loads(out)["dependencies"]
    except ValueError:
        last = (err.strip().splitlines() or ["nothing was said"])[-1]
        if NO_DATA.search(last):
            return 0, f"NOT AUDITED: pip-audit's data cannot be had here ({last.split(':')[0]})"
        return 1, f"pip-audit failed: {err}"
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        return 0, f"NOT AUDITED: pip-audit's data cannot be had here (of {len(packages)} packages)"
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {found['fix_versions']}"
        for package in known
        for found in package["vulns"]
    ]
    lines += [package["skip_reason"] for package in packages if package not in known]
    return bool(lines), "\n".join(lines) or f"{len(known)} packages without a known vulnerability"


def main(lock: str) -> int:
    """Audit one lock and say what came of it."""
    ids = excused(EXCUSED.read_text())
    command = [sys.executable, "-m", "pip_audit", "--requirement", lock, "--disable-pip"]
    command += ["--require-hashes", "--format", "json", "--progress-spinner", "off"]
    command += [f"--ignore-vuln={each}" for each in ids]
    done = subprocess.run(command, capture_output=True, text=True)
    code, text = verdict(done.stdout, done.stderr)
    print(f"audit of {lock}: {text}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
