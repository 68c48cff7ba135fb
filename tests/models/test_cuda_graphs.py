"""When a training step is run, recorded and replayed, on a fake GPU (tests/test_gpu.py uses a real one)."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import toy_config, toy_data

from attribution.models import cuda_graphs
from attribution.models.batches import Batches
from attribution.models.cuda_graphs import WARM_UP, ReplayedStep, ResidentBatches
from attribution.models.train import train, train_stacked

CPU = torch.device("cpu")


class FakeCuda:
    """Stands in for torch.cuda; `did` lists what was done to graphs.

    A real recording runs nothing and a replay everything; here the recording runs the step, and a
    replay leaves its results as they are.
    """

    def __init__(self) -> None:
        self.did: list[str] = []
        self.mode: str | int = 0

    def set_sync_debug_mode(self, mode: str | int) -> None:
        self.mode = mode
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def get_sync_debug_mode(self) -> str | int:
        return self.mode

    def get_rng_state(self, device: object) -> Tensor:
        return torch.zeros(1)

    def set_rng_state(self, state: Tensor, device: object) -> None:
        self.did.append("restore random state")

    def Stream(self, device: object) -> FakeCuda:
        return self

    def current_stream(self, device: object) -> FakeCuda:
        return self

    def wait_stream(self, other: object) -> None:
        pass

    def stream(self, other: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 0

    def CUDAGraph(self) -> FakeCuda:
        return self

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object, stream: object) -> Iterator[None]:
        self.did.append("record")
        yield

    def replay(self) -> None:
        self.did.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda()
    monkeypatch.setattr(cuda_graphs.torch, "cuda", found)
    cuda_graphs._tell.cache_clear()
    return found


class Model:
    """One weight and one running sum; the step's gradient is the sum of the draw."""

    def __init__(self) -> None:
        self.weight = torch.tensor([2.0], requires_grad=True)
        self.buffer = torch.zeros(1)
        self.seen: list[float] = []

    def step(self, draw: Tensor) -> Tensor:
        self.seen.append(float(draw[0]))
        self.buffer += draw.sum()
        self.weight.grad = None
        loss = (self.weight * draw.sum()).sum()
        loss.backward()
        return loss.detach()

    def replayed(self) -> ReplayedStep:
        return ReplayedStep(self.step, [self.weight], [self.buffer], CPU)


def draws(count: int, size: int = 2) -> list[Tensor]:
    return [torch.full((size,), float(i)) for i in range(1, count + 1)]


def test_a_step_is_run_then_recorded_once_then_replayed(cuda: FakeCuda, capsys) -> None:
    model = Model()
    step = model.replayed()
    for draw in draws(WARM_UP + 3):
        step(draw)
    assert model.seen == [1, 2, 3, 3]  # the third eagerly, and once more while it is recorded
    assert cuda.did == ["restore random state", "record", *["replay"] * 4] and cuda.mode == 0
    assert capsys.readouterr().err == ""


def test_every_batch_size_is_recorded(cuda: FakeCuda) -> None:
    step = Model().replayed()
    for small, large in zip(draws(WARM_UP), draws(WARM_UP, 3), strict=True):
        step(small), step(large)
    assert [did for did in cuda.did if did == "record"] == ["record"] * 2


def test_the_step_that_is_compared_counts_once(cuda: FakeCuda) -> None:
    model = Model()
    step = model.replayed()
    losses = [float(step(draw)) for draw in draws(WARM_UP)]
    assert losses == [4, 8, 12] and model.weight.grad.tolist() == [6]
    assert model.buffer.tolist() == [2 + 4 + 6]


