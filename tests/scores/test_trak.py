"""From features on disk to the score matrix, against the formula in float64."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.config import Config
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.models import classifier, model_facts
from attribution.runtime import npy_blocks as matrices
from attribution.runtime.device import resolve_precision
from attribution.runtime.npy_blocks import write_matrix
from attribution.scores import trak
from attribution.scores.alignment import group_alignment
from attribution.scores.features import Store, featurize
from attribution.scores.trak import (
    check_proj_dim,
    predicted_margins,
    score,
    trust_of_unseen,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def store_features(folder: Path, m: int, n: int, targets: int, k: int, shard: int = 0) -> Store:
    """Random features whose scales differ by two orders of magnitude, and random 1 - p."""
    rng, store = np.random.default_rng(m), Store(folder / str(m), m)
    for split, rows in (("train", n), (TARGETS, targets)):
        features = rng.standard_normal((rows, k)) * np.geomspace(1, 0.01, k)
        one_minus_p = rng.random((rows, 1))
        for first in range(0, rows, shard or rows):
            part = slice(first, first + (shard or rows))
            put(store.features_file(split, first), features[part])
            put(store.one_minus_p_file(split, first), one_minus_p[part])
    return store


def config_of(
    stores: list[Store], lambda_reg: float = 0.1, num_blocks: int = 1, weight: str = "mean"
) -> Config:
    """The settings of stored features in so many blocks."""
    width = stores[0].features("train")[0].shape[1]
    given = {"proj_dim": width // num_blocks, "num_blocks": num_blocks, "lambda_reg": lambda_reg}
    return toy_config(**given, loss_gradient_weight=weight)


def put(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_matrix(file, [values], values.shape)


def formula(
    stores: list[Store], lambda_reg: float, weight: str, num_blocks: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and self-influence as the design writes them, in float64, summed over the blocks."""
    scores = self_influence = one_minus_p = 0
    for store in stores:
        phi, targets = (
            np.concatenate(store.features(split)).astype(np.float64) for split in ("train", TARGETS)
        )
        width = phi.shape[1] // num_blocks
        for start in range(0, phi.shape[1], width):
            x, y = phi[:, start : start + width], targets[:, start : start + width]
            gram = x.T @ x
            inverse = np.linalg.inv(gram + lambda_reg * gram.trace() / width * np.eye(width))
            scores = scores + x @ inverse @ y.T / len(stores)
            self_influence = self_influence + ((x @ inverse) * x).sum(1) / len(stores)
        one_minus_p = one_minus_p + store.one_minus_p("train") / len(stores)
    return scores * one_minus_p if weight == "mean" else scores, self_influence


@contextmanager
def blocks_of(rows: int):
    """Every pass reads and writes so many rows at a time."""
    with patch.object(matrices, "BLOCK_ROWS", rows):
        yield


def check(
    stores: list[Store], folder: Path, lambda_reg: float, weight: str, num_blocks: int = 1
) -> np.ndarray:
    config = config_of(stores, lambda_reg, num_blocks, weight)
    found = score(config, stores, folder / "scores.npy")
    scores, self_influence = formula(stores, lambda_reg, weight, num_blocks)
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, scores, rtol=0, atol=2e-5 * np.abs(scores).max())
    np.testing.assert_allclose(found.self_influence, self_influence, rtol=2e-4)
    return np.array(found.values)


