"""Flags: how they are read and shown, and what is refused before anything slow is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.cli import flags
from attribution.cli.flags import parse
from attribution.config import FIELDS, PRESETS, SCRATCH_MODELS, resolve
from attribution.errors import InputError
from attribution.experiments.names import ARM_SPECS, METHOD_WORDS
from attribution.stages import STAGES

LATER_RUNS = {
    "finetune": {"finetune_run_id", "trak_run_id"},
    "trak": {"trak_run_id"},
    "ablation": set(),
    "evaluate": set(),
    "explain": set(),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_cannot_be_told_to_build_on_itself_or_a_later_one(stage: str) -> None:
    for name in LATER_RUNS[stage]:
        with pytest.raises(SystemExit):
            parse(stage, [f"--{name}", "x"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_of_a_stage_has_a_flag_that_is_read_with_its_type(stage: str) -> None:
    samples = {"int": ("7", 7), "float": ("0.25", 0.25), "str": ("x", "x")}
    groups = (*STAGES[stage].all_groups, *STAGES[stage].more_groups, "lineage", "execution")
    for f in FIELDS.values():
        if f.metadata["group"] in groups and f.name not in LATER_RUNS[stage]:
            text, value = samples[f.type]
            parsed = parse(stage, [f"--{f.name}", text])
            assert parsed == {f.name: value} and type(parsed[f.name]) is type(value)


def test_a_flag_may_be_typed_with_dashes_and_overwrite_without_a_value() -> None:
    given = ["--num-seeds=3", "--export-arm", "harmful", "--overwrite", "--frac", "0.1"]
    assert parse("ablation", given) == {
        "num_seeds": 3,
        "export_arm": "harmful",
        "overwrite": "yes",
        "frac": "0.1",
    }


def test_flags_that_are_not_given_are_not_in_what_is_parsed() -> None:
    assert parse("ablation", []) == {}


def test_a_stage_has_no_flags_of_a_later_stage(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("finetune", ["--frac", "0.1"])
    assert caught.value.code == 2
    assert "--frac" in capsys.readouterr().err


def test_an_abbreviated_flag_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("ablation", ["--num_see", "3"])
    assert "--num_seeds" in capsys.readouterr().err


def test_a_flag_without_its_value_is_refused_in_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("ablation", ["--frac"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "--frac" in error and error.count("\n") == 1


def test_the_help_names_every_flag_and_its_preset_values(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("ablation", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    others = ("evaluate", "explain", "corrected data")
    own = {n for n, f in FIELDS.items() if f.metadata["group"] not in others}
    assert all((f"--{name} " in shown) == (name in own) for name in FIELDS)
    for name in ("label_noise", "proj_dim"):
        values = ", ".join(f"{preset}: {given[name]}" for preset, given in PRESETS.items())
        assert values in shown
    assert "(default: 0.1)" in shown  # of lambda_reg


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_begins_with_what_the_command_does_and_two_examples_that_work(
    stage, capsys
) -> None:
    with pytest.raises(SystemExit):
        parse(stage, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == STAGES[stage].about and lines[4] == "examples:"
    examples = [line.split(f"scripts.{stage} ")[1].split() for line in lines[5:7]]
    assert all(parse(stage, words) for words in examples)


def test_the_help_shows_choices_and_a_line_for_each_arm_or_method(capsys) -> None:
    for stage, names in (("ablation", ARM_SPECS), ("evaluate", METHOD_WORDS)):
        with pytest.raises(SystemExit):
            parse(stage, ["--help"])
        shown = capsys.readouterr().out
        assert "--schedule one_cycle|cosine" in shown and "STR" not in shown
        for name in names:
            assert f"\n  {name} " in shown


@pytest.mark.parametrize(
    ("parameter", "value", "says"),
    [
        ("arms", "none,harmfull", "arms=harmfull: unknown; did you mean harmful"),
        ("methods", "trac", "methods=trac: unknown; did you mean trak"),
        ("device", "gpu", "device=gpu: must be auto, cpu, or cuda"),
        ("device", "cuda0", "device=cuda0: must be"),
        ("image", "missing.png", "image=missing.png: no such file"),
        ("dataset", "cifar10", "dataset=cifar10: missing folder"),
        ("dataset", "cifar10", "has its owner in front, such as uoft-cs/cifar10"),
        ("dataset", "./flowers/photos", "dataset=./flowers/photos: missing folder"),
        ("model", "resnet18", "such as microsoft/resnet-18"),
    ],
)
def test_what_needs_no_data_is_refused_at_once(parameter: str, value: str, says: str) -> None:
    with pytest.raises(InputError) as refused:
        flags.check({parameter: value})
    assert says in str(refused.value)


def test_a_mistyped_folder_is_answered_with_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flowers").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="dataset=flower: missing folder; did you mean flowers"):
        flags.check({"dataset": "flower"})
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="did you mean flowers"):
        flags.check({"dataset": os.path.join(tmp_path, "flower")})


def test_folders_hub_ids_and_what_is_built_in_are_not_refused(tmp_path: Path) -> None:
    for dataset in ("digits", str(tmp_path), "ethz/food101", ""):
        flags.check({"dataset": dataset})
    for model in (*SCRATCH_MODELS, str(tmp_path), "microsoft/resnet-18"):
        flags.check({"model": model})
    flags.check({"device": "cuda:1", "arms": "", "methods": "loss"})


def test_the_models_that_are_trained_from_scratch_are_those_that_can_be_built() -> None:
    from attribution.models.pretrained import MINI_CONFIGS

    assert list(MINI_CONFIGS) == list(SCRATCH_MODELS)


@pytest.mark.parametrize("word", ["--epochs=--", "--learning_rate=--", "--augment=--"])
def test_two_dashes_are_a_value_like_any_other(word: str) -> None:
    """Found by fuzzing: argparse makes an empty list of them."""
    name = word[2:].partition("=")[0]
    with pytest.raises(InputError, match=f"^{name}=--: "):
        resolve(parse("finetune", [word]))
    assert parse("finetune", ["--model=--"]) == {"model": "--"}


TEXTS = (
    "", " ", ",", "nan", "inf", "-0", "1e400", "0x10", "1_000", "9" * 5000, "digits", "images", "auto",
    "none", "yes", "../..", "~", "a\nb", "\0", "\x1b[31m", "é😀", "--", "-", "=", "{x}", "%s",
)  # fmt: skip


def fitting_values(field: dataclasses.Field) -> st.SearchStrategy[tuple[str, str]]:
    """A parameter's name with a value that it may well have."""
    numbers = {"int": st.integers(1, 50), "float": st.floats(0.01, 0.9)}
    texts = st.sampled_from(field.metadata.get("choices", ("digits", "0.1", "a/b")))
    return st.tuples(st.just(field.name), numbers.get(field.type, texts).map(str))


