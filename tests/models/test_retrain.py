"""Retraining: what each model sees, and that nothing is trained twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import retrain
from attribution.models.predict import predict
from attribution.models.retrain import Series, retrained_logits
from attribution.models.train import stacking_pays, train, train_stacked

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = [5, 6]


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    return toy_data(tmp_path / "data", n_train=24, n_other=6)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def trained(monkeypatch) -> list:
    """The models that are really trained, as (seed, removed positions)."""
    done: list = []
    original = retrain._retrain

    def counting(config, data, stack, split, notes):
        members = zip(stack.seeds, stack.keep, strict=True)
        done.extend((seed, np.flatnonzero(~keep).tolist()) for seed, keep in members)
        return original(config, data, stack, split, notes)

    monkeypatch.setattr(retrain, "_retrain", counting)
    return done


def without(*removed: list[int], seeds: Sequence[int] = SEEDS) -> Series:
    return Series.without("x", seeds, 24, [np.array(each, dtype=np.int64) for each in removed])


def logits(config: Config, data: ImageData, wanted: list[Series], work: Path) -> Sequence:
    return retrained_logits(config, data, wanted, "test", work, "test")


ALL, SOME = without([], []), without([1, 4], [1, 4])


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 65])  # trained in stacks, and one by one
def test_retraining_gives_what_training_on_the_rest_gives_directly(data, work, batch_size) -> None:
    config = toy_config(epochs=1, batch_size=batch_size)
    assert stacking_pays(config) == (batch_size == 8)
    for removed, found in zip(([], [1, 4]), logits(config, data, [ALL, SOME], work)):
        keep = np.array([i not in removed for i in range(24)])
        if stacking_pays(config):
            models = train_stacked(config, data, SEEDS, [keep, keep])
        else:
            models = [train(config, data, seed, keep, validate=False).model for seed in SEEDS]
        for own, model in zip(found, models, strict=True):
            np.testing.assert_array_equal(own, predict(config, model, data, "test"))


def test_relabelled_examples_are_seen_with_their_new_labels(data, work) -> None:
    config, seen = toy_config(epochs=1, batch_size=65), np.ones((2, 24), dtype=bool)
    labels = np.stack([1 - data.labels("train")] * 2)
    wanted = [Series("relabelled", SEEDS, seen, labels), Series("plain", SEEDS, seen)]
    relabelled, plain = logits(config, data, wanted, work)
    model = train(config, data, SEEDS[1], seen[1], validate=False, labels=labels[1]).model
    np.testing.assert_array_equal(relabelled[1], predict(config, model, data, "test"))
    assert not np.array_equal(relabelled, plain)


@given(st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_stacks_are_consecutive_parts_of_their_series(n, size, has_labels) -> None:
    rng = np.random.default_rng(n)
    keep, labels = rng.random((n, 7)) < 0.5, rng.integers(0, 3, (n, 7)) if has_labels else None
    stacks = Series("x", range(n), keep, labels).stacks(size)
    assert [len(stack) for stack in stacks[:-1]] == [size] * (len(stacks) - 1)
    assert [seed for stack in stacks for seed in stack.seeds] == list(range(n))
    np.testing.assert_array_equal(np.concatenate([stack.keep for stack in stacks]), keep)
    if has_labels:
        np.testing.assert_array_equal(np.concatenate([stack.labels for stack in stacks]), labels)


def test_a_key_is_of_all_that_the_models_depend_on_and_not_of_the_name() -> None:
    labels = np.zeros((2, 24), dtype=np.int64)
    others = [
        without([], [], seeds=[5, 7]),
        SOME,
        without([4], [1]),
        Series("x", SEEDS, ALL.keep, labels),
        Series("x", SEEDS, ALL.keep, labels + 1),
    ]
    assert len({ALL.key(), *(each.key() for each in others)}) == 6
    assert Series("y", SEEDS, ALL.keep).key() == ALL.key()


# -- what is not trained again ---------------------------------------------------------------------


def test_a_second_call_trains_nothing_and_gives_the_same(data, work, trained) -> None:
    first, second = (logits(toy_config(epochs=1), data, [ALL, SOME], work) for _ in range(2))
    assert len(trained) == 4
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_series_that_remove_the_same_are_trained_once(data, work, trained) -> None:
    wanted = [ALL, SOME, without([4, 1], [1, 4])]
    _, a, b = logits(toy_config(epochs=1), data, wanted, work)
    assert len(trained) == 4
    np.testing.assert_array_equal(a, b)


def test_only_what_an_added_series_needs_is_trained(data, work, trained) -> None:
    config = toy_config(epochs=1)
    logits(config, data, [ALL], work)
    logits(config, data, [ALL, without([0], [2])], work)
    assert trained[2:] == [(SEEDS[0], [0]), (SEEDS[1], [2])]


def test_a_changed_training_setting_trains_again(data, work, trained) -> None:
    for rate in (0.01, 0.02):
        logits(toy_config(epochs=1, learning_rate=rate), data, [ALL], work)
    assert len(trained) == 4


def test_where_it_is_computed_does_not_train_again(data, work, trained) -> None:
    for jobs in (1, 2):
        logits(toy_config(epochs=1, jobs=jobs), data, [ALL], work)
    assert len(trained) == 2


def test_what_was_finished_before_changes_no_bit(data, tmp_path, trained, monkeypatch) -> None:
    monkeypatch.setattr(retrain, "STACK", 3)
    config, seeds = toy_config(epochs=1), range(4)
    wanted = [without(*[[]] * 4, seeds=seeds), without(*[[1, 4]] * 4, seeds=seeds)]
    whole = logits(config, data, wanted, tmp_path / "whole")
    logits(config, data, [without(*[[1, 4]] * 3, seeds=seeds[:3])], tmp_path / "resumed")
    resumed = logits(config, data, wanted, tmp_path / "resumed")
    assert len(trained) == 8 + 3 + 5
    for a, b in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(a, b)


# -- what lies in the folder -----------------------------------------------------------------------


def test_a_result_that_somebody_deletes_before_it_is_read_is_told(data, work) -> None:
    found = logits(toy_config(epochs=1), data, [ALL, SOME], work)
    assert next(found).shape == (2, len(data.rows("test")), 2)
    for file in work.glob("*.npz"):
        file.unlink()
    with pytest.raises(InputError, match=f"cache_dir: .*{work}; try again"):
        next(found)


def of_another_compression(file: Path, kept: np.ndarray) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = 99
    file.write_bytes(content)


DAMAGES = {
    "cut off": lambda file, kept: file.write_bytes(file.read_bytes()[:90]),
    "empty archive": lambda file, kept: np.savez(file),
    "other compression": of_another_compression,
    "nan": lambda file, kept: np.savez(file, logits=np.full_like(kept, np.nan)),
    "infinite": lambda file, kept: np.savez(file, logits=np.full_like(kept, np.inf)),
    "shape": lambda file, kept: np.savez(file, logits=kept[:, 1:]),
    "type": lambda file, kept: np.savez(file, logits=kept.astype(np.float64)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_trained_again(data, work, trained, damage) -> None:
    config = toy_config(epochs=1)
    (first,) = list(logits(config, data, [ALL], work))
    (file,) = work.glob("*.npz")
    DAMAGES[damage](file, first)
    (again,) = logits(config, data, [ALL], work)
    assert len(trained) == 4  # the stack of both seeds, twice
    assert again.tobytes() == first.tobytes()
