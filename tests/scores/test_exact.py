"""Exact attribution: derivatives against finite differences, a closed form, and models trained again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import pretrained
from attribution.models.checkpoints import Finetuned, train_checkpoints
from attribution.models.ensemble import Ensemble
from attribution.reporting import html
from attribution.scores import exact
from attribution.scores.artifact import Scores
from attribution.scores.exact import Run
from attribution.scores.explanation import explain

pytestmark = pytest.mark.usefixtures("one_thread")
MASKS = np.array([np.arange(32) % 4 < 2, np.arange(32) % 4 >= 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Config, data and ensemble of two heads of a small ResNet."""
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("exact")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes)).train()
    model(torch.randn(8, 3, 32, 32))  # statistics of its own
    model.save_pretrained(folder / "model")
    data = toy_data(folder / "data")
    given = {"model": str(folder / "model"), "train_layers": "head", "epochs": 3, "num_models": 2}
    config = toy_config(**given, weight_decay=0.1)
    found = train_checkpoints(config, data, MASKS, folder / "work")
    return config, data, Finetuned.of(MASKS, found).members


def run_of(trained: tuple, m: int = 1) -> Run:
    return Run.of(*trained, m)


def in_float64(run: Run) -> Run:
    inputs = run.inputs.double()
    return replace(run, start=[p.double() for p in run.start], inputs=inputs)


