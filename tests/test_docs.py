"""What docs/design.md and CONTRIBUTING.md say of the code's layout is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in (ROOT / "attribution").glob("[a-z]*.py")}


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "attribution":
                found |= {module} if module else {alias.name for alias in node.names}
    return found


def test_the_flow_of_modules_is_the_one_in_design_md() -> None:
    section = (ROOT / "docs" / "design.md").read_text().split("## The flow of modules")[1]
    lines = [line.split() for line in section.split("\n## ")[0].splitlines() if line[:4] == "    "]
    assert sorted(sum(lines, [])) == sorted(MODULES)
    above: set[str] = set()
    for line in lines:
        for module in line:
            assert imported(MODULES[module]) <= above, module
        above |= set(line)


def test_the_map_has_every_module_once() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## The map")[1].split("\n## ")[0]
    named = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)\.py`", " ".join(named))) == sorted(MODULES)


def test_names_in_code_quotes_are_in_the_code() -> None:
    """`module.name` in the documents is an attribute that the module's source defines."""
    for document in ("CONTRIBUTING.md", "docs/design.md"):
        text = (ROOT / document).read_text()
        for module, name in re.findall(r"`(\w+)\.(\w+)`", text):
            if module in MODULES and name != "py":
                source = MODULES[module].read_text()
                assert re.search(rf"\b(def|class) {name}\b|^{name}\b", source, re.MULTILINE), name