def spoiled_loss(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    return Model.step(model, draw) * (1.1 if "record" in cuda.did else 1)


def spoiled_gradient(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    loss = Model.step(model, draw)
    if "record" in cuda.did:
        model.weight.grad = torch.full_like(model.weight, torch.nan)
    return loss


def spoiled_statistics(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    if "record" in cuda.did:
        model.buffer += 1
    return Model.step(model, draw)


def missing_gradient(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    loss = Model.step(model, draw)
    if "record" in cuda.did:
        model.weight.grad = None
    return loss


def out_of_memory(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    if "record" in cuda.did:
        raise torch.OutOfMemoryError("the memory is full")
    return Model.step(model, draw)


def of_its_own(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    if "record" in cuda.did:
        raise KeyError("an operator that cannot be recorded")
    return Model.step(model, draw)


def waiting(model: Model, cuda: FakeCuda, draw: Tensor) -> Tensor:
    if cuda.mode == "warn":
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    return Model.step(model, draw)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (spoiled_loss, "the replayed step differs from the eager one"),
        (spoiled_gradient, "the replayed step differs from the eager one"),
        (spoiled_statistics, "the replayed step differs from the eager one"),
        (missing_gradient, "the replayed step differs from the eager one"),
        (out_of_memory, "the memory is full"),
        (of_its_own, "an operator that cannot be recorded"),
        (waiting, "the step waits for the GPU"),
    ],
)
def test_a_step_that_cannot_be_replayed_rightly_stays_eager_and_a_line_says_so(
    cuda: FakeCuda, capsys, monkeypatch: pytest.MonkeyPatch, function, why: str
) -> None:
    model, plain = Model(), Model()
    monkeypatch.setattr(model, "step", lambda draw: function(model, cuda, draw))
    step = model.replayed()
    for draw in draws(WARM_UP + 2):
        found, expected = step(draw), plain.step(draw)
        assert found == expected
        assert model.weight.grad == plain.weight.grad and model.buffer == plain.buffer
        cuda.did = [did for did in cuda.did if did != "record"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cuda_graphs: ") and why in line
    again = model.replayed()
    for draw in draws(WARM_UP):
        again(draw)
    assert capsys.readouterr().err == ""  # once in a process


def test_rounding_is_no_difference() -> None:
    expected = torch.tensor([1.0, -100.0, 0.0])
    assert cuda_graphs.are_close(expected + 0.9, expected)
    assert not cuda_graphs.are_close(expected + 1.1, expected)
    assert not cuda_graphs.are_close(expected * torch.nan, expected)
    assert cuda_graphs.are_close(None, None) and not cuda_graphs.are_close(None, expected)
    assert cuda_graphs.are_close(torch.tensor(7), torch.tensor(7))  # a counter


def test_batches_from_images_on_the_device_are_the_same(tmp_path: Path) -> None:
    data, config = toy_data(tmp_path), toy_config(augment="flip,crop")
    images = torch.from_numpy(data.pixels()[data.rows("train")])
    resident = ResidentBatches(images, config, data, 3, CPU, None)
    kept = np.flatnonzero(np.arange(32) % 5 > 0)
    assert resident.is_resident and not Batches.is_resident
    plain = Batches(config, data, 3, CPU)
    for one, other in zip(resident.draws(kept, 4), plain.draws(kept, 4), strict=True):
        assert all(map(torch.equal, resident.load(one), plain.load(other)))


def test_a_model_without_cudnn_has_the_same_state_and_outputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)))
    copied = cuda_graphs.without_cudnn(model)
    assert type(model[1][0]) is nn.BatchNorm2d  # the model itself is left as it is
    assert type(copied[1][0]) is cuda_graphs.NativeBatchNorm
    assert model.state_dict().keys() == copied.state_dict().keys()
    state = dict(model.named_parameters()), dict(model.named_buffers())
    images = torch.randn(5, 3, 6, 6)
    here = torch.func.functional_call(copied, state, (images,))
    statistics = model[1][0].running_mean.clone()
    model[1][0].reset_running_stats()
    torch.testing.assert_close(here, model(images))
    torch.testing.assert_close(statistics, model[1][0].running_mean)


def test_training_on_a_cpu_does_not_import_this_module(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "attribution.models.cuda_graphs", None)  # import fails
    data, keep = toy_data(tmp_path), np.ones(32, bool)
    train(toy_config(epochs=1), data, 0, keep)
    train_stacked(toy_config(epochs=1), data, [0, 1], [keep, keep])
