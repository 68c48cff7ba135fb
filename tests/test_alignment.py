"""Groups, their weights, and the alignment of training examples with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.alignment import group_alignment, group_ids, group_weights
from attribution.config import FIELDS
from attribution.errors import InputError

KINDS = FIELDS["group_weights"].metadata["choices"]


@st.composite
def grouped_losses(draw) -> tuple[np.ndarray, np.ndarray]:
    n_groups = draw(st.integers(2, 5))
    groups = [*range(n_groups), *draw(st.lists(st.integers(0, n_groups - 1), max_size=20))]
    n = len(groups)
    losses = draw(st.lists(st.floats(0, 50), min_size=n, max_size=n))
    return np.array(losses), np.array(groups)


def alignment_by_loops(scores, groups, weights) -> list[float]:
    result = []
    for row in scores:
        total = 0.0
        for g, weight in enumerate(weights):
            members = [float(row[j]) for j in range(len(row)) if groups[j] == g]
            total += weight * sum(members) / len(members)
        result.append(total)
    return result


@given(grouped=grouped_losses(), seed=st.integers(0, 2**32 - 1), n_train=st.integers(1, 8))
def test_alignment_is_the_weighted_mean_of_group_means(grouped, seed, n_train) -> None:
    losses, groups = grouped
    scores = np.random.default_rng(seed).normal(size=(n_train, len(groups))).astype(np.float32)
    weights = group_weights(losses, groups, "exp_loss")
    expected = alignment_by_loops(scores, groups, weights)
    np.testing.assert_allclose(
        group_alignment(scores, groups, weights), expected, rtol=1e-10, atol=1e-12
    )


def test_a_group_counts_by_its_weight_and_not_by_its_size() -> None:
    groups = np.array([0] * 99 + [1])
    scores = np.where(groups == 1, 1.0, 0.0)[None, :].astype(np.float32)
    np.testing.assert_allclose(group_alignment(scores, groups, np.array([0.5, 0.5])), [0.5])


def test_positive_scores_give_positive_alignment() -> None:
    scores = np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)
    helpful, harmful = group_alignment(scores, np.array([0, 1]), np.array([0.3, 0.7]))
    assert helpful > 0 > harmful


def test_small_scores_are_not_lost_beside_large_ones() -> None:
    scores = np.array([[1e8, 1.0, -1e8]], np.float32)
    result = group_alignment(scores, np.array([0, 1, 2]), np.full(3, 1 / 3))
    np.testing.assert_allclose(result, [1 / 3], rtol=1e-6)


def test_a_memory_map_read_in_blocks_gives_what_rows_read_one_by_one_give(tmp_path: Path) -> None:
    n_train, n_targets = 129, 1 << 18  # 129 MiB of float32, which takes more than one block
    scores = np.lib.format.open_memmap(
        tmp_path / "scores.npy", "w+", np.float32, (n_train, n_targets)
    )
    rng = np.random.default_rng(0)
    columns = rng.integers(0, n_targets, n_train)
    values = rng.normal(size=n_train).astype(np.float32)
    scores[np.arange(n_train), columns] = values
    groups = np.arange(n_targets) % 4
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    result = group_alignment(scores, groups, weights)
    expected = values.astype(float) * weights[columns % 4] / (n_targets / 4)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@given(grouped_losses(), st.sampled_from(KINDS))
def test_weights_are_one_a_group_not_negative_and_sum_to_one(grouped, kind) -> None:
    losses, groups = grouped
    weights = group_weights(losses, groups, kind)
    assert weights.shape == (groups.max() + 1,)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1)


@pytest.mark.parametrize("kind", ["exp_loss", "loss"])
def test_a_worse_group_weighs_more(kind: str) -> None:
    weights = group_weights(np.array([0.5, 0.5, 2.0, 1.0]), np.array([0, 0, 1, 2]), kind)
    assert weights[1] > weights[2] > weights[0]


def test_under_the_paper_formula_read_literally_a_worse_group_weighs_less() -> None:
    weights = group_weights(np.array([0.5, 2.0, 1.0]), np.array([0, 1, 2]), "paper")
    assert weights[1] < weights[2] < weights[0]


def test_under_uniform_weights_every_group_weighs_the_same() -> None:
    weights = group_weights(np.array([0.0, 9.0, 1.0]), np.array([0, 1, 1]), "uniform")
    np.testing.assert_allclose(weights, [0.5, 0.5])


@given(grouped_losses(), st.sampled_from(["exp_loss", "paper"]))
def test_exponential_weights_follow_their_formula(grouped, kind) -> None:
    losses, groups = grouped
    mean = np.array([losses[groups == g].mean() for g in range(groups.max() + 1)])
    sign = 1 if kind == "exp_loss" else -1
    expected = np.exp(sign * mean) / np.exp(sign * mean).sum()
    np.testing.assert_allclose(group_weights(losses, groups, kind), expected, rtol=1e-9)


def test_loss_weights_are_in_proportion_to_the_mean_loss() -> None:
    weights = group_weights(np.array([1.0, 3.0, 6.0]), np.array([0, 0, 1]), "loss")
    np.testing.assert_allclose(weights, [0.25, 0.75])


@pytest.mark.parametrize("kind", KINDS)
def test_very_large_losses_do_not_overflow(kind: str) -> None:
    weights = group_weights(np.array([1e5, 2e5, 3.0]), np.array([0, 1, 2]), kind)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_loss_all_groups_weigh_the_same(kind: str) -> None:
    np.testing.assert_allclose(group_weights(np.zeros(4), np.arange(4), kind), np.full(4, 0.25))


def test_groups_are_numbered_in_order_of_their_values() -> None:
    targets = pd.DataFrame({"label": [7, 3, 7, 5]})
    assert group_ids(targets, "label").tolist() == [2, 0, 2, 1]


def test_a_column_of_text_makes_groups() -> None:
    targets = pd.DataFrame({"camera": ["b", "a", "b"]})
    assert group_ids(targets, "camera").tolist() == [1, 0, 1]


def test_an_unknown_column_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(InputError) as caught:
        group_ids(pd.DataFrame({"label": [0, 1], "camera": [0, 1]}), "camra")
    assert str(caught.value) == "groups=camra: no such column; did you mean camera"


def test_a_column_with_a_single_value_is_refused() -> None:
    with pytest.raises(InputError, match="groups=label: .*two values"):
        group_ids(pd.DataFrame({"label": [4, 4, 4]}), "label")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_column_with_a_missing_value_is_refused(missing) -> None:
    with pytest.raises(InputError, match="groups=camera: .*missing"):
        group_ids(pd.DataFrame({"camera": [1, 2, missing]}), "camera")