def targets(run: Run, data: ImageData, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = run.received(data.pixels()[data.rows("validation")[:count]])
    return inputs.to(run.inputs.dtype), torch.from_numpy(data.labels("validation")[:count])


def test_derivatives_are_finite_differences_of_whole_trainings(trained) -> None:
    run = in_float64(run_of(trained))
    inputs, labels = targets(run, trained[1])
    found, h = run.derivatives(inputs, labels), 1e-5
    assert not found[~run.keep].any()  # an example that no batch held changes nothing
    assert np.abs(found[run.keep]).min() > 1e-8
    ones = torch.ones(32, dtype=torch.float64)
    for i in (1, 6, 31):
        up, down = (
            run.margins(ones + sign * h * torch.eye(32)[i].double(), inputs, labels).detach()
            for sign in (1, -1)
        )
        np.testing.assert_allclose(found[i], (up - down) / (2 * h), rtol=1e-5, atol=1e-9)


def test_one_step_has_a_closed_form(trained) -> None:
    """AdamW's first step is rate * g / (|g| + eps): its derivative by g is rate * eps / (|g| + eps)^2."""
    config, data, _ = trained
    run, n, rate, eps = in_float64(run_of(trained)), 3, 0.5, 1e-8
    rows, one = torch.arange(n), replace(config, weight_decay=0.0)
    # Gradients of the size of eps, where the step is not merely their sign.
    scaled = replace(run, config=one, inputs=run.inputs * 1e-8, steps=[(rows, rate, 0.9, 0.999)])
    inputs, labels = targets(run, data)
    found = scaled.derivatives(inputs, labels)
    weight, bias = (p.numpy() for p in scaled.start)
    x, y, z = scaled.inputs[rows].numpy(), scaled.labels[rows].numpy(), inputs.numpy()
    own = (softmax(x @ weight.T + bias, axis=1) - np.eye(2)[y]) / n  # (B, C), of the logits
    each = np.concatenate([own[:, :, None] * x[:, None], own[:, :, None]], axis=2)  # (B, C, d + 1)
    gradient = each.sum(axis=0)
    by_gradient = -rate * eps / (np.abs(gradient) + eps) ** 2
    sign = np.array([1, -1])[labels.numpy()]  # of two classes, the margin is a difference of logits
    margin = np.concatenate([z, np.ones((len(z), 1))], axis=1)[:, None] * np.array([1, -1])[:, None]
    expected = np.einsum("kcd,cd,bcd->bk", margin * sign[:, None, None], by_gradient, each)
    np.testing.assert_allclose(found[:n], expected, rtol=1e-6)
    assert not found[n:].any()


def test_the_run_is_the_checkpoint_s_and_any_other_is_refused(trained) -> None:
    config, data, members = trained
    for m in (0, 1):
        assert run_of(trained, m).name == f"checkpoint_00{m}"
    swapped = Ensemble(members.masks[::-1], *list(members.arrays().values())[1:])
    with pytest.raises(InputError, match="trained again predicts otherwise"):
        Run.of(config, data, swapped, 0)
    with pytest.raises(InputError, match="trained again predicts otherwise"):
        Run.of(replace(config, seed=5), data, members, 0)


def test_a_transformer_in_bfloat16_is_repeated_too(trained, tmp_path) -> None:
    """Its head receives float32 from a layer norm, and computes in bfloat16."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = ViTConfig(**sizes, intermediate_size=16, image_size=16, patch_size=8)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    config = replace(trained[0], model=str(tmp_path / "vit"), precision="bfloat16")
    checkpoints = train_checkpoints(config, trained[1], MASKS, tmp_path / "work")
    run = Run.of(config, trained[1], Finetuned.of(MASKS, checkpoints).members, 1)
    inputs, labels = targets(run, trained[1])
    removed = exact.random_removals(run)
    found = run.derivatives(inputs, labels)
    assert exact.agreement(found, removed, run.changes(removed, inputs, labels)).mean() > 0.8


def test_an_example_of_weight_zero_could_be_any(trained) -> None:
    """What weighs nothing has no say: other inputs in its place leave the model as it is."""
    run = run_of(trained)
    inputs, labels = targets(run, trained[1])
    gone = np.array([1, 6])
    other = replace(run, inputs=run.inputs.index_fill(0, torch.from_numpy(gone), 3.0))
    weights = torch.ones(32).index_fill(0, torch.from_numpy(gone), 0)
    torch.testing.assert_close(
        run.margins(weights, inputs, labels), other.margins(weights, inputs, labels)
    )
    ones = torch.ones(32)
    change = run.margins(weights, inputs, labels) - run.margins(ones, inputs, labels)
    np.testing.assert_allclose(run.changes([gone], inputs, labels)[0], change.detach())


def test_derivatives_rank_what_training_again_measures(trained) -> None:
    run = run_of(trained)
    inputs, labels = targets(run, trained[1], 8)
    removed = exact.random_removals(run)
    assert len(removed) == 20 and all(run.keep[gone].all() for gone in removed)
    measured = run.changes(removed, inputs, labels)
    rho = exact.agreement(run.derivatives(inputs, labels), removed, measured)
    assert rho.mean() > 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_layers": "all"}, "train_layers=all: exact=yes needs train_layers=head"),
        ({"augment": "flip"}, "augment=flip: exact=yes needs augment=none"),
        ({"patience": 2}, "patience=2: exact=yes needs patience=0"),
        ({"checkpoint_epochs": "last:2"}, "exact=yes needs no checkpoint_epochs"),
        ({"device": "cuda"}, "device=cuda: exact=yes needs device=cpu"),
        ({"epochs": 10**7}, "epochs=10000000: exact=yes would need .* GiB"),
    ],
)
def test_what_cannot_be_derived_through_is_refused_in_one_line(trained, given, message) -> None:
    config, data, _ = trained
    exact.check(config, data)
    with pytest.raises(InputError, match=message) as refusal:
        exact.check(replace(config, **given), data)
    assert "\n" not in str(refusal.value)


def test_a_model_with_two_heads_is_refused(trained, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "heads", lambda _: ("one", "two"))
    with pytest.raises(InputError, match="needs one linear head, not 2"):
        exact.check(*trained[:2])


def test_an_explanation_has_the_best_checkpoint_s_derivatives_and_says_what_training_again_shows(
    trained, tmp_path
) -> None:
    config, data, members = trained
    pixels = data.pixels()[data.rows("validation")[3]]
    Image.fromarray(np.array(pixels)).save(tmp_path / "mine.png")
    label = data.examples["label_name"][data.rows("validation")[3]]
    given = {"exact": "yes", "image": str(tmp_path / "mine.png"), "label": label, "target": "3,0"}
    scores = Scores(np.zeros((32, 16)), data.table("train"), pd.DataFrame(), {})
    picture, same, other = explain(replace(config, **given), data, scores, members)
    best = members.best(data.labels("validation"))
    run = run_of(trained, best)
    inputs, labels = targets(run, data)
    values = run.derivatives(inputs, labels)
    logits = members.validation_logits[best][[3, 0]]
    for each, column, p in zip(
        (same, other), values.T[[3, 0]], softmax(logits, axis=1), strict=True
    ):
        assert each.agreement == f"1 of 1 checkpoints say {each.predicted}"
        assert each.probability == pytest.approx(p.max(), rel=1e-4)
        shown = each.helpful["position"].to_numpy()
        order = np.argsort(-column)[: config.num_examples]
        assert list(shown) == [i for i in order if column[i] > 0]
        np.testing.assert_allclose(each.helpful["score"], column[shown], rtol=1e-4)
        assert f"(predicted {-column[shown].sum():+.2g})" in each.effect
        assert f"Checked by training {run.name} again" in each.effect
    assert list(picture.helpful["position"]) == list(same.helpful["position"])
    np.testing.assert_allclose(picture.helpful["score"], same.helpful["score"], rtol=1e-3)
    change = run.changes([same.helpful["position"].to_numpy()], inputs, labels)[0, 3]
    assert f"its margin changes by {change:+.2g} (predicted" in same.effect
    page = html.explanations(data, [picture, same], {})
    assert "by the exact derivative of one model" in page and "TRAK" not in page
