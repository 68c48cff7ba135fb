"""The training loop: seeds, pairing, early stopping, stacks of models, and what diverges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import batches
from attribution.models.predict import (
    classification_metrics,
    losses,
    predict,
)
from attribution.models.train import stacking_pays, train, train_stacked
from attribution.runtime.device import resolve_precision

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("toy"))


ALL = np.ones(32, dtype=bool)
LABELS = np.arange(32) % 2
PRECISIONS = ["float32"]
if resolve_precision("auto", CPU) == torch.bfloat16:
    PRECISIONS.append("bfloat16")


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(v.numpy().tobytes() for v in model.state_dict().values())


# Training


def test_training_learns_what_brightness_tells(data) -> None:
    config = toy_config(epochs=5)
    trained = train(config, data, 0, ALL)
    assert trained.history[-1]["train_loss"] < 0.5 * trained.history[0]["train_loss"]
    metrics = classification_metrics(
        predict(config, trained.model, data, "test"), data.labels("test")
    )
    assert metrics["accuracy"] > 0.9


def test_labels_that_contradict_the_image_are_learned_as_given(data, tmp_path: Path) -> None:
    swapped = toy_data(tmp_path)
    swapped.examples["label"] = 1 - swapped.examples["label"]
    config = toy_config(epochs=5)
    logits = predict(config, train(config, swapped, 0, ALL).model, data, "test")
    assert classification_metrics(logits, data.labels("test"))["accuracy"] < 0.1


@pytest.mark.parametrize("augment", ["none", "flip,crop"])
def test_one_seed_gives_the_same_weights_bit_for_bit(data, augment: str) -> None:
    config = toy_config(augment=augment)
    first, second = (train(config, data, 5, ALL) for _ in range(2))
    assert weights(first.model) == weights(second.model)
    assert first.history == second.history


def test_what_was_drawn_before_does_not_reach_into_training(data) -> None:
    config = toy_config(augment="flip,crop")
    first = train(config, data, 5, ALL)
    torch.manual_seed(999)
    np.random.seed(999)
    assert weights(train(config, data, 5, ALL).model) == weights(first.model)


def test_another_seed_gives_other_weights(data) -> None:
    first, second = (train(toy_config(epochs=1), data, seed, ALL) for seed in (1, 2))
    assert weights(first.model) != weights(second.model)


def test_validation_each_epoch_changes_nothing_in_the_weights(data) -> None:
    seen, unseen = (train(toy_config(), data, 3, ALL, validate=v) for v in (True, False))
    assert weights(seen.model) == weights(unseen.model)
    assert "validation_log_loss" in seen.history[0]
    assert "validation_log_loss" not in unseen.history[0]


def test_examples_that_are_not_kept_have_no_influence(tmp_path: Path) -> None:
    clean, spoiled = toy_data(tmp_path / "a"), toy_data(tmp_path / "b")
    keep = np.arange(32) >= 6
    pixels = np.load(spoiled.pixels_file)
    pixels[:6] = 255 - pixels[:6]
    np.save(spoiled.pixels_file, pixels)
    config = toy_config(augment="flip,crop")
    first, second = (train(config, d, 4, keep, validate=False) for d in (clean, spoiled))
    assert weights(first.model) == weights(second.model)


def test_keeping_nothing_is_refused(data) -> None:
    with pytest.raises(InputError, match="keep: leaves 0 training examples"):
        train(toy_config(), data, 0, np.zeros(32, dtype=bool))


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize("steps", range(1, 8))
def test_any_number_of_optimizer_steps_can_be_trained(data, schedule: str, steps: int) -> None:
    config = toy_config(epochs=steps, batch_size=32, schedule=schedule)
    assert len(train(config, data, 0, ALL, validate=False).history) == steps


@pytest.mark.parametrize("kept", [2, 3, 17, 31])
def test_no_number_of_kept_examples_leaves_a_batch_of_one_to_batchnorm(data, kept: int) -> None:
    config = toy_config(epochs=1, batch_size=2)
    trained = train(config, data, 0, np.arange(32) < kept, validate=False)
    assert math.isfinite(trained.history[0]["train_loss"])


def test_a_single_kept_example_is_refused_in_one_line(data) -> None:
    with pytest.raises(InputError):
        train(toy_config(), data, 0, np.arange(32) < 1)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_a_diverging_learning_rate_is_refused_by_name(data, schedule: str) -> None:
    with pytest.raises(InputError) as caught:
        train(toy_config(learning_rate=1e6, schedule=schedule), data, 0, ALL)
    assert str(caught.value).startswith("learning_rate=1000000.0: ")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    resolve_precision("auto", CPU) == torch.float32, reason="this processor has no bfloat16"
)
def test_bfloat16_trains_too(data) -> None:
    config = toy_config(epochs=5, precision="bfloat16")
    trained = train(config, data, 0, ALL)
    assert trained.history[-1]["validation_accuracy"] > 0.9
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert predict(config, trained.model, data, "test").dtype == np.float32


def test_history_has_a_row_for_each_epoch(data) -> None:
    history = train(toy_config(epochs=6, learning_rate=0.1), data, 0, ALL).history
    assert [row["epoch"] for row in history] == list(range(6))


def test_on_epoch_receives_what_history_keeps(data) -> None:
    seen: list[dict] = []
    trained = train(toy_config(epochs=3), data, 0, ALL, lambda metrics, model: seen.append(metrics))
    assert trained.history == seen


# Several small models as one


@pytest.fixture
def double(monkeypatch) -> None:
    """Everything in float64: in float32 batches of eight blow rounding up to 1e-2 in two epochs."""
    original = batches.to_batch
    monkeypatch.setattr(batches, "to_batch", lambda *given: original(*given).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("augment", ["none", "flip,crop"])
def test_a_stack_of_models_is_what_training_each_alone_gives(data, augment: str) -> None:
    config = toy_config(augment=augment)
    keeps = [np.arange(32) != left_out for left_out in (0, 7, 31)]
    stack = train_stacked(config, data, [5, 6, 5], keeps)
    for model, seed, keep in zip(stack, [5, 6, 5], keeps, strict=True):
        alone = train(config, data, seed, keep, validate=False).model
        assert not model.training
        for (name, found), expected in zip(
            model.state_dict().items(), alone.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=name)
    others = [m.state_dict()["classifier.1.weight"] for m in stack]
    assert not torch.allclose(others[0], others[1]) and not torch.allclose(others[0], others[2])


def test_a_model_of_a_stack_does_not_depend_on_its_neighbours(data) -> None:
    config = toy_config()
    _, second, _ = train_stacked(config, data, [1, 2, 3], [ALL] * 3)
    _, again, _ = train_stacked(config, data, [4, 2, 5], [ALL] * 3, [1 - LABELS, LABELS, LABELS])
    assert weights(second) == weights(again)


@pytest.mark.usefixtures("double")
def test_a_stack_learns_the_labels_it_is_given(data) -> None:
    config = toy_config()
    (stacked, _) = train_stacked(config, data, [1, 2], [ALL] * 2, [1 - LABELS, LABELS])
    alone = train(config, data, 1, ALL, validate=False, labels=1 - LABELS).model
    torch.testing.assert_close(stacked.state_dict(), alone.state_dict(), rtol=1e-8, atol=1e-10)


def test_a_diverging_stack_is_refused_by_name(data) -> None:
    with pytest.raises(InputError, match="learning_rate=1e.20"):
        train_stacked(toy_config(learning_rate=1e20), data, [0, 1], [ALL, ALL])


def test_only_small_models_without_early_stopping_are_stacked() -> None:
    assert stacking_pays(toy_config(batch_size=32))
    assert not stacking_pays(toy_config(patience=2))
    assert not stacking_pays(toy_config(batch_size=32, image_size=32))
    assert not stacking_pays(toy_config(model="some/resnet"))


# Early stopping: validation labels that contradict training make validation worse and worse


@pytest.fixture
def contradicted(tmp_path: Path) -> ImageData:
    swapped = toy_data(tmp_path)
    other = swapped.examples["split"] == "validation"
    swapped.examples.loc[other, "label"] = 1 - swapped.examples.loc[other, "label"]
    return swapped


@pytest.mark.parametrize("patience", [1, 3])
def test_training_stops_after_that_many_epochs_without_a_better_loss(
    contradicted, patience
) -> None:
    trained = train(toy_config(epochs=12, patience=patience), contradicted, 0, ALL)
    curve = [row["validation_log_loss"] for row in trained.history]
    assert len(curve) < 12
    assert int(np.argmin(curve)) == len(curve) - 1 - patience


def test_early_stopping_gives_back_the_weights_of_the_best_epoch(contradicted) -> None:
    config = toy_config(epochs=12, patience=2)
    trained = train(config, contradicted, 0, ALL)
    logits = predict(config, trained.model, contradicted, "validation")
    loss = losses(logits, contradicted.labels("validation")).mean()
    curve = [row["validation_log_loss"] for row in trained.history]
    assert loss == pytest.approx(min(curve), rel=1e-6)
    assert loss < curve[-1]


def test_patience_zero_trains_every_epoch_though_validation_gets_worse(contradicted) -> None:
    assert len(train(toy_config(epochs=12, patience=0), contradicted, 0, ALL).history) == 12


def test_a_trained_model_is_handed_over_in_eval_mode(data) -> None:
    model = train(toy_config(epochs=1), data, 0, ALL, validate=False).model
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_diverged_training_is_refused(data, precision: str, stacked: bool) -> None:
    config, keep = toy_config(learning_rate=1e9, precision=precision), np.ones(32, bool)
    with pytest.raises(
        InputError, match="^learning_rate=1000000000.0: .*use a smaller learning rate"
    ):
        if stacked:
            train_stacked(config, data, [1, 2], [keep, keep])
            pytest.fail("a diverged stack came back")
        train(config, data, 1, keep)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_training_set_too_small_for_a_batch_is_refused(data, kept: int) -> None:
    with pytest.raises(InputError, match="^keep: "):
        train(toy_config(), data, 0, np.arange(32) < kept)
