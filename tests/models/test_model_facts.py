"""What is known of a model without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_folders import (
    MEAN,
    STD,
)

from attribution.models import classifier, model_facts


def test_the_normalisation_of_a_saved_folder_is_found_again(folder: Path) -> None:
    assert model_facts.normalisation(str(folder)) == (MEAN, STD)


def test_a_model_without_a_preprocessor_is_normalised_as_imagenet_is() -> None:
    mean, std = model_facts.normalisation("resnet-mini")
    assert (mean, std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("classes", [("a", "b"), tuple("abcdefg")])
def test_the_numbers_of_a_checkpoint_are_counted_with_its_own_head(classes: tuple) -> None:
    model = classifier.build("resnet-mini", classes, 0)
    expected = sum(tensor.numel() for tensor in model.state_dict().values())
    assert model_facts.parameter_count("resnet-mini", len(classes)) == expected


def test_operations_are_counted_and_a_size_that_is_refused_has_none() -> None:
    small, large = (model_facts.forward_flops("resnet-mini", size) for size in (16, 32))
    assert small and large == pytest.approx(4 * small, rel=0.01)
    assert model_facts.forward_flops("resnet-mini", 1) is None
