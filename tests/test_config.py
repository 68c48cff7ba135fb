"""Parameters: presets, bounds, one-line errors, flags, and the light imports that make them quick."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.config import (
    FIELDS,
    PRESETS,
    Config,
    convert,
    nearest,
    resolve,
    split_list,
)
from attribution.errors import InputError
from attribution.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "mlflow", "pandas", "sklearn", "datasets")


def refusal(**given) -> str:
    """The message with which values are refused; it must be one line."""
    with pytest.raises(InputError) as caught:
        resolve(given)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def loaded_after(code: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Which heavy packages a fresh interpreter holds after running code."""
    done = python("-c", f"import sys\n{code}\nprint(*[m for m in {HEAVY} if m in sys.modules])")
    return set(done.stdout.split()), done


def test_without_any_value_everything_comes_from_the_digits_preset() -> None:
    config = resolve({})
    assert {name: getattr(config, name) for name in PRESETS["digits"]} == PRESETS["digits"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_no_parameter_open(preset: str) -> None:
    given = {"preset": preset} | ({"dataset": "x"} if "dataset" not in PRESETS[preset] else {})
    config = resolve(given)
    assert None not in dataclasses.asdict(config).values()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_nothing_but_parameters(preset: str) -> None:
    assert set(PRESETS[preset]) <= set(FIELDS)


def test_naming_a_dataset_takes_the_preset_for_images() -> None:
    config = resolve({"dataset": "some/folder"})
    assert config.image_size == PRESETS["images"]["image_size"]
    assert config.dataset == "some/folder"


def test_the_images_preset_without_a_dataset_is_refused() -> None:
    assert "dataset" in refusal(preset="images")


@pytest.mark.parametrize(
    "value",
    [{"epochs": 3}, {"image_size": 8}, {"label_noise": 0.0}, {"patience": 0}, {"classes": "a,b"}],
)
def test_a_given_value_wins_over_the_preset(value: dict) -> None:
    for preset in ("digits", "food101"):
        config = resolve({"preset": preset, **value})
        assert {name: getattr(config, name) for name in value} == value


def test_an_inherited_value_wins_over_the_preset() -> None:
    assert resolve({}, inherited={"epochs": 77}).epochs == 77


def test_an_inherited_value_decides_the_preset() -> None:
    assert resolve({}, inherited={"preset": "food101"}).image_size == 224


def test_a_given_value_that_contradicts_an_inherited_one_is_refused_naming_both() -> None:
    with pytest.raises(InputError) as caught:
        resolve({"epochs": 3}, inherited={"epochs": 77})
    assert "epochs=3" in str(caught.value) and "epochs=77" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_given_value_equal_to_the_inherited_one_is_accepted() -> None:
    assert resolve({"epochs": 77}, inherited={"epochs": 77}).epochs == 77


OUTSIDE = [
    *[(f.name, f.metadata["at_least"] - 1) for f in FIELDS.values() if "at_least" in f.metadata],
    *[(f.name, f.metadata["at_most"] + 1) for f in FIELDS.values() if "at_most" in f.metadata],
    *[(f.name, f.metadata["above"]) for f in FIELDS.values() if "above" in f.metadata],
    *[(f.name, f.metadata["below"]) for f in FIELDS.values() if "below" in f.metadata],
]
EDGES = [
    *[(f.name, f.metadata["at_least"]) for f in FIELDS.values() if "at_least" in f.metadata],
    *[(f.name, f.metadata["at_most"]) for f in FIELDS.values() if "at_most" in f.metadata],
]


def test_the_bounds_are_the_documented_ones() -> None:
    bounds = {"at_least", "at_most", "above", "below"}
    found = {
        f.name: {key: f.metadata[key] for key in bounds & set(f.metadata)} for f in FIELDS.values()
    }
    assert {name: rules for name, rules in found.items() if rules} == {
        "image_size": {"at_least": 1, "at_most": 4096},
        "class_depth": {"at_least": -1},
        "label_noise": {"at_least": 0, "below": 1},
        "data_seed": {"at_least": 0},
        "val_fraction": {"above": 0, "below": 1},
        "test_fraction": {"above": 0, "below": 1},
        "epochs": {"at_least": 1},
        "learning_rate": {"above": 0},
        "batch_size": {"at_least": 2},
        "weight_decay": {"at_least": 0},
        "patience": {"at_least": 0},
        "num_models": {"at_least": 1},
        "subset_fraction": {"above": 0, "at_most": 1},
        "seed": {"at_least": 0},
        "proj_dim": {"at_least": 1},
        "num_blocks": {"at_least": 1},
        "lambda_reg": {"at_least": 0},
        "num_seeds": {"at_least": 2},
        "num_splits": {"at_least": 1},
        "num_subsets": {"at_least": 10},
        "num_repeats": {"at_least": 1},
        "alpha": {"above": 0, "below": 1},
        "brittleness_targets": {"at_least": 0},
        "brittleness_k": {"at_least": 1},
        "errors": {"at_least": 0},
        "num_examples": {"at_least": 1},
        "jobs": {"at_least": 0},
        "gpus_per_task": {"at_least": 0},
    }


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_a_value_outside_its_bounds_is_refused_by_name_and_value(name: str, value: float) -> None:
    assert f"{name}={value}" in refusal(**{name: value})


@pytest.mark.parametrize(("name", "value"), EDGES)
def test_a_value_on_an_inclusive_bound_is_accepted(name: str, value: float) -> None:
    assert getattr(resolve({name: value}), name) == value


@pytest.mark.parametrize("name", [f.name for f in FIELDS.values() if f.type == "float"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    assert f"{name}={value}" in refusal(**{name: value})


@pytest.mark.parametrize("name", [f.name for f in FIELDS.values() if "choices" in f.metadata])
def test_an_unknown_choice_is_refused_with_the_nearest_valid_one(name: str) -> None:
    right = FIELDS[name].metadata["choices"][-1]
    wrong = right + "x"
    message = refusal(**{name: wrong})
    assert f"{name}={wrong}" in message
    assert right in message.removeprefix(f"{name}={wrong}")


@pytest.mark.parametrize("name", [f.name for f in FIELDS.values() if "choices" in f.metadata])
def test_a_choice_that_resembles_nothing_is_refused_with_all_valid_ones(name: str) -> None:
    message = refusal(**{name: "@@@@"})
    assert all(choice in message for choice in FIELDS[name].metadata["choices"])


@pytest.mark.parametrize(
    ("frac", "part"),
    [
        ("0", "0"),
        ("1", "1"),
        ("-1", "-1"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("abc", "abc"),
        ("", ""),
        ("0.05,2", "2"),
        ("0.05,", ""),
        ("0.05;0.1", "0.05;0.1"),
    ],
)
def test_a_frac_that_is_no_share_is_refused_naming_the_part(frac: str, part: str) -> None:
    message = refusal(frac=frac)
    assert message.startswith(f"frac={frac}: ") and repr(part) in message


@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=5))
def test_every_list_of_shares_is_read_back_exactly(fracs: list[float]) -> None:
    assert resolve({"frac": ", ".join(map(repr, fracs))}).fracs == fracs


@pytest.mark.parametrize("name", ["preset", "augment", "frac"])
def test_a_value_with_a_line_break_is_still_refused_in_one_line(name: str) -> None:
    assert name in refusal(**{name: "some\nthing"})


@pytest.mark.parametrize(
    ("name", "text"),
    [("epochs", "abc"), ("epochs", "1.5"), ("epochs", ""), ("learning_rate", "fast")],
)
def test_a_text_that_is_no_number_is_refused_by_name_and_value(name: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        convert(name, text)
    assert f"{name}={text}" in str(caught.value)


@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_a_text_with_a_line_break_that_is_no_number_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        convert(name, "some\nthing")
    assert len(str(caught.value).splitlines()) == 1


@given(st.lists(st.text(st.characters(exclude_characters=","), min_size=1).map(str.strip)))
def test_a_comma_list_gives_its_items_back_without_blanks(items: list[str]) -> None:
    items = [item for item in items if item[:1] != '"']
    assert split_list(" , ".join(items)) == [item for item in items if item]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", []), ("10,9", [9, 10]), (" 3 , 3", [3]), ("last:3", [-3, -2, -1])],
)
def test_epochs_are_read_in_the_order_of_numbers(text: str, numbers: list[int]) -> None:
    config = resolve({"checkpoint_epochs": text, "num_models": 4})
    assert config.epoch_numbers == numbers
    assert config.num_checkpoints == 4 * max(1, len(numbers))


@pytest.mark.parametrize("text", ["0", "last:0", "last", "last:-1", "3,-1", "two", "1.5", ",", " "])
def test_what_names_no_epochs_is_refused(text: str) -> None:
    assert refusal(checkpoint_epochs=text).startswith(f"checkpoint_epochs={text}: ")


def test_an_item_with_a_comma_is_given_in_quotes() -> None:
    assert split_list('"tench, Tinca tinca", b ,"c"') == ["tench, Tinca tinca", "b", "c"]
    assert split_list('say "a", 5"') == ['say "a"', '5"']


def test_nearest_names_the_closest_valid_name() -> None:
    assert nearest("harmfull", ["none", "harmful", "helpful"]).startswith("did you mean harmful")


def test_nearest_shortens_a_long_list_and_says_how_many_there_are() -> None:
    shown = nearest("@@", [f"name{i}" for i in range(50)])
    assert "name0" in shown and "name40" not in shown and "50" in shown


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_group_gives_the_parameters_of_these_groups_alone() -> None:
    execution = {"device", "jobs", "backend", "ray_address", "gpus_per_task", "cache_dir"}
    execution |= {"keep_checkpoints", "gpu_kernels", "cuda_graphs", "time_budget", "quality"}
    assert set(resolve({}).group("execution")) == execution


def test_importing_the_package_and_its_config_loads_no_heavy_package() -> None:
    loaded, done = loaded_after("import attribution, attribution.config")
    assert done.returncode == 0, done.stderr
    assert loaded == set()


def test_an_unknown_flag_exits_with_2_and_one_line_before_any_heavy_import() -> None:
    loaded, done = loaded_after(
        "import runpy\n"
        "sys.argv = ['ablation', '--fraction', '0.1']\n"
        "try:\n    runpy.run_module('scripts.ablation', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 2, end.code\n"
        "else:\n    raise AssertionError('went on')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "--fraction" in done.stderr and "--frac" in done.stderr
    assert loaded == set()


def test_a_bad_value_exits_with_2_and_one_line_before_any_heavy_import() -> None:
    loaded, done = loaded_after(
        "import runpy\n"
        "sys.argv = ['ablation', '--frac', '2']\n"
        "try:\n    runpy.run_module('scripts.ablation', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 2, end.code\n"
        "else:\n    raise AssertionError('went on')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "frac=2" in done.stderr
    assert loaded == set()


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_an_entry_point_exits_with_0(stage: str) -> None:
    done = python("-m", f"scripts.{stage}", "--help")
    assert done.returncode == 0 and "--dataset" in done.stdout


@pytest.mark.parametrize("word", ["--help", "--no_such_flag", "no_such_benchmark"])
def test_benchmarks_load_no_heavy_package_before_one_is_named(word: str) -> None:
    loaded, done = loaded_after(
        "import runpy\n"
        f"sys.argv = ['benchmarks', '{word}']\n"
        "try:\n    runpy.run_module('benchmarks', run_name='__main__')\n"
        f"except SystemExit as end:\n    assert end.code == {0 if word == '--help' else 2}\n"
        "else:\n    raise AssertionError('went on')"
    )
    assert done.returncode == 0, done.stderr
    assert "usage: python -m benchmarks" in done.stdout + done.stderr
    assert not loaded & set(HEAVY)
