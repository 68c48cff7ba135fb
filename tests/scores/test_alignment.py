"""Groups, their weights, and the alignment of training examples with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from attribution.config import FIELDS
from attribution.errors import InputError
from attribution.scores.alignment import (
    auto_groups,
    check_groups,
    group_alignment,
    group_ids,
    group_weights,
    held_out_weights,
    unweighted,
)

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


# Refused before anything is trained


def split_table(**groups: list) -> pd.DataFrame:
    """One row a listed value of each split's groups."""
    rows = [(split, value) for split, values in groups.items() for value in values]
    return pd.DataFrame(rows, columns=["split", "camera"]).assign(label=range(len(rows)))


def test_a_column_whose_groups_all_have_targets_is_accepted() -> None:
    check_groups(split_table(train=["a", "b"], validation=["b", "a"], test=["a", "b"]), "camera")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_group_without_a_target_is_refused_by_its_value(split: str) -> None:
    table = split_table(validation=["a", "b"], **{split: ["a", "lost"]})
    with pytest.raises(InputError, match="^groups=camera: group 'lost' has no validation example"):
        check_groups(table, "camera")


def test_the_targets_alone_have_to_be_of_two_groups() -> None:
    with pytest.raises(InputError, match="groups=camera: .*two values"):
        check_groups(split_table(train=["a", "b"], validation=["a", "a"]), "camera")
    with pytest.raises(InputError, match="groups=camra: no such column; did you mean camera"):
        check_groups(split_table(validation=["a", "b"]), "camra")


@pytest.mark.parametrize("rows", [{"train": ["a", None]}, {"test": ["b", None]}, {"test": ["a"]}])
def test_a_column_that_cannot_group_the_other_splits_is_refused_as_early(rows) -> None:
    given = {"train": ["a", "b"], "validation": ["a", "b"], "test": ["a", "b"]} | rows
    with pytest.raises(InputError):
        check_groups(split_table(**given), "camera")


def test_automatic_groups_need_no_column() -> None:
    check_groups(split_table(train=["a"], validation=["b"]), "auto")
    with pytest.raises(InputError, match="groups=auot: no such column; did you mean auto"):
        check_groups(split_table(validation=["a", "b"]), "auot")


# Automatic groups


def clustered(sizes: list[list[int]], noise: float = 0.3, seed: int = 0):
    """Score columns around one direction a cluster: scores, labels and cluster of each target."""
    rng = np.random.default_rng(seed)
    labels = [
        label for label, clusters in enumerate(sizes) for size in clusters for _ in range(size)
    ]
    cluster = [c for clusters in sizes for c, size in enumerate(clusters) for _ in range(size)]
    labels, cluster = np.array(labels), np.array(cluster)
    order = rng.permutation(len(labels))
    labels, cluster = labels[order], cluster[order]
    centres = rng.normal(size=(len(sizes), 2, 50))
    scores = centres[labels, cluster] + noise * rng.normal(size=(len(labels), 50))
    return scores.T.astype(np.float32), labels, cluster


def partition(ids: np.ndarray) -> set[frozenset[int]]:
    """Groups without their numbers."""
    return {frozenset(np.flatnonzero(ids == i).tolist()) for i in np.unique(ids)}


def assert_numbered(ids: np.ndarray) -> None:
    assert sorted(set(ids.tolist())) == list(range(ids.max() + 1))


@pytest.mark.parametrize("sizes", [[[20, 20]], [[20, 10], [9, 30]], [[12, 12], [12, 12], [5, 20]]])
def test_two_clusters_within_each_label_are_found(sizes) -> None:
    scores, labels, cluster = clustered(sizes)
    ids = auto_groups(scores, labels)
    assert partition(ids) == partition(2 * labels + cluster)
    assert_numbered(ids)
    assert ids.tolist() == group_ids(pd.DataFrame({"label": labels}), "auto", scores).tolist()


@pytest.mark.parametrize("groups", ["auto", "auto_uncentred"])
def test_the_split_is_the_sign_of_a_projection_on_scikit_learn_s_component(groups: str) -> None:
    rng = np.random.default_rng(4)
    scores = (rng.normal(size=(30, 24)) + rng.normal(size=(30, 1))).astype(np.float32)
    rows = (scores / np.linalg.norm(scores, axis=0)).T.astype(np.float64)
    component = PCA(1).fit(rows).components_[0]
    projected = rows @ component
    if groups == "auto":
        projected -= projected.mean()
    targets = pd.DataFrame({"label": np.zeros(24, int)})
    assert partition(group_ids(targets, groups, scores)) == partition((projected > 0).astype(int))


def test_clusters_that_two_labels_share_stay_apart() -> None:
    scores, _, cluster = clustered([[40, 40]])
    labels = np.arange(80) % 2
    assert partition(auto_groups(scores, labels)) == partition(2 * labels + cluster)


@pytest.mark.parametrize(("small", "groups"), [(1, 1), (2, 1), (3, 2)])
def test_a_pseudo_group_below_five_percent_stays_with_its_label(small, groups) -> None:
    scores, labels, cluster = clustered([[60 - small, small]], noise=0.01)
    ids = auto_groups(scores, labels)
    assert partition(ids) == partition(cluster if groups == 2 else labels)


