"""What a command says can be typed next."""

from __future__ import annotations

import shlex

import mlflow
import pytest

from attribution.cli import next_steps
from attribution.cli.flags import parse
from attribution.config import resolve
from scripts import trak

SERVER = "https://me:s3cret@host"
POSTGRES = "postgresql://me:s3cret@host/db"


def flags_of(line: str) -> dict:
    python, m, module, *flags = shlex.split(line)
    assert (python, m) == ("python", "-m")
    return parse(module.removeprefix("scripts."), flags)


def test_a_command_on_a_run_names_what_differs_from_the_defaults_and_no_data() -> None:
    given = {"dataset": "a b", "arms": "harmful,loss", "num_seeds": 3, "epochs": 2}
    config = resolve(given | {"cache_dir": "/a cache"})
    found = flags_of(next_steps.command("ablation", config, trak_run_id="r1"))
    assert found == {
        "trak_run_id": "r1",
        "arms": "harmful,loss",
        "num_seeds": 3,
        "cache_dir": "/a cache",
    }


def test_a_command_on_no_run_gives_the_data_and_settings_again() -> None:
    config = resolve({"dataset": "it's here", "epochs": 2, "keep": "old.csv"})
    line = next_steps.command("finetune", config, keep="new file.csv")
    assert resolve(flags_of(line)) == resolve(
        {"dataset": "it's here", "epochs": 2, "keep": "new file.csv"}
    )


@pytest.mark.parametrize(
    "given", [{"batch_size": 64, "epochs": 15}, {"split_by": "(p\\d+)_"}], ids=str
)
@pytest.mark.parametrize(("num_models", "trained"), [(7, 7), (1, 3)])
def test_corrections_are_trained_on_with_all_settings_of_the_scores(
    given, num_models: int, trained: int
) -> None:
    """Also those that equal the preset's: the same command may choose others by the data."""
    config = resolve({"dataset": "own images", "num_models": num_models, "proj_dim": 32, **given})
    flags = flags_of(trak._correct(config))
    assert flags.items() >= {"batch_size": 64, "image_size": 64, "subset_fraction": 1.0}.items()
    files = {"keep": "keep.csv", "labels": "labels.csv", "export": "corrected"}
    expected = {"dataset": "own images", **given, **files}
    expected |= {"num_models": trained, "subset_fraction": 1.0}
    assert resolve(flags) == resolve(expected)


@pytest.mark.parametrize("uri", [SERVER, POSTGRES])
def test_pages_are_named_without_credentials(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    lines = next_steps.in_mlflow("#/experiments/1/runs?a=b&c=d")
    assert "s3cret" not in "".join(lines) and lines[-1].endswith("/#/experiments/1/runs?a=b&c=d")
    if uri == POSTGRES:  # a command that works as it stands
        assert lines[0] == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    else:
        assert len(lines) == 1


def test_a_store_whose_name_has_a_blank_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "sqlite:////my data/mlflow.db")
    command, _ = next_steps.in_mlflow("#/x")
    assert shlex.split(command)[-1] == "sqlite:////my data/mlflow.db"


def test_every_line_to_type_stands_alone(capsys: pytest.CaptureFixture) -> None:
    next_steps.say_next("To do it:", "first", "second")
    assert capsys.readouterr().err.splitlines() == ["", "To do it:", "  first", "  second"]
