"""Flags of a command: how they are shown, read, and checked before anything slow is imported."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attribution.config import (
    AUTO,
    FIELDS,
    FOOD_CLASSES,
    PRESETS,
    SCRATCH_MODELS,
    Config,
    check_device,
    convert,
    nearest,
    split_list,
)
from attribution.errors import InputError
from attribution.experiments.names import ARM_SPECS, METHOD_WORDS, check_known
from attribution.stages import STAGES

KINDS = {"int": "N", "float": "X", "str": "TEXT"}


def parse(stage: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The parameters that the caller gave, by name. An unknown flag ends the process (exit code 2)."""
    groups = (*STAGES[stage].all_groups, *STAGES[stage].more_groups, "lineage", "execution")
    names = list(STAGES)
    unknown = {f"{later}_run_id" for later in names[names.index(stage) :]}
    command = f"python -m scripts.{stage}"
    parser = _Parser(
        command,
        f"{command} [--NAME VALUE ...]",
        _about(stage),
        _names(groups),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sections = {group: parser.add_argument_group(group) for group in groups}
    for name, f in FIELDS.items():
        if f.metadata["group"] in groups and name not in unknown:
            is_switch = f.metadata.get("choices") == ("no", "yes")
            optional: dict[str, Any] = {"nargs": "?", "const": "yes"} if is_switch else {}
            sections[f.metadata["group"]].add_argument(
                f"--{name}",
                metavar="|".join(f.metadata.get("choices", [KINDS[str(f.type)]])),
                default=argparse.SUPPRESS,
                **optional,
                help=_help(f).replace("%", "%%"),
            )
    words = sys.argv[1:] if argv is None else argv
    found = vars(parser.parse_known([_underscored(word) for word in words]))
    # argparse turns --name=-- into an empty list.
    texts = {name: text if isinstance(text, str) else "--" for name, text in found.items()}
    return {name: convert(name, text) for name, text in texts.items()}


def _underscored(word: str) -> str:
    """Accept --num-seeds=3 for --num_seeds=3: people type both."""
    flag, equals, value = word.partition("=")
    return (
        flag.replace("-", "_").replace("__", "--", 1) + equals + value if word[:2] == "--" else word
    )


class _Parser(argparse.ArgumentParser):
    def parse_known(self, words: Sequence[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(words)
        if unknown:
            flags = [action.option_strings[0] for action in self._actions]
            self.error(f"{unknown[0]}: no such parameter; {nearest(unknown[0], flags)}")
        return known

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}\n")


def _about(stage: str) -> str:
    """What the command does, and two examples."""
    examples = [f"  python -m scripts.{stage} {flags}" for flags in STAGES[stage].examples]
    return "\n".join([STAGES[stage].about, "", "examples:", *examples])


def _names(groups: Sequence[str]) -> str:
    """The arms or the methods, a line each, where a command has them."""
    lines: list[str] = []
    if "ablation" in groups:
        lines += _list("arms", {name: words.about for name, words in ARM_SPECS.items()})
    if "evaluate" in groups:
        lines += _list("methods", METHOD_WORDS)
    return "\n".join(lines)


def _list(title: str, lines: dict[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"{title}:", *(f"  {name:<{width}}  {about}" for name, about in lines.items())]


def _help(f: dataclasses.Field) -> str:
    text = f.metadata["help"]
    values = {name: preset.get(f.name) for name, preset in PRESETS.items()}
    if f.name in AUTO:
        values["images"] = "by the data"
    shown = [f"{k}: {v}" for k, v in values.items() if v not in (None, "", FOOD_CLASSES)]
    default = getattr(Config(), f.name)
    if default is not None:
        shown = [f"default: {'empty' if default == '' else default}"]
    return f"{text} ({', '.join(shown)})" if shown else text


def check(given: dict[str, Any]) -> None:
    """Refuse what needs neither data nor a model to be refused.

    Raises:
        InputError: an arm or method that does not exist, a device of another name, an image that is
            missing, or a data set or model that is neither a folder nor a Hub id.
    """
    check_known("arms", split_list(given.get("arms", "")), ARM_SPECS)
    check_known("methods", split_list(given.get("methods", "")), METHOD_WORDS)
    check_device(given.get("device", "auto"))
    image = given.get("image", "")
    if image and not Path(image).expanduser().exists():
        raise InputError(f"image={image}: no such file")
    _check_source("dataset", given.get("dataset"), ["digits"], "uoft-cs/cifar10")
    _check_source("model", given.get("model"), ["auto", *SCRATCH_MODELS], "microsoft/resnet-18")


def _check_source(parameter: str, text: str | None, known: Sequence[str], example: str) -> None:
    """Refuse a name that is not known, no folder, and no Hub id: the Hub would be asked for a minute."""
    if not text or text in known or Path(text).expanduser().exists():
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith((".", "~")):
        try:
            folders = [path for path in Path(text).expanduser().parent.iterdir() if path.is_dir()]
            here = sorted(path.name for path in folders if not path.name.startswith("."))
        except OSError:
            here = []
        raise InputError(
            f"{parameter}={text}: missing folder; {nearest(Path(text).name, [*known, *here])}. An id of the "
            f"Hugging Face Hub has its owner in front, such as {example}"
        )
