"""MLproject, the environment files, mlruns/ and the top level, read as MLflow and pip read them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from attribution.cli.flags import parse
from attribution.config import FIELDS, resolve
from attribution.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
FILES = ("MLproject", "python_env.yaml", "conda.yaml", "requirements.txt")
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRY_POINTS = MLPROJECT["entry_points"]
STAGE_POINTS = [name for name in ENTRY_POINTS if name != "benchmark"]  # it has its own flags


@pytest.fixture(scope="module")
def project() -> Any:
    from mlflow.projects._project_spec import load_project

    return load_project(str(ROOT))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def environment_name(folder: Path) -> str:
    from mlflow.utils.environment import _PythonEnv
    from mlflow.utils.virtualenv import _get_virtualenv_name

    return _get_virtualenv_name(_PythonEnv.from_yaml(folder / "python_env.yaml"), str(folder))


def stage_of(entry_point: str) -> str:
    return "ablation" if entry_point == "main" else entry_point


@pytest.mark.parametrize("entry_point", STAGE_POINTS)
def test_every_mlproject_parameter_has_the_default_of_its_config_field(entry_point: str) -> None:
    for name, declared in ENTRY_POINTS[entry_point]["parameters"].items():
        default = FIELDS[name].default
        assert default is None or str(declared["default"]) == str(default), name


@pytest.mark.parametrize("entry_point", STAGE_POINTS)
def test_the_default_command_runs_the_stage_with_the_default_parameters(
    entry_point: str, project, tmp_path: Path
) -> None:
    command = project.get_entry_point(entry_point).compute_command({}, str(tmp_path))
    python, m, module, *flags = shlex.split(command)
    assert (python, m, module) == ("python", "-m", f"scripts.{stage_of(entry_point)}")
    assert resolve(parse(stage_of(entry_point), flags)) == resolve({})


@pytest.mark.parametrize("entry_point", STAGE_POINTS)
def test_values_given_with_P_arrive_whether_declared_or_not(
    entry_point: str, project, tmp_path: Path
) -> None:
    given = {"seed": "3", "epochs": "2", "dataset": "a folder/with 'quotes'"}
    command = project.get_entry_point(entry_point).compute_command(given, str(tmp_path))
    parsed = parse(stage_of(entry_point), shlex.split(command)[3:])
    assert (parsed["seed"], parsed["epochs"], parsed["dataset"]) == (3, 2, given["dataset"])


def test_main_is_the_ablation() -> None:
    assert ENTRY_POINTS["main"] == ENTRY_POINTS["ablation"]


def test_every_entry_point_has_its_script_and_every_script_its_entry_point() -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("[a-z]*.py")}
    assert {stage_of(name) for name in ENTRY_POINTS} == scripts


def test_mlflow_takes_its_environment_from_python_env(project) -> None:
    assert project.env_type == "python_env"
    assert Path(project.env_config_path) == ROOT / "python_env.yaml"


def test_python_env_draws_on_requirements_and_nothing_else() -> None:
    from mlflow.utils.environment import _PythonEnv

    env = _PythonEnv.from_yaml(ROOT / "python_env.yaml")
    assert env.dependencies == ["-r requirements.txt"]
    assert set(env.build_dependencies) <= {"pip", "setuptools", "wheel"}


def test_conda_draws_on_requirements_and_nothing_else() -> None:
    from mlflow.utils.environment import _PythonEnv

    env = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    assert env.dependencies == ["-r requirements.txt"]
    assert env.build_dependencies == ["pip"]  # whatever conda installs beside python


def test_both_environments_have_the_same_python_minor_version() -> None:
    from mlflow.utils.environment import _PythonEnv

    virtualenv = _PythonEnv.from_yaml(ROOT / "python_env.yaml")
    conda = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    assert virtualenv.python.split(".")[:2] == conda.python.split(".")[:2]


def test_the_environment_is_named_the_same_for_the_same_files(copy: Path) -> None:
    assert environment_name(copy) == environment_name(ROOT)


def test_a_change_of_requirements_gives_a_new_environment(copy: Path) -> None:
    with (copy / "requirements.txt").open("a") as file:
        file.write("another-package==1.0\n")
    assert environment_name(copy) != environment_name(ROOT)


def test_requirements_name_what_is_given() -> None:
    text = (ROOT / "requirements.txt").read_text()
    named = {line.split("=")[0].split(">")[0].split("<")[0] for line in text.splitlines()}
    assert named >= {
        *("mlflow", "torch", "torchvision", "transformers"),
        *("datasets", "traker", "scikit-learn", "matplotlib"),
    }


def test_the_extras_agree_with_the_requirements_for_development() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"ray", "dev", "benchmark"}
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert lines == ["-r requirements.txt", *extras["dev"]]
    assert set(extras["ray"]) <= set(lines)


def test_the_top_level_holds_only_what_a_reader_expects() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in listed.stdout.split() if "/" in name}
    assert folders == {
        *(".ci", "attribution", "benchmarks", "docs", "examples", "locks", "mlruns", "scripts"),
        "tests",
    }
    assert sorted(path.name for path in ROOT.glob("requirements*")) == [
        "requirements-dev.txt",
        "requirements.txt",
    ]


def test_mlruns_holds_nothing_that_turns_mlflow_back_to_the_file_store(monkeypatch) -> None:
    from mlflow.tracking._tracking_service.utils import _has_existing_mlruns_data

    assert os.path.isdir(ROOT / "mlruns")
    monkeypatch.chdir(ROOT)
    assert not _has_existing_mlruns_data()


def test_git_holds_only_the_readme_of_mlruns() -> None:
    done = subprocess.run(["git", "ls-files", "mlruns"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == ["mlruns/README.md"]


def test_ci_types_the_two_commands_of_the_readme() -> None:
    blocks = (ROOT / "README.md").read_text().split("```bash\n")[1:3]
    commands = [block.split("\n```")[0] for block in blocks]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(commands) == 2 and all(command in ci for command in commands)


def test_no_file_names_a_registry_host_or_a_machine_s_path() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".txt", ".lock", ".yaml", ".toml", "MLproject", "run")):
            text = (ROOT / name).read_text()
            for word in (
                "py" + "pi.org",
                "pythonho" + "sted",
                "download.py" + "torch",
                "/ro" + "ot/",
            ):
                assert word not in text, f"{name} names {word}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_that_is_started_as_a_file_says_what_to_type(stage: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"error: type python -m scripts.{stage}, in the project's folder\n"