@pytest.mark.parametrize("weight", ["mean", "none"])
@pytest.mark.parametrize("lambda_reg", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_scores_and_self_influence_are_those_of_the_formula(
    tmp_path: Path, checkpoints: int, lambda_reg: float, weight: str
) -> None:
    stores = [store_features(tmp_path, m, 90, 11, 16) for m in range(checkpoints)]
    with blocks_of(32):  # of 90: the last block is shorter
        check(stores, tmp_path, lambda_reg, weight)


@pytest.mark.parametrize("lambda_reg", [0.0, 0.1])
@pytest.mark.parametrize("num_blocks", [2, 4])
def test_scores_of_several_blocks_are_the_sum_of_one_formula_a_block(
    tmp_path: Path, num_blocks: int, lambda_reg: float
) -> None:
    stores = [store_features(tmp_path, m, 90, 11, 16, shard=40) for m in range(2)]
    with blocks_of(32):
        found = check(stores, tmp_path, lambda_reg, "mean", num_blocks)
    whole, _ = formula(stores, lambda_reg, "mean")
    assert np.abs(found - whole).max() > 0.05 * np.abs(whole).max()  # and not one for them all


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_alignment_with_held_out_examples_is_a_loop_over_pairs(
    tmp_path: Path, num_blocks: int
) -> None:
    stores = [store_features(tmp_path, m, 50, 9, 16, shard=20) for m in range(3)]
    rng = np.random.default_rng(0)
    weights = rng.random((3, 50)) * (rng.random((3, 50)) < 0.5)
    config, file = config_of(stores, 0.1, num_blocks), tmp_path / "scores.npy"
    with blocks_of(16):
        found = score(config, stores, file, weights)
        again = score(config, stores, file, weights)
    np.testing.assert_array_equal(found.held_out, again.held_out)
    expected = np.zeros(50)
    for store, own in zip(stores, weights, strict=True):
        for x in np.split(np.concatenate(store.features("train")).astype(float), num_blocks, 1):
            gram = x.T @ x
            ridge = 0.1 * gram.trace() / len(gram) * np.eye(len(gram))
            pairs = x @ np.linalg.inv(gram + ridge) @ x.T
            for i in range(50):
                expected[i] += sum(own[j] * pairs[i, j] for j in range(50) if j != i) / 3
    np.testing.assert_allclose(found.held_out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert score(config, stores, tmp_path / "other.npy").held_out is None


@pytest.mark.parametrize("weight", ["mean", "none"])
def test_predicted_margins_of_subsets_are_sums_of_scores(tmp_path: Path, weight: str) -> None:
    stores = [store_features(tmp_path, m, 50, 9, 16, shard=20) for m in range(3)]
    settings = {"proj_dim": 8, "num_blocks": 2, "lambda_reg": 0.1, "loss_gradient_weight": weight}
    subsets = np.random.default_rng(0).random((5, 50)) < 0.5
    with blocks_of(16):
        found = predicted_margins(toy_config(**settings), stores, subsets)
        scores = score(toy_config(**settings), stores, tmp_path / "scores.npy").values
    np.testing.assert_allclose(found, subsets @ scores.astype(float), rtol=2e-5, atol=1e-6)


def test_the_scale_multiplies_scores_alone(tmp_path: Path) -> None:
    stores = [store_features(tmp_path, m, 50, 9, 16) for m in range(2)]
    weights, config = np.full((2, 50), 0.02), config_of(stores)
    one, four = (
        score(config, stores, tmp_path / f"{scale}.npy", weights, scale) for scale in (1, 4)
    )
    np.testing.assert_allclose(four.values, 4 * one.values, rtol=1e-6)
    for name in ("self_influence", "held_out", "row_weight"):
        np.testing.assert_array_equal(getattr(four, name), getattr(one, name))


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_trust_of_unseen_examples_is_a_sum_over_held_out_training_examples(
    tmp_path: Path, num_blocks: int
) -> None:
    stores = [store_features(tmp_path, m, 50, 9, 16, shard=20) for m in range(3)]
    weights = np.random.default_rng(0).random((3, 50))
    config = config_of(stores, 0.1, num_blocks)
    score(config, stores, tmp_path / "scores.npy", weights)
    with blocks_of(4):
        found = trust_of_unseen(config, stores, weights, TARGETS)
    expected = np.zeros(9)
    for store, own in zip(stores, weights, strict=True):
        train, others = (
            np.split(np.concatenate(store.features(split)).astype(float), num_blocks, 1)
            for split in ("train", TARGETS)
        )
        for x, y in zip(train, others, strict=True):
            gram = x.T @ x
            ridge = 0.1 * gram.trace() / len(gram) * np.eye(len(gram))
            expected += y @ np.linalg.inv(gram + ridge) @ x.T @ own / 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70),
    n=st.integers(20, 60),
    targets=st.integers(1, 30),
    lambda_reg=st.sampled_from([0.001, 0.1, 1.0]),
)
def test_the_size_of_a_block_changes_rounding_alone(rows, n, targets, lambda_reg) -> None:
    with tempfile.TemporaryDirectory() as name, blocks_of(rows):
        stores = [store_features(Path(name), m, n, targets, 8) for m in range(2)]
        check(stores, Path(name), lambda_reg, "mean")


def test_more_targets_than_training_examples_and_longer_features(tmp_path: Path) -> None:
    stores = [store_features(tmp_path, m, 12, 40, 24) for m in range(2)]
    check(stores, tmp_path, 0.1, "mean")


def test_no_array_as_large_as_the_matrix_is_in_memory(tmp_path: Path) -> None:
    """n m is 153 MiB; scores, alignment and self-influence need a few blocks of 4 MiB."""
    from benchmarks.common import peak_memory_mib, reset_peak_memory

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell the peak of a process's memory anew")
    n, targets = 20_000, 2_000

    def everything(folder: Path, n: int, targets: int) -> None:
        store = store_features(folder, 0, n, targets, 32)
        reset_peak_memory()
        nonlocal before
        before = peak_memory_mib()
        values = score(config_of([store]), [store], folder / "scores.npy").values
        group_alignment(values, np.arange(targets) % 2, np.array([0.5, 0.5]))

    before = 0.0
    everything(tmp_path / "small", 100, 10)  # what libraries load at their first use
    with patch.object(matrices, "BLOCK_BYTES", 1 << 22):
        everything(tmp_path / "large", n, targets)
    assert peak_memory_mib() - before < 60


