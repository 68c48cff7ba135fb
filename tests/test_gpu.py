"""The same on a GPU: exact gradients, the sketch, training that repeats itself, and whole commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from places import Place
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.gradients.layer_rules import Call
from attribution.gradients.per_sample import capture
from attribution.gradients.sketch import Sketch
from attribution.models import classifier, cuda_graphs, model_facts
from attribution.models.cuda_graphs import ReplayedStep
from attribution.models.predict import predict
from attribution.models.train import train, train_stacked
from attribution.scores.features import featurize
from attribution.scores.trak import score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ALL = np.ones(32, dtype=bool)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return toy_data(tmp_path_factory.mktemp("toy"))


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 16, 16, generator=generator, dtype=dtype)
    return images, torch.arange(12) % 2


def mini(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return classifier.build("resnet-mini", ("dark", "bright"), 0).eval().to(dtype)


def test_per_sample_gradients_equal_one_backward_pass_each() -> None:
    model, (images, labels) = mini(torch.float64).cuda(), batch(torch.float64)
    found = capture(model, images.cuda(), labels.cuda()).per_sample()
    for i in range(len(images)):
        logits = model(images[i : i + 1].cuda()).logits[0]
        own = int(labels[i])
        others = torch.cat([logits[:own], logits[own + 1 :]])
        model.zero_grad()
        (logits[own] - others.logsumexp(0)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k, blocks", [(64, 1), (32, 4), (2048, 1)])
def test_features_are_those_of_the_cpu(k: int, blocks: int) -> None:
    """In float64, for which there are no kernels: these are the routes of a CPU."""
    model, (images, labels) = mini(torch.float64), batch(torch.float64)
    sketch = Sketch(k, dtype=torch.float64, num_blocks=blocks)
    here, margins_here = sketch.features(model, images, labels)
    there, margins_there = sketch.features(model.cuda(), images.cuda(), labels.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9 * float(here.abs().max()))
    torch.testing.assert_close(margins_there.cpu(), margins_here)


@pytest.mark.parametrize("k, blocks", [(64, 1), (256, 4)])
def test_features_by_kernels_are_those_of_the_cpu(
    k: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, (images, labels) = mini(), batch()
    sketch = Sketch(k, num_blocks=blocks)
    here, _ = sketch.features(model, images, labels)
    there, _ = sketch.features(model.cuda(), images.cuda(), labels.cuda())
    assert sketch._call_types[model] is not Call  # the kernels passed the comparison
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4 * float(here.abs().max()))
    plain = Sketch(k, num_blocks=blocks, gpu_kernels=False)
    there, _ = plain.features(model, images.cuda(), labels.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4 * float(here.abs().max()))


def test_training_repeats_itself_to_the_last_bit(data: ImageData) -> None:
    config = toy_config(device="cuda", augment="flip,crop", precision="auto")
    first, second = (
        predict(config, train(config, data, 0, ALL).model, data, "test") for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_a_stack_trains_what_single_models_train(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = toy_config(device="cuda", augment="flip,crop", epochs=1, learning_rate=1e-3)
    stacked = train_stacked(config, data, [0, 1], [ALL, ALL])
    for seed, model in enumerate(stacked):
        alone = predict(config, train(config, data, seed, ALL).model, data, "test")
        np.testing.assert_allclose(predict(config, model, data, "test"), alone, rtol=0, atol=0.02)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_train_what_single_launches_train(
    data: ImageData, precision: str, stacked: bool, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    record, recorded, found = ReplayedStep._record, [], []

    def counting(self: ReplayedStep, draw: torch.Tensor) -> object:
        recorded.append(draw.shape)
        return record(self, draw)

    monkeypatch.setattr(ReplayedStep, "_record", counting)
    for graphs in ("on", "off"):
        config = toy_config(device="cuda", augment="flip,crop", epochs=3, precision=precision)
        config = replace(config, cuda_graphs=graphs)
        if stacked:
            model = train_stacked(config, data, [0, 1], [ALL, ALL])[1]
        else:
            model = train(config, data, 0, ALL).model
        found.append(predict(config, model, data, "test"))
    assert np.array_equal(*found)
    assert len(recorded) == 1  # four steps an epoch, all of one size
    assert "cuda_graphs: not used" not in capfd.readouterr().err


def test_a_step_that_waits_for_the_gpu_stays_eager(capfd: pytest.CaptureFixture) -> None:
    cuda_graphs._tell.cache_clear()
    weight = torch.ones(1, device="cuda", requires_grad=True)

    def step(draw: torch.Tensor) -> torch.Tensor:
        weight.grad = None
        loss = (weight * float(draw.sum())).sum()
        loss.backward()
        return loss.detach()

    replayed = ReplayedStep(step, [weight], [], torch.device("cuda"))
    for value in range(6):
        assert float(replayed(torch.full((3,), float(value)))) == 3 * value
    assert "the step waits for the GPU" in capfd.readouterr().err
    assert torch.randn(2, device="cuda").isfinite().all()  # random numbers are still usable


def test_a_step_that_replays_otherwise_stays_eager(capfd: pytest.CaptureFixture) -> None:
    """A number that Python holds is frozen in the recording; the comparison finds it."""
    cuda_graphs._tell.cache_clear()
    weight, calls = torch.ones(1, device="cuda", requires_grad=True), []

    def step(draw: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        weight.grad = None
        loss = (weight * draw.sum() * len(calls)).sum()
        loss.backward()
        return loss.detach()

    replayed = ReplayedStep(step, [weight], [], torch.device("cuda"))
    losses = [float(replayed(torch.ones(3))) for _ in range(cuda_graphs.WARM_UP)]
    assert losses == [3.0 * (i + 1) for i in range(cuda_graphs.WARM_UP)]
    assert "differs from the eager one" in capfd.readouterr().err


def test_scores_are_those_of_the_cpu(data: ImageData, tmp_path: Path) -> None:
    given = {"num_models": 1, "proj_dim": 64, "num_blocks": 2, "feature_precision": "float32"}
    trained = train(toy_config(**given), data, 0, ALL).model
    classifier.save(trained, tmp_path / "checkpoint", 16, *model_facts.normalisation("resnet-mini"))
    found = []
    for device in ("cpu", "cuda"):
        config, work = toy_config(device=device, **given), tmp_path / device
        stores = featurize(config, data, [tmp_path / "checkpoint"], work)
        found.append(score(config, stores, work / "scores.npy").values)
    here, there = found
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.999  # convolutions are in TF32


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_command_finishes_and_is_not_made_again(
    new_place: Callable[..., Place], jobs: int
) -> None:
    place = new_place(f"gpu-{jobs}")
    first = place.done("ablation", device="cuda", jobs=jobs)
    assert first.made() == {"finetune", "trak", "ablation"}
    assert place.done("ablation", device="cuda", jobs=jobs).made() == set()
