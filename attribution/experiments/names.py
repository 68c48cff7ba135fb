"""The arms and the methods by name, in words. Light, so that --help and the checks of flags need no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attribution.config import nearest
from attribution.errors import InputError

NO_GROUPS = "group_id", "groups=auto gives training examples no group; use label or a column"


@dataclass(frozen=True)
class ArmSpec:
    """The facts of an arm; a function of its name in arms.py, or else `order`, chooses the examples.

    Attributes:
        about: one line on what it chooses, and why.
        chosen: what a trial chose, as part of a sentence; {n} is their number.
        order: the column of the evidence that it ranks by, and whether the first is the lowest.
        needs: a column of the evidence that it cannot do without, and what to do if that is missing.
        is_frac_free: its size does not depend on frac.
        is_drawn: it chooses other examples for every seed.
        may_run_out: it may have fewer examples than frac asks for.
    """

    about: str
    chosen: str
    order: tuple[str, bool] = ("alignment", True)
    needs: tuple[str, str] = ("", "")
    is_frac_free: bool = False
    is_drawn: bool = False
    may_run_out: bool = False


ARM_SPECS = {
    "none": ArmSpec("nothing is removed: the baseline", "nothing", is_frac_free=True),
    "random": ArmSpec(
        "random examples, drawn for each seed: the control that other arms are compared with",
        "{n} random examples",
        is_drawn=True,
    ),
    "random_matched": ArmSpec(
        "random examples with the class counts of harmful: the effect of class balance alone",
        "{n} random examples with the classes of harmful",
        is_drawn=True,
    ),
    "helpful": ArmSpec(
        "highest alignment, the examples whose presence raises accuracy most: removing them should hurt",
        "the {n} most helpful examples",
        ("alignment", False),
    ),
    "trust": ArmSpec(
        "lowest trust score: alignment without the factor 1 - p",
        "the {n} examples with the lowest trust",
        ("stored_trust", True),
    ),
    "d3m": ArmSpec(
        "lowest group alignment under groups and group_weights, as published (D3M)",
        "the {n} examples with the lowest group alignment",
    ),
    "harmful": ArmSpec(
        "lowest trust score (as trust; with other groups or group_weights as d3m), the examples whose "
        "presence lowers accuracy most",
        "the {n} most harmful examples",
        ("trust", True),
    ),
    "negative": ArmSpec(
        "every example with negative alignment, however many there are (frac does not apply)",
        "the {n} examples with negative alignment",
        is_frac_free=True,
    ),
    "loss": ArmSpec(
        "highest ensemble loss: the cheap baseline that attribution has to beat",
        "the {n} examples with the highest loss",
        ("loss", False),
    ),
    "confident": ArmSpec(
        "lowest label quality by confident learning (cleanlab)",
        "the {n} examples with the lowest label quality",
        ("label_quality", True),
    ),
    "self_influence": ArmSpec(
        "highest influence on their own prediction: memorised examples",
        "the {n} examples with the highest self-influence",
        ("self_influence", False),
    ),
    "harmful_loss": ArmSpec(
        "low trust score and high loss: the examples that come first in both rankings",
        "the {n} examples with low trust and high loss",
        ("trust", True),
    ),
    "majority": ArmSpec(
        "random examples of the largest group",
        "{n} random examples of the largest group",
        needs=NO_GROUPS,
        is_drawn=True,
        may_run_out=True,
    ),
    "balanced": ArmSpec(
        "random examples, each from the group that is largest at that point: evens out group sizes",
        "{n} random examples of the largest groups",
        needs=NO_GROUPS,
        is_drawn=True,
    ),
    "oracle": ArmSpec(
        "every example whose label was flipped on purpose: the best possible (frac does not apply)",
        "the {n} examples with flipped labels",
        needs=("is_flipped", "no label was flipped on purpose; use label_noise above 0"),
        is_frac_free=True,
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
