"""The arms and the methods by name, in words. Light, so that --help and the checks of flags need no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attribution.config import nearest
from attribution.errors import InputError


@dataclass(frozen=True)
class Words:
    """An arm in words.

    Attributes:
        about: one line on what it chooses, and why.
        chosen: what a trial chose, as part of a sentence; {n} is their number.
        order: the column of the training table that it ranks by, and whether the first is the lowest.
    """

    about: str
    chosen: str
    order: tuple[str, bool] = ("alignment", True)


ARM_WORDS = {
    "none": Words("nothing is removed: the baseline", "nothing"),
    "random": Words(
        "random examples, drawn for each seed: the control that other arms are compared with",
        "{n} random examples",
    ),
    "random_matched": Words(
        "random examples with the class counts of harmful: the effect of class balance alone",
        "{n} random examples with the classes of harmful",
    ),
    "helpful": Words(
        "highest alignment, the examples whose presence raises accuracy most: removing them should hurt",
        "the {n} most helpful examples",
        ("alignment", False),
    ),
    "harmful": Words(
        "lowest trust score, the examples whose presence lowers accuracy most",
        "the {n} most harmful examples",
        ("trust", True),
    ),
    "negative": Words(
        "every example with negative alignment, however many there are (frac does not apply)",
        "the {n} examples with negative alignment",
    ),
    "loss": Words(
        "highest ensemble loss: the cheap baseline that attribution has to beat",
        "the {n} examples with the highest loss",
        ("loss", False),
    ),
    "confident": Words(
        "lowest label quality by confident learning (cleanlab)",
        "the {n} examples with the lowest label quality",
        ("label_quality", True),
    ),
    "self_influence": Words(
        "highest influence on their own prediction: memorised examples",
        "the {n} examples with the highest self-influence",
        ("self_influence", False),
    ),
    "harmful_loss": Words(
        "low trust score and high loss: the examples that come first in both rankings",
        "the {n} examples with low trust and high loss",
        ("trust", True),
    ),
    "majority": Words(
        "random examples of the largest group", "{n} random examples of the largest group"
    ),
    "balanced": Words(
        "random examples, each from the group that is largest at that point: evens out group sizes",
        "{n} random examples of the largest groups",
    ),
    "oracle": Words(
        "every example whose label was flipped on purpose: the best possible (frac does not apply)",
        "the {n} examples with flipped labels",
    ),
}

METHOD_WORDS = {
    "trak": "TRAK scores as the trak stage stored them, and the trust score that harmful ranks by",
    "trak_unweighted": "TRAK without the factor 1 - p",
    "trak_weighted": "TRAK with the factor 1 - p, the mean over all checkpoints",
    "gradient_dot": "dot product of projected gradients of the margins, the mean over checkpoints",
    "gradient_cosine": "cosine of projected gradients of the margins, the mean over checkpoints",
    "penultimate": "cosine of the last layer's inputs, negated if labels differ",
    "loss": "minus the ensemble's loss, from models that did not train on the example",
    "confident": "label quality by confident learning (cleanlab)",
    "self_influence": "minus each example's influence on its own margin",
    "random": "normal noise: the floor that every method has to beat",
    "ekfac": "EK-FAC influence by kronfluence, the mean over checkpoints",
}


def check_known(parameter: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        InputError: with the nearest known names.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{parameter}={name}: unknown; {nearest(name, list(known), limit=20)}")
