"""The same on a GPU: exact gradients, the sketch, training that repeats itself, and whole commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Place
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.gradients.per_sample import capture
from attribution.gradients.sketch import Sketch
from attribution.models import classifier, cuda_graphs
from attribution.models.cuda_graphs import Replayed
from attribution.models.predict import predict
from attribution.models.train import train, train_stacked
from attribution.scores.trak import compute_scores

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
    """In float64, which the kernels do not compute in: these are the routes of a CPU."""
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


def test_a_replayed_function_gives_what_the_function_gives() -> None:
    weight = torch.randn(4, 4, device="cuda")
    replayed = Replayed(lambda x: [x @ weight], torch.device("cuda"))
    for step in range(8):
        value = torch.full((2 + step % 2, 4), float(step))
        (found,) = replayed(value)
        torch.testing.assert_close(found, value.cuda() @ weight)


def test_what_cannot_be_recorded_is_run_as_it_is() -> None:
    replayed = Replayed(lambda x: [x * float(x.sum())], torch.device("cuda"))
    for step in range(6):
        value = torch.full((3,), float(step))
        (found,) = replayed(value)
        torch.testing.assert_close(found.cpu(), value * value.sum())
    assert replayed._graphs == {torch.Size([3]): None}
    assert torch.randn(2, device="cuda").isfinite().all()  # the generator is as before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_train_what_single_launches_train(
    data: ImageData, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(device="cuda", augment="flip,crop", epochs=3, precision=precision)
    whole, recorded, found = Replayed._record, [], []

    def record(self: Replayed, value: torch.Tensor) -> object:
        recorded.append(whole(self, value))
        return recorded[-1]

    monkeypatch.setattr(Replayed, "_record", record)
    for warm_up in (cuda_graphs.WARM_UP, 1 << 30):
        monkeypatch.setattr(cuda_graphs, "WARM_UP", warm_up)
        found.append(predict(config, train(config, data, 0, ALL).model, data, "test"))
    assert np.array_equal(*found)
    assert len(recorded) == 1 and recorded[0] is not None  # four steps an epoch, all of one size


def test_scores_are_those_of_the_cpu(data: ImageData, tmp_path: Path) -> None:
    given = {"num_models": 1, "proj_dim": 64, "num_blocks": 2, "feature_precision": "float32"}
    trained = train(toy_config(**given), data, 0, ALL).model
    classifier.save(trained, tmp_path / "checkpoint", 16, *classifier.normalisation("resnet-mini"))
    here, there = (
        compute_scores(
            toy_config(device=device, **given), data, [tmp_path / "checkpoint"], tmp_path / device
        ).values
        for device in ("cpu", "cuda")
    )
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.999  # convolutions are in TF32


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_command_finishes_and_is_not_made_again(
    new_place: Callable[..., Place], jobs: int
) -> None:
    place = new_place(f"gpu-{jobs}")
    first = place.done("ablation", device="cuda", jobs=jobs)
    assert first.made() == {"finetune", "trak", "ablation"}
    assert place.done("ablation", device="cuda", jobs=jobs).made() == set()