FITTING = st.sampled_from(list(FIELDS.values())).flatmap(fitting_values)
ANY = st.tuples(
    st.sampled_from([*FIELDS, "help", "epoch", "num-seeds"]),
    st.sampled_from(TEXTS) | st.text(max_size=12) | (st.integers() | st.floats()).map(str),
)


@settings(max_examples=100, deadline=None)
@given(
    stage=st.sampled_from(list(LATER_RUNS)),
    pairs=st.lists(FITTING, max_size=2) | st.lists(FITTING | ANY, max_size=4),
    joined=st.booleans(),
)
def test_any_flags_are_a_valid_config_or_one_documented_refusal(
    stage: str, pairs: list[tuple[str, str]], joined: bool
) -> None:
    words = [[f"--{name}={value}"] if joined else [f"--{name}", value] for name, value in pairs]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config = resolve(parse(stage, sum(words, [])))
    except InputError as error:
        assert str(error).isprintable()  # nothing that would steer a terminal
    except SystemExit as stop:  # argparse: a usage error, or --help
        assert (stop.code, out.getvalue()) == (2, "") or (stop.code, err.getvalue()) == (0, "")
    else:
        for name, field in FIELDS.items():
            value, bounds = getattr(config, name), field.metadata
            assert type(value).__name__ in (field.type, field.type.replace("float", "int")), name
            assert field.type != "float" or math.isfinite(value), name
            assert value in bounds.get("choices", [value]), name
            assert bounds.get("at_least", value) <= value <= bounds.get("at_most", value), name
