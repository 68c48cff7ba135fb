"""The evidence that the arms choose by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.experiments.evidence import gather_evidence
from attribution.scores.artifact import Scores


def scores_of(data: ImageData, rng: np.random.Generator) -> Scores:
    values = rng.normal(size=(32, 16)).astype(np.float32)
    columns = dict.fromkeys(("loss", "label_quality", "self_influence"), 0.0)
    train = data.table("train").assign(trust=rng.normal(size=32), predicted_label=0, **columns)
    targets = data.table("validation").assign(loss=rng.random(16))
    own = {"alignment": {"groups": "label", "group_weights": "exp_loss"}}
    return Scores(values, train, targets, own)


@pytest.mark.parametrize("asked", [{}, {"group_weights": "uniform"}, {"groups": "auto"}])
def test_harm_is_trust_by_default_and_alignment_under_groups_of_ones_own(
    tmp_path: Path, asked: dict[str, str]
) -> None:
    data = toy_data(tmp_path)
    scores = scores_of(data, np.random.default_rng(0))
    found = gather_evidence(toy_config(**asked), data, scores)
    expected = found.alignment if asked else scores.train["trust"]
    np.testing.assert_array_equal(found.trust, expected)
    np.testing.assert_array_equal(found.stored_trust, scores.train["trust"])


def test_scores_of_other_examples_are_refused(tmp_path: Path) -> None:
    data = toy_data(tmp_path)
    scores = scores_of(data, np.random.default_rng(0))
    other = replace(scores, train=scores.train.iloc[::-1])
    with pytest.raises(InputError, match="scores: the train table"):
        gather_evidence(toy_config(), data, other)


def test_training_examples_have_groups_unless_targets_alone_are_grouped(tmp_path: Path) -> None:
    data = toy_data(tmp_path)
    scores = scores_of(data, np.random.default_rng(0))
    by_label, automatic = (
        gather_evidence(toy_config(groups=groups), data, scores) for groups in ("label", "auto")
    )
    np.testing.assert_array_equal(by_label["group_id"], data.labels("train"))
    assert "group_id" not in automatic
