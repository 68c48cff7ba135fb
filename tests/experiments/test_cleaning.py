"""What a cleaned training set changes: the same seeds with and without it, in numbers and in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import toy_config, toy_data

from attribution.experiments import cleaning
from attribution.models.checkpoints import Finetuned, train_checkpoints
from attribution.models.predict import predict
from attribution.models.train import train
from attribution.runtime.hashing import derive_seed


@pytest.mark.parametrize(
    ("given", "is_measured"),
    [
        ({"keep": "k.csv", "subset_fraction": 1.0}, True),
        ({"labels": "l.csv", "subset_fraction": 1.0}, True),
        ({"keep": "k.csv", "subset_fraction": 0.5}, False),
        ({"subset_fraction": 1.0}, False),
    ],
)
def test_only_models_of_a_whole_cleaned_training_set_are_tested(given: Any, is_measured) -> None:
    assert cleaning.is_measured(toy_config(**given)) == is_measured


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("epochs", "name"), [("", "checkpoint"), ("1", "run")])
def test_both_models_start_from_the_same_seed_and_differ_in_their_training_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: str, name: str
) -> None:
    before = toy_data(tmp_path / "data")
    split = before.examples["split"].to_numpy(object).copy()
    split[before.rows("train")[::3]] = "left out"
    data = dataclasses.replace(before, examples=before.examples.assign(split=split))
    config = toy_config(
        num_models=2, subset_fraction=1.0, keep="kept.csv", checkpoint_epochs=epochs
    )
    monkeypatch.setattr(cleaning, "load_data", lambda c, _: data if c.keep else before)
    masks = np.ones((2, len(data.rows("train"))), bool)
    cleaned = Finetuned.of(masks, train_checkpoints(config, data, masks, tmp_path / "work"))

    found = cleaning.test_metrics(config, data, cleaned.runs, tmp_path / "uncleaned")

    labels = data.labels("test")
    accuracy = np.empty((2, 2))
    for m in range(2):
        seed = derive_seed(config.seed, "checkpoint", m)
        for row, each in enumerate((data, before)):
            everything = np.ones(len(each.rows("train")), bool)
            model = train(config, each, seed, everything).model
            logits = predict(config, model, data, "test")
            accuracy[row, m] = np.mean(logits.argmax(1) == labels)
    assert [found[f"{name}_{m:03d}/test_accuracy"] for m in range(2)] == list(accuracy[0])
    assert found["test_accuracy_mean"] == accuracy[0].mean()
    assert found["test_accuracy_uncleaned_mean"] == accuracy[1].mean()
    assert found["test_accuracy_change"] == pytest.approx((accuracy[0] - accuracy[1]).mean())
    ends = (found[f"test_accuracy_change_ci_{end}"] for end in ("low", "high"))
    assert next(ends) <= found["test_accuracy_change"] <= next(ends)


def test_the_words_say_how_many_seeds_and_never_an_interval_of_one() -> None:
    found = {
        "test_accuracy_mean": 0.97,
        "test_accuracy_uncleaned_mean": 0.96,
        "test_accuracy_change": 0.01,
    }
    one = cleaning.sentences(found, toy_config(num_models=1, keep="k"), 1200)
    assert one[0].endswith(
        "0.9700 trained on the 1,200 examples with keep; 0.9600 without keep (1 seed)"
    )
    assert "chance" in one[1] and "interval" in one[1]
    ends = {"test_accuracy_change_ci_low": -0.004, "test_accuracy_change_ci_high": 0.024}
    several = cleaning.sentences(found | ends, toy_config(num_models=3, keep="k", labels="l"), 9)
    assert "with keep and labels" in several[0] and several[0].endswith("(3 seeds)")
    assert several[1] == "difference: +0.0100 (95 % interval -0.0040 to +0.0240)"
