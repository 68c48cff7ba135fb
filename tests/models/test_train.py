"""The training loop: seeds, pairing, early stopping, what diverges, and the figures made of logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.gradients.per_sample import margins as torch_margins
from attribution.models import batches
from attribution.models.batches import Batches, batches_of
from attribution.models.predict import (
    classification_metrics,
    log_probabilities,
    losses,
    margins,
    predict,
)
from attribution.models.train import stacking_pays, train, train_stacked
from attribution.runtime.device import resolve_device, resolve_precision
from attribution.runtime.hashing import derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("toy"))


ALL = np.ones(32, dtype=bool)
LABELS = np.arange(32) % 2


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


# Early stopping: validation labels that contradict training make validation worse and worse.


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


# Batches: pairing


def epoch_of(
    data: ImageData, keep: np.ndarray, augment: str = "flip,crop", epochs: int = 2
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each kept example looks like in each epoch, and in which order they come."""
    config = toy_config(augment=augment)
    batches = Batches(config, data, 9, CPU)
    rows = []
    for _ in range(epochs):
        images, labels = zip(*batches(np.flatnonzero(keep), 4))
        rows.append((torch.cat(images), torch.cat(labels)))
    return rows


def keys(images: torch.Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


@settings(max_examples=20, deadline=None)
@given(removed=st.sets(st.integers(0, 31), min_size=1, max_size=20))
def test_removing_examples_leaves_order_and_augmentation_of_the_others(data, removed) -> None:
    keep = np.array([i not in removed for i in range(32)])
    for (every, labels), (some, some_labels) in zip(epoch_of(data, ALL), epoch_of(data, keep)):
        expected = [(k, int(y)) for k, y in zip(keys(every), labels)]
        found = [(k, int(y)) for k, y in zip(keys(some), some_labels)]
        rest = iter(expected)
        assert all(item in rest for item in found)  # a subsequence, pixels and labels alike
        assert len(found) == keep.sum()


def test_an_epoch_holds_every_kept_example_once(data) -> None:
    keep = np.arange(32) % 3 > 0
    ((images, labels),) = epoch_of(data, keep, augment="none", epochs=1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = data.pixels()[data.rows("train")][keep] / 255
    expected = (pixels - mean) / std
    found = images.permute(0, 2, 3, 1).double().numpy()
    order = np.lexsort(found.reshape(len(found), -1).T)
    reference = np.lexsort(expected.reshape(len(expected), -1).T)
    np.testing.assert_allclose(found[order], expected[reference], atol=1e-5)
    np.testing.assert_array_equal(labels.numpy()[order], data.labels("train")[keep][reference])


def test_every_epoch_has_another_order(data) -> None:
    (first, _), (second, _) = epoch_of(data, ALL, augment="none")
    assert keys(first) != keys(second) and sorted(keys(first)) == sorted(keys(second))


def test_every_epoch_has_another_augmentation(data) -> None:
    (first, _), (second, _) = epoch_of(data, ALL, augment="crop")
    assert sorted(keys(first)) != sorted(keys(second))


# Prediction


@pytest.fixture(scope="module")
def fitted(data) -> torch.nn.Module:
    return train(toy_config(epochs=1), data, 0, ALL).model


def test_prediction_and_plain_batches_are_never_augmented(data, fitted) -> None:
    plain, augmented = toy_config(augment="none"), toy_config(augment="flip,crop")
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(
            predict(plain, fitted, data, split), predict(augmented, fitted, data, split)
        )
        for (a, _), (b, _) in zip(
            batches_of(plain, data, split, 7, CPU), batches_of(augmented, data, split, 7, CPU)
        ):
            assert torch.equal(a, b)


def test_plain_batches_hold_the_split_in_order(data) -> None:
    images, labels = zip(*batches_of(toy_config(), data, "validation", 5, CPU))
    np.testing.assert_array_equal(torch.cat(labels).numpy(), data.labels("validation"))
    pixels = data.pixels()[data.rows("validation")] / 255
    expected = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(torch.cat(images).permute(0, 2, 3, 1), expected, atol=1e-5)


def test_prediction_does_not_depend_on_which_examples_share_a_batch(data, fitted) -> None:
    together = predict(toy_config(), fitted, data, "test")
    one_by_one = [
        fitted(images).logits.detach()[0].numpy()
        for images, _ in batches_of(toy_config(), data, "test", 1, CPU)
    ]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_prediction_leaves_the_model_in_eval_mode_with_its_statistics(data, fitted) -> None:
    fitted.train()
    before = weights(fitted)
    predict(toy_config(), fitted, data, "test")
    assert not any(module.training for module in fitted.modules())
    assert weights(fitted) == before


def test_a_trained_model_is_handed_over_in_eval_mode(data) -> None:
    model = train(toy_config(epochs=1), data, 0, ALL, validate=False).model
    assert not any(module.training for module in model.modules())


def test_outputs_that_are_not_finite_are_refused(data) -> None:
    model = train(toy_config(epochs=1), data, 0, ALL, validate=False).model
    with torch.no_grad():
        model.classifier[1].bias[0] = math.nan
    with pytest.raises(InputError, match="learning_rate=0.01: .*not finite"):
        predict(toy_config(), model, data, "test")


# Figures made of logits


def by_mpmath(row: list[float], label: int) -> tuple[float, float]:
    """Loss and margin of one example with 60 digits more than float64 has."""
    import mpmath

    with mpmath.workdps(80):
        powers = [mpmath.e ** mpmath.mpf(v) for v in row]
        others = sum(p for i, p in enumerate(powers) if i != label)
        loss = mpmath.log(sum(powers)) - mpmath.mpf(row[label])
        return float(loss), float(mpmath.mpf(row[label]) - mpmath.log(others))


LOGIT_ROWS = st.lists(
    st.floats(-1e4, 1e4, width=32).map(lambda v: round(v, 3)), min_size=3, max_size=3
)


@settings(deadline=None)
@given(row=LOGIT_ROWS, label=st.integers(0, 2))
def test_loss_and_margin_are_those_of_exact_arithmetic_on_extreme_logits(row, label) -> None:
    loss, margin = by_mpmath(row, label)
    logits, labels = np.array([row]), np.array([label])
    np.testing.assert_allclose(losses(logits, labels), [loss], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(margins(logits, labels), [margin], rtol=1e-9, atol=1e-9)


@given(row=LOGIT_ROWS, label=st.integers(0, 2), shift=st.floats(-1e3, 1e3))
def test_a_shift_of_all_logits_changes_nothing(row, label, shift) -> None:
    labels = np.array([label])
    for figure in (losses, margins):
        shifted = figure(np.array([row]) + shift, labels)
        np.testing.assert_allclose(figure(np.array([row]), labels), shifted, atol=1e-7)


def test_the_margin_is_the_log_odds_of_the_label() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    found = margins(np.log(probabilities), np.array([0, 0]))
    np.testing.assert_allclose(found, np.log([0.7 / 0.3, 0.1 / 0.9]))


def test_float32_logits_are_computed_with_in_float64() -> None:
    logits = np.float32([[30.0, 0.0]])
    assert losses(logits, np.array([0]))[0] == pytest.approx(np.exp(-30), rel=1e-3)
    assert log_probabilities(logits).dtype == np.float64


def test_log_probabilities_sum_to_one() -> None:
    logits = np.random.default_rng(0).normal(0, 50, (20, 5)).astype(np.float32)
    np.testing.assert_allclose(np.exp(log_probabilities(logits)).sum(axis=1), 1)


def test_classification_metrics_are_those_counted_by_hand() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    metrics = classification_metrics(logits, np.array([0, 0, 1, 0]), "p_")
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    assert metrics == pytest.approx(
        {
            "p_accuracy": 0.5,
            "p_log_loss": (2 * right + 2 * wrong) / 4,
            "p_mean_margin": 0.0,
            "p_worst_class_accuracy": 0.0,
        }
    )


# Seeds and devices


def test_derived_seeds_are_distinct_over_many_paths_and_roots() -> None:
    seeds = [
        derive_seed(root, name, i)
        for root in range(4)
        for name in ("retrain", "checkpoint", "subset", "weights", "order")
        for i in range(100)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_derived_seed_stays_the_same_from_run_to_run() -> None:
    assert derive_seed(0, "retrain", 3) == 1102325635


def test_the_processor_is_found_by_name() -> None:
    assert resolve_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_where_there_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"device={name}: .*device=cpu"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_is_the_processor_where_there_is_no_gpu() -> None:
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x", "tpu\n"])
def test_an_unknown_device_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_device(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_precision_is_what_the_hardware_computes_in(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == resolve_precision("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_precision("auto", CPU) == torch.float32
    with pytest.raises(InputError, match="^feature_precision=bfloat16: this cpu has no"):
        resolve_precision("bfloat16", CPU, "feature_precision")


@pytest.mark.parametrize("prefix", ["", "test_"])
def test_worst_group_accuracy_is_told_where_groups_are_given(prefix: str) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 3)), np.arange(60) % 3
    groups = rng.choice([2, 5, 9], 60, p=[0.6, 0.3, 0.1])
    right: dict[int, list[bool]] = {}
    for row, label, group in zip(logits, labels, groups):
        right.setdefault(int(group), []).append(max(range(3), key=lambda c: row[c]) == label)
    worst = min(sum(each) / len(each) for each in right.values())
    plain = classification_metrics(logits, labels, prefix)
    found = classification_metrics(logits, labels, prefix, groups=groups)
    assert found == plain | {f"{prefix}worst_group_accuracy": pytest.approx(worst)}
    assert worst not in plain.values()
    by_label = classification_metrics(logits, labels, groups=labels)
    assert by_label["worst_group_accuracy"] == by_label["worst_class_accuracy"]


AUTO_PRECISION = str(resolve_precision("auto", torch.device("cpu"))).removeprefix("torch.")


@pytest.mark.parametrize("precision", sorted({"float32", AUTO_PRECISION}))
@pytest.mark.parametrize("stacked", [False, True])
def test_a_diverged_training_is_refused(tmp_path: Path, precision: str, stacked: bool) -> None:
    toy = toy_data(tmp_path / "toy")
    config, keep = toy_config(learning_rate=1e9, precision=precision), np.ones(32, bool)
    with pytest.raises(InputError, match="^learning_rate=1000000000.0: .*use a smaller one"):
        if stacked:
            train_stacked(config, toy, [1, 2], [keep, keep])
            pytest.fail("a diverged stack came back")
        train(config, toy, 1, keep)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_training_set_too_small_for_a_batch_is_refused(tmp_path: Path, kept: int) -> None:
    toy = toy_data(tmp_path / "toy")
    with pytest.raises(InputError, match="^keep: "):
        train(toy_config(), toy, 0, np.arange(32) < kept)


@pytest.mark.parametrize("gap", [0.0, 1.0, 1e4, 1e30])
def test_margins_of_extreme_logits_are_exact(gap: float) -> None:
    """With two classes the margin is the difference of the logits, however certain the model is."""
    logits = np.array([[gap, 0], [-gap, 0]], np.float32)
    expected = [float(np.float32(gap)), -float(np.float32(gap))]
    assert margins(logits, np.zeros(2, int)).tolist() == expected
    found = torch_margins(torch.from_numpy(logits), torch.zeros(2, dtype=torch.int64))
    assert found.tolist() == expected
