"""README.md, docs/ and CONTRIBUTING.md against the code: sizes, commands, flags, paths, links and arms."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from attribution.cli.flags import parse
from attribution.config import FIELDS, resolve
from attribution.experiments.arms import ARMS, check_arms
from attribution.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = r"attribution|scripts|benchmarks|tests|docs|examples|locks|\.ci"
ROOMS = "|".join(path.name for path in (ROOT / "attribution").iterdir() if path.is_dir())

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[tuple[str, str]]:
    """Every `python -m MODULE ...` of a page: a script's name or a benchmark's, and its arguments."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"python -m (scripts\.\w+|benchmarks(?: \w+)?)([^\n`#;]*)", text)
    return [(module, arguments) for module, arguments in found if not module.endswith("NAME")]


def flags(module: str) -> set[str]:
    """The flags of a benchmark, or of every script."""
    if module.startswith("scripts."):
        return set(FIELDS) | {"help"}
    files = [ROOT / "benchmarks" / name for name in ("__main__.py", "common.py")]
    files += [ROOT / "benchmarks" / f"{name}.py" for name in module.split()[1:]]
    return {"help"}.union(*(re.findall(r'"--(\w+)"', file.read_text()) for file in files))


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_and_the_docs_stay_short() -> None:
    assert len(README.encode()) <= 9_000
    assert len((ROOT / "CONTRIBUTING.md").read_bytes()) <= 8_000
    assert sum(len(page.read_bytes()) for page in (ROOT / "docs").glob("*.md")) <= 70_000


def test_the_readme_has_no_date() -> None:
    assert not re.findall(r"20\d\d-\d\d-\d\d", README)


@each_page
def test_every_module_that_a_command_names_exists(page: Path) -> None:
    for module, _ in commands(page):
        if module == "scripts.STAGE":  # stands for any
            continue
        assert (ROOT / (module.replace(".", "/").replace(" ", "/") + ".py")).is_file() or (
            module == "benchmarks"
        ), module


@each_page
def test_every_flag_of_a_command_exists(page: Path) -> None:
    for module, arguments in commands(page):
        assert set(re.findall(r"(?<!\S)--(\w+)", arguments)) <= flags(module), (module, arguments)


@each_page
def test_every_command_of_a_script_has_parameters_that_it_accepts(page: Path) -> None:
    for module, arguments in commands(page):
        stage = module.removeprefix("scripts.")
        if stage in STAGES and not re.search(r"\$|--help", arguments):
            config = resolve(parse(stage, shlex.split(arguments)))
            check_arms(config.arm_names)


@each_page
def test_every_flag_in_inline_code_exists(page: Path) -> None:
    everywhere = set(FIELDS) | {"help"}
    everywhere.update(
        *(re.findall(r'"--(\w+)"', file.read_text()) for file in (ROOT / "benchmarks").glob("*.py"))
    )
    assert set(re.findall(r"`--(\w+)[^`]*`", page.read_text())) <= everywhere


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


@each_page
def test_every_file_and_folder_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(
        rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w|(?<![\w/-])requirements[\w.-]*\w", text
    )
    rooms = re.findall(rf"`((?:{ROOMS})/\w*\.py)`", text)  # docs leave out `attribution/`
    for path in paths + [f"attribution/{room}" for room in rooms]:
        if not re.search("NAME|ROOM|MODULE", path):
            assert (ROOT / path).exists(), path


def test_the_readme_explains_every_arm_of_its_output() -> None:
    output = README.split("Test accuracy over")[1].split("```")[0]
    shown = set(re.findall(r"^ *(\w+) +[\d.]+ %", output, flags=re.MULTILINE))
    explained = set(re.findall(r"^\| `(\w+)` \| ", README, flags=re.MULTILINE))
    assert {"none", "random", "harmful"} <= shown <= explained & set(ARMS)


def test_the_results_explain_every_arm() -> None:
    section = (ROOT / "docs" / "results.md").read_text().split("## The arms")[1].split("##")[0]
    assert set(ARMS) <= set(re.findall(r"`(\w+)`", section))


def test_the_readme_lists_parameters_that_exist() -> None:
    section = README.split("## Ten parameters")[1].split("##")[0]
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.+?) \|", section, re.MULTILINE)))
    assert len(listed) == 10 and set(listed) <= set(FIELDS)


def test_the_readme_names_every_room() -> None:
    rooms = set(re.findall(r"^\| `attribution/(\w+)/` \|", README, flags=re.MULTILINE))
    assert rooms == set(ROOMS.split("|")) - {"__pycache__"}
