"""The locks agree with their requirements files, and CI reads pip-audit's answers correctly."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("locks/requirements.lock", "locks/requirements-dev.lock")
MADE_OF = {
    "requirements.txt": "locks/requirements.lock",
    "requirements-dev.txt": "locks/requirements-dev.lock",
}
AUDIT = runpy.run_path(str(ROOT / ".ci" / "audit.py"))


def entries(lock: str) -> list[tuple[Requirement, list[str]]]:
    """Every entry of a lock with its hashes; a backslash continues a line, as for pip."""
    text = re.sub(r"^\s*#.*\n?", "", (ROOT / lock).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    split = [re.split(r"\s+--hash=", line.strip()) for line in lines if line.strip()]
    return [(Requirement(first), hashes) for first, *hashes in split]


def pinned(lock: str) -> dict[str, str]:
    """Version by name of the packages that this machine and Python would install."""
    here = [entry for entry, _ in entries(lock) if not entry.marker or entry.marker.evaluate()]
    versions = {canonicalize_name(e.name): str(e.specifier).removeprefix("==") for e in here}
    assert len(versions) == len(here), f"{lock} pins a package twice"
    return versions


def wanted(file: str) -> Iterable[Requirement]:
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            yield from wanted(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            yield Requirement(line)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_is_one_version_with_hashes(lock: str) -> None:
    found = entries(lock)
    assert len(found) > 100
    for entry, hashes in found:
        assert re.fullmatch(r"==[0-9][^*,]*", str(entry.specifier)) and not entry.url, entry
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), entry


@pytest.mark.parametrize("file", MADE_OF)
def test_a_lock_satisfies_every_line_of_its_requirements(file: str) -> None:
    versions = pinned(MADE_OF[file])
    for requirement in wanted(file):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked"


def test_both_locks_agree() -> None:
    runtime, development = map(pinned, LOCKS)
    assert runtime.items() <= development.items()


@pytest.mark.parametrize("lock", LOCKS)
def test_torch_and_torchvision_are_the_pair_of_the_requirements(lock: str) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for name in ("torch", "torchvision"):
        assert f"{name}=={pinned(lock)[name]}" in lines


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_every_dependency_of_its_packages(lock: str) -> None:
    """Checked with the metadata of those packages that are installed in the locked version."""
    versions, looked_at = pinned(lock), 0
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if versions.get(name) != distribution.version:
            continue
        looked_at += 1
        for needed in map(Requirement, distribution.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                version = versions[canonicalize_name(needed.name)]
                assert needed.specifier.contains(version, prereleases=True), f"{name}: {needed}"
    if not looked_at:
        pytest.skip("nothing is installed in a locked version")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_address_and_no_place(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links|\s/|file:|\.whl", text)


def answer(*packages: dict) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


CLEAN = {"name": "pillow", "version": "13.0.0", "vulns": []}
HIT = {
    "name": "mlflow",
    "version": "3.17.2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.18"], "aliases": [], "description": "bad"}],
}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found: torch (2.15.0)"}


@pytest.mark.parametrize(
    ("out", "err", "code", "said"),
    [
        (answer(CLEAN), "", 0, "1 packages without"),
        (answer(CLEAN, HIT), "Found 1 known vulnerability", 1, "mlflow 3.17.2: PYSEC-1"),
        (answer(UNKNOWN, HIT), "", 1, "PYSEC-1"),
        (answer(CLEAN, UNKNOWN), "", 1, "not found: torch"),
        (answer(UNKNOWN, UNKNOWN), "No known vulnerabilities found", 0, "NOT AUDITED"),
        ("", "Traceback\nrequests.exceptions.ConnectionError: no route", 0, "NOT AUDITED"),
        ("", "error: Could not connect to the vulnerability feed", 0, "NOT AUDITED"),
        ("", "usage: pip-audit\nerror: unrecognized arguments", 1, "unrecognized"),
        ("", "/usr/bin/python: No module named pip_audit", 1, "No module"),
    ],
)
def test_no_finding_passes_and_no_silence_is_called_clean(
    out: str, err: str, code: int, said: str
) -> None:
    found, text = AUDIT["verdict"](out, err)
    assert found == code and said in text
    assert ("without a known vulnerability" in text) == (out == answer(CLEAN))


def test_an_excuse_needs_a_reason() -> None:
    assert AUDIT["excused"]("# why\n\nPYSEC-1 never called, until 3.18\n") == ["PYSEC-1"]
    with pytest.raises(ValueError, match="PYSEC-2"):
        AUDIT["excused"]("PYSEC-1 never called\nPYSEC-2\n")


def test_the_excuses_of_this_project_have_reasons() -> None:
    AUDIT["excused"]((ROOT / ".ci" / "audit-excused.txt").read_text())