def test_a_single_odd_target_is_no_group_of_its_own() -> None:
    scores, labels, _ = clustered([[9, 1], [8, 8]], noise=0.01)
    ids = auto_groups(scores, labels)
    assert len(set(ids[labels == 0])) == 1 and len(set(ids[labels == 1])) == 2
    assert_numbered(ids)


def test_labels_of_one_target_and_equal_columns_stay_whole() -> None:
    scores = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
    labels = np.array([3, 5, 7, 8, 8, 8, 8, 9, 9, 9, 9, 9])
    scores[:, labels == 8] = scores[:, [3]] * np.array([1, 2, 0.5, 3], np.float32)
    scores[:, labels == 9] = 0
    assert auto_groups(scores, labels).tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]


def test_columns_of_zeros_spoil_nothing() -> None:
    scores, labels, cluster = clustered([[15, 15], [10, 12]])
    zeros = np.zeros((50, 4), np.float32)
    ids = auto_groups(np.hstack([scores, zeros]), np.append(labels, [0, 0, 1, 1]))
    assert partition(ids[:-4]) == partition(2 * labels + cluster)
    assert_numbered(ids)


@given(st.integers(0, 99), st.lists(st.integers(-6, 6), min_size=24, max_size=24))
def test_the_length_of_a_score_column_does_not_matter(seed, powers) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(20, 24)).astype(np.float32), np.arange(24) % 3
    stretched = scores * np.exp2(powers).astype(np.float32)  # exact in any precision
    assert auto_groups(stretched, labels).tolist() == auto_groups(scores, labels).tolist()


@given(st.integers(0, 99))
def test_groups_follow_their_targets_wherever_these_stand(seed) -> None:
    scores, labels, _ = clustered([[12, 9], [7, 10]], seed=seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    moved = auto_groups(scores[:, order], labels[order])
    assert partition(moved) == partition(auto_groups(scores, labels)[order])


@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 4))
def test_pseudo_groups_divide_labels_and_none_is_tiny(seed, n, n_labels) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_labels, n)
    ids = auto_groups(rng.normal(size=(6, n)).astype(np.float32), labels)
    assert_numbered(ids)
    for group in range(ids.max() + 1):
        (label,) = set(labels[ids == group])
        assert (ids == group).sum() >= max(2, 0.05 * (labels == label).sum()) or len(
            set(ids[labels == label])
        ) == 1


def test_a_matrix_read_in_blocks_gives_the_same_groups(monkeypatch) -> None:
    scores, labels, cluster = clustered([[14, 17], [20, 11]])
    monkeypatch.setattr("attribution.runtime.npy_blocks.BLOCK_ROWS", 7)
    assert partition(auto_groups(scores, labels)) == partition(2 * labels + cluster)


def test_groups_weigh_alike_and_share_among_members_that_a_checkpoint_did_not_see() -> None:
    rng = np.random.default_rng(0)
    masks, groups = rng.random((4, 30)) < 0.5, rng.integers(0, 3, 30)
    masks[0, groups == 2] = True  # nobody of that group was left out
    found = held_out_weights(masks, groups)
    for m in range(4):
        for i in range(30):
            others = [j for j in range(30) if groups[j] == groups[i] and not masks[m, j]]
            assert found[m, i] == (0 if masks[m, i] else 1 / (3 * len(others)))
    np.testing.assert_allclose(found[1:].sum(axis=1), 1)
    assert found[0].sum() == pytest.approx(2 / 3)


def test_unweighted_alignment_is_that_of_scores_without_their_rows_weights() -> None:
    rng = np.random.default_rng(0)
    plain, row_weight = rng.normal(size=(20, 6)), rng.random(20)
    groups, weights = np.arange(6) % 2, np.array([0.7, 0.3])
    aligned = group_alignment(plain * row_weight[:, None], groups, weights)
    expected = group_alignment(plain, groups, weights)
    np.testing.assert_allclose(unweighted(aligned, row_weight), expected, rtol=1e-12)
    assert unweighted(np.zeros(1), np.zeros(1)) == [0]


@pytest.mark.parametrize("kind", ["exp_loss", "loss", "uniform", "paper"])
@pytest.mark.parametrize("losses", [[0, 0, 0], [1e6, 0, 1e6], [800, 1, 1], [7, 7, 7]])
def test_weights_of_groups_are_finite_and_sum_to_one(kind: str, losses: list[float]) -> None:
    weights = group_weights(np.array(losses, float), np.array([0, 1, 2]), kind)
    assert np.isfinite(weights).all() and weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    if len(set(losses)) == 1:
        np.testing.assert_allclose(weights, 1 / 3)


def test_alignment_with_one_target_is_its_column() -> None:
    values = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    weights = group_weights(np.array([3.0]), np.array([0]), "exp_loss")
    np.testing.assert_array_equal(group_alignment(values, np.array([0]), weights), values[:, 0])


@pytest.mark.parametrize("value", [0.0, 1.0, -1e30])
def test_labels_whose_scores_are_all_equal_are_not_divided(value: float) -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = auto_groups(np.full((4, 6), value, np.float32), labels)
    np.testing.assert_array_equal(found, labels)
