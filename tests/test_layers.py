"""The rooms of the house: a room imports only from rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Top floor first. The modules that lie in attribution/ itself are the ground.
FLOORS = (
    "benchmarks", "scripts", "cli", "reporting", "tracking", "experiments", "scores", "models",
    "data", "gradients", "runtime", "ground",
)  # fmt: skip
FILES = [
    file for top in ("attribution", "scripts", "benchmarks") for file in (ROOT / top).rglob("*.py")
]
OURS = {"attribution", "scripts", "benchmarks"}


def floor(module: str) -> str:
    """The floor of a dotted module name."""
    parts = module.split(".")
    if parts == ["attribution", "__init__"]:  # hands on public names of any room
        return "cli"
    if parts[0] != "attribution":
        return parts[0]
    is_room = len(parts) > 1 and (ROOT / "attribution" / parts[1]).is_dir()
    return parts[1] if is_room else "ground"


def imports(file: Path) -> set[str]:
    """Our modules that a file imports anywhere: at its top, in functions, for annotations."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_below_it(file: Path) -> None:
    own = floor(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for module in imports(file):
        other = floor(module)
        assert other == own or FLOORS.index(other) > FLOORS.index(own), module
        assert own != "gradients" or other == "gradients", f"gradients stands alone: {module}"
