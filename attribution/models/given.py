"""Checkpoints that were trained elsewhere: found in folders, checked, and brought into the data's order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attribution.config import Config, split_list
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import classifier, model_facts, pretrained
from attribution.runtime.hashing import digest
from attribution.runtime.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parameters of group `training` that logits and gradients of such checkpoints depend on.
SETTINGS = ("seed", "precision", "train_layers")
ADAPTER = "adapter_config.json"
SHOWN = 5  # class names in a message


@contextmanager
def _naming_checkpoints() -> Iterator[None]:
    """Let an error about a model speak of parameter `checkpoints`."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"^(model|checkpoint)=", "checkpoints=", str(error))
        raise InputError(text.replace("--model", "--checkpoints")) from None


def find(text: str) -> list[str]:
    """The model folders that parameter `checkpoints` names, in order.

    A folder that is not a model stands for the models at most two levels below it, in order of the
    numbers in their names.

    Raises:
        InputError: a folder is missing, is named twice, or holds no model with safetensors.
    """
    found: list[Path] = []
    for name in split_list(text):
        models = _models_in(Path(name).expanduser().resolve())
        if not models:
            raise InputError(
                f"checkpoints={name}: no such folder, or no model in it (config.json); name folders "
                "that save_pretrained or a Trainer wrote"
            )
        found += models
    for folder in found:
        if found.count(folder) > 1:
            raise InputError(f"checkpoints={folder}: is named twice")
        if not any(folder.glob("*.safetensors")):
            raise InputError(
                f"checkpoints={folder}: has no safetensors, and pickles (.bin, .pt) are not read; load "
                f"it where you trust it, and type model.save_pretrained({str(folder)!r})"
            )
    return list(map(str, found))


def _models_in(folder: Path) -> list[Path]:
    for depth in ("", "*/", "*/*/"):
        names = (f"{depth}config.json", f"{depth}{ADAPTER}")
        if found := {file.parent for name in names for file in folder.glob(name)}:
            return sorted(found, key=_by_number)
    return []


def _by_number(path: Path) -> list[tuple[str, int]]:
    """A key that sorts checkpoint-9 before checkpoint-10."""
    return [(text, int(n or -1)) for text, n in re.findall(r"(\D+)(\d*)", str(path))]


def implied(given: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that follow from the checkpoints that a caller or a run built on names.

    Raises:
        InputError: as find does; a number or share of checkpoints is given too; or image sizes differ.
    """
    folders = find(given.get("checkpoints") or inherited["checkpoints"])
    listed = ",".join(f'"{folder}"' if "," in folder else folder for folder in folders)
    fixed = {"num_models": len(folders), "subset_fraction": 1.0, "checkpoint_epochs": ""}
    for name in fixed:
        if given.get(name, fixed[name]) != fixed[name]:
            raise InputError(
                f"{name}={given[name]}: the {len(folders)} checkpoints are given and taken to know all "
                "training examples; leave it out"
            )
    known = given.keys() | inherited.keys()
    whole = {"model": folders[0], "train_layers": "all"}  # which layers were trained is not known
    own: dict[str, Any] = {name: value for name, value in whole.items() if name not in known}
    if "image_size" not in known:
        with _naming_checkpoints():
            sizes = {folder: model_facts.own_image_size(folder) for folder in folders}
        for folder, size in sizes.items():
            if size != sizes[folders[0]]:
                raise InputError(
                    f"checkpoints={folder}: takes images of {size} pixels, {folders[0]} of "
                    f"{sizes[folders[0]]}; choose with --image_size"
                )
        own["image_size"] = sizes[folders[0]]
    return own | fixed | {"checkpoints": listed}


@lru_cache(maxsize=8)  # it reads every file
def key(config: Config, data: ImageData) -> str:
    """Hash what logits and gradients of the checkpoints depend on: not how retrainings are done."""
    contents = [pretrained.fingerprint(folder) for folder in config.given_folders]
    settings = {name: getattr(config, name) for name in SETTINGS}
    return digest(contents, settings, data.fingerprint)


def check(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuse checkpoints of other classes than the data, or that differ in more than their weights.

    Raises:
        InputError: they do, or `model` differs from them.
    """
    first, *others = config.given_folders
    count = len(class_names)
    with _naming_checkpoints():
        for folder in config.given_folders:
            class_order(folder, class_names)
        kind = _kind(first, count)
        for other in others:
            _same(kind, _kind(other, count), f"checkpoints={other}", first)
    _same(kind, _kind(config.model, count), f"model={config.model}", first)
    if _classes(first) == _placeholders(count):
        say(
            f"checkpoints: name no classes; they are taken in the data's order: {', '.join(class_names)}"
        )
    say(
        "checkpoints: which training images they saw is not known, so all count as seen; "
        f"images of {config.image_size} pixels"
    )


def _kind(name: str, classes: int) -> tuple[Any, ...]:
    """The shape of a model's parameters, and how it normalises images."""
    parameters = pretrained.skeleton(name, classes).named_parameters()
    return {path: p.shape for path, p in parameters}, model_facts.normalisation(name)


def _same(one: tuple[Any, ...], other: tuple[Any, ...], named: str, first: str) -> None:
    if one != other:
        what = "normalises images" if one[0] == other[0] else "is built"
        raise InputError(
            f"{named}: {what} otherwise than the checkpoint {first}; all must be alike"
        )


def check_start(config: Config) -> None:
    """Refuse to retrain from one of the checkpoints, which knows the examples to be removed.

    Raises:
        InputError: `model` is one of them, or was not given.
    """
    if config.has_no_start:
        raise InputError(
            "model: retraining needs the model that the checkpoints were fine-tuned from (they already "
            "know the images to be removed); name it with --model"
        )


def class_order(folder: str, class_names: Sequence[str]) -> list[int]:
    """The checkpoint's number of each class of the data.

    Raises:
        InputError: its classes are others.
    """
    own = _classes(folder)
    if sorted(own) == sorted(class_names):
        return [own.index(name) for name in class_names]
    if own == _placeholders(len(class_names)):
        return list(range(len(class_names)))
    raise InputError(
        f"checkpoints={folder}: knows {_shortened(own)}; the data has {_shortened(class_names)}"
    )


def _classes(folder: str) -> list[str]:
    config: Any = pretrained.skeleton(folder).config
    return [config.id2label[i] for i in range(config.num_labels)]


def _placeholders(count: int) -> list[str]:
    """What transformers calls classes that nobody has named."""
    return [f"LABEL_{i}" for i in range(count)]


def _shortened(names: Sequence[str]) -> str:
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names)} classes ({', '.join(names[:SHOWN])}{more})"


def load(folder: Path, class_names: tuple[str, ...]) -> PreTrainedModel:
    """Load a checkpoint, with its logits in the order of the data's classes.

    Raises:
        InputError: as classifier.load and class_order do.
    """
    with _naming_checkpoints():
        model = cast("PreTrainedModel", classifier.load(folder))
        order = class_order(str(folder), class_names)
        for path in pretrained.heads(str(folder)):
            for parameter in model.get_submodule(path).parameters():
                parameter.data = parameter.data[order]
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: i for i, name in enumerate(class_names)}
    return model
