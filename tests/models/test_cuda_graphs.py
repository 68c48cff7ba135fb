"""When a function is run, watched, recorded and replayed; on a GPU of paper (tests/test_gpu.py has a real one)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from attribution.models import cuda_graphs
from attribution.models.cuda_graphs import WARM_UP, Replayed

CPU = torch.device("cpu")


class Paper:
    """What torch.cuda is asked for; `did` is what happened to it."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.mode: str | int = 0

    def set_sync_debug_mode(self, mode: str | int) -> None:
        self.mode = mode
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def get_sync_debug_mode(self) -> str | int:
        return self.mode

    def Stream(self, device: object) -> Paper:
        return self

    def current_stream(self, device: object) -> Paper:
        return self

    def wait_stream(self, other: object) -> None:
        pass

    def stream(self, other: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 0

    def CUDAGraph(self) -> Paper:
        return self

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object, stream: object) -> Iterator[None]:
        self.did.append("record")
        yield

    def replay(self) -> None:
        self.did.append("replay")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Paper:
    found = Paper()
    monkeypatch.setattr(cuda_graphs.torch, "cuda", found)
    return found


def calls(function: Callable, count: int, sizes: tuple[int, ...] = (2,)) -> Replayed:
    replayed = Replayed(function, CPU)
    for call in range(count):
        for size in sizes:
            replayed(torch.full((size,), float(call)))
    return replayed


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_function_is_run_then_recorded_once_then_replayed(paper: Paper) -> None:
    seen: list[float] = []

    def function(value: torch.Tensor) -> list[torch.Tensor]:
        seen.append(float(value[0]))
        return [value]

    calls(function, WARM_UP + 3)
    assert seen == [*range(WARM_UP), WARM_UP]  # once more while it is recorded
    assert paper.did == ["record", *["replay"] * 3] and paper.mode == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_every_shape_is_recorded(paper: Paper) -> None:
    calls(lambda value: [value], WARM_UP + 1, sizes=(2, 3))
    assert paper.did == ["record", "replay"] * 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_function_that_waits_for_the_gpu_is_never_recorded(paper: Paper) -> None:
    seen = []

    def function(value: torch.Tensor) -> list[torch.Tensor]:
        seen.append(float(value[0]))
        if paper.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return [value]

    calls(function, WARM_UP + 3)
    assert seen == list(range(WARM_UP + 3)) and paper.did == []


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), RuntimeError("not permitted when stream is capturing")],
)
def test_what_cannot_be_recorded_is_run_as_it_is(paper: Paper, error: Exception) -> None:
    def function(value: torch.Tensor) -> list[torch.Tensor]:
        if paper.did:
            paper.did.clear()
            raise error
        return [value + 1]

    replayed = calls(function, WARM_UP + 2)
    assert replayed(torch.zeros(2))[0].tolist() == [1, 1] and paper.did == []


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_an_error_of_the_function_s_own_is_raised(paper: Paper) -> None:
    def function(value: torch.Tensor) -> list[torch.Tensor]:
        if paper.did:
            raise RuntimeError("shapes do not match")
        return [value]

    with pytest.raises(RuntimeError, match="shapes do not match"):
        calls(function, WARM_UP + 1)