def test_shards_make_the_scores_of_the_whole(tmp_path: Path) -> None:
    whole = [store_features(tmp_path / "w", m, 50, 9, 8) for m in range(2)]
    parts = [store_features(tmp_path / "p", m, 50, 9, 8, shard=7) for m in range(2)]
    assert len(parts[0].features("train")) == 8
    a, b = (score(config_of(s), s, tmp_path / f"{i}.npy") for i, s in enumerate((whole, parts)))
    np.testing.assert_allclose(a.values, b.values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a.self_influence, b.self_influence, rtol=1e-4)


@pytest.mark.parametrize(
    ("split", "bad"),
    [("train", np.nan), ("train", np.inf), ("train", 1e30), (TARGETS, np.nan), (TARGETS, -np.inf)],
)
def test_features_that_are_not_finite_or_overflow_are_refused(
    tmp_path: Path, split: str, bad: float
) -> None:
    store = store_features(tmp_path, 0, 50, 9, 8)
    features = np.array(store.features(split)[0])
    features[7, 3] = bad
    np.lib.format.open_memmap(store.features_file(split), mode="r+")[:] = features
    with pytest.raises(InputError, match="finite"), blocks_of(16):
        score(config_of([store]), [store], tmp_path / "scores.npy")
    assert not (tmp_path / "scores.npy").exists() and not store.whitened_targets_file.exists()


def test_a_singular_gram_matrix_is_refused(tmp_path: Path) -> None:
    store = store_features(tmp_path, 0, 5, 3, 8)
    with pytest.raises(InputError, match="singular with lambda_reg 0"):
        score(config_of([store], 0), [store], tmp_path / "scores.npy")


@pytest.mark.parametrize("during", ["first factor", "second factor", "scores"])
def test_an_interrupted_combination_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    stores = [store_features(tmp_path, m, 50, 9, 8) for m in range(2)]
    others = [store_features(tmp_path / "others", m, 50, 9, 8) for m in range(2)]
    monkeypatch.setattr(matrices, "BLOCK_ROWS", 16)
    expected = score(config_of(others), others, tmp_path / "expected.npy")
    ready = {"first factor": 0, "second factor": 1, "scores": 2}[during]
    original, calls = trak.write_matrix, []

    def write(file: Path, blocks, shape) -> None:
        def stopped():
            yield next(iter(blocks))
            raise KeyboardInterrupt

        calls.append(file)
        stop = len(calls) == 2 * ready + (1 if during == "scores" else 2)
        original(file, stopped() if stop else blocks, shape)

    monkeypatch.setattr(trak, "write_matrix", write)
    file = tmp_path / "scores.npy"
    with pytest.raises(KeyboardInterrupt):
        score(config_of(stores), stores, file)
    assert not file.exists()
    assert [store.whitened_targets_file.exists() for store in stores] == [ready > 0, ready > 1]
    calls[:] = [file] * 9  # no further interruption
    found = score(config_of(stores), stores, file)
    assert len(calls) == 9 + 2 * (2 - ready) + 2  # what was finished is not made again
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.self_influence, expected.self_influence)


def test_features_longer_than_the_training_set_need_a_ridge() -> None:
    with pytest.raises(InputError) as caught:
        check_proj_dim(toy_config(proj_dim=33, lambda_reg=0), 32)
    assert str(caught.value).startswith(
        "proj_dim=33: larger than the 32 training examples with lambda_reg=0; "
    )
    check_proj_dim(toy_config(proj_dim=32, lambda_reg=0), 32)
    check_proj_dim(toy_config(proj_dim=33, lambda_reg=0.1), 32)


AUTO_PRECISION = str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")
PRECISIONS = sorted({"float32", AUTO_PRECISION})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (1e20, "features are not finite"),  # the margin is a number, the gradient's square is none
        (3e38, "the margin of sample 0 is not finite"),
        (0.0, "zero, or nearly so"),  # of the layers below the head
    ],
)
def test_a_checkpoint_whose_gradients_overflow_or_vanish_is_refused(
    tmp_path: Path, precision: str, scale: float, says: str
) -> None:
    data = toy_data(tmp_path / "data")
    model = classifier.build("resnet-mini", data.class_names, 0)
    with torch.no_grad():
        model.classifier[1].weight.sign_().mul_(scale)
    classifier.save(model, tmp_path / "model", 16, *model_facts.normalisation("resnet-mini"))
    config = toy_config(
        proj_dim=8, num_blocks=2, num_models=1, lambda_reg=0.1, feature_precision=precision
    )
    with pytest.raises(InputError, match=says):
        stores = featurize(config, data, [tmp_path / "model"], tmp_path / "work")
        trak.score(config, stores, tmp_path / "work" / "scores.npy")
    assert not (tmp_path / "work" / "scores.npy").exists()
