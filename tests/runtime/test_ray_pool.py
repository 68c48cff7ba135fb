"""backend=ray on a cluster of three real nodes (one without cores, for the driver) on this machine."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import toy_config, toy_data

from attribution.config import Config
from attribution.errors import InputError
from attribution.experiments import comparison
from attribution.experiments.arms import Trial
from attribution.models import checkpoints, classifier
from attribution.models import retrain as retraining
from attribution.runtime import ray_pool
from attribution.runtime.parallel import parallel_map
from attribution.scores import features, trak

ray = pytest.importorskip("ray", reason="the optional extra 'ray'")
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Nodes that were started in another folder, with another home and another cache."""
    from ray.cluster_utils import Cluster

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # The tests' own functions are not in a package that the project sends to workers.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        patch.setenv("HOME", str(elsewhere))
        patch.setenv("TRAK_ABLATION_CACHE", str(elsewhere / "cache"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {**NODE, "num_cpus": 0, "include_dashboard": False}
        # Workers that start before there is a task lack our packages, and are ended unused.
        head["_system_config"] = {"prestart_worker_first_driver": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**NODE)
        cluster.add_node(**NODE, num_gpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def on_ray(cluster) -> Callable[..., Config]:
    """A function that gives the toy settings on the cluster."""
    return lambda **given: toy_config(
        **{"backend": "ray", "ray_address": cluster.address, "jobs": 0} | given
    )


def mapped(function: Callable, tasks: list[tuple], config: Config, **options: Any) -> list:
    """Results in the order of the tasks."""
    found = parallel_map(function, tasks, config.jobs or 2, config=config, **options)
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


# -- the same results, far from the driver's disk --------------------------------------------------


def far_from(folder: Path, function: Callable) -> Callable:
    """The function for a worker to which this folder's files are not there (nor its names)."""

    def run(*arguments: Any) -> Any:
        def refuse(event: str, values: tuple) -> None:
            if event in ("open", "os.listdir") and str(folder) in str(values[0]):
                raise FileNotFoundError(f"{values[0]} is on the driver's disk")

        sys.addaudithook(refuse)
        return function(*arguments)

    return run


@pytest.mark.slow
def test_every_kind_of_task_gives_the_same_bits_as_local_workers(
    on_ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model in a folder, and of stacked models that are retrained; no worker sees the driver's disk."""
    driver = tmp_path / "driver"
    data = toy_data(driver / "data", n_train=24, n_other=6)
    network = classifier.build("resnet-mini", ("dark", "bright"), 0)
    classifier.save(network, driver / "model", 16, (0.5,) * 3, (0.25,) * 3)
    masks = checkpoints.subset_masks(24, 3, 0.5, 0)
    removed = np.arange(8)
    trials = [Trial("none", 0.0, (removed[:0],) * 2), Trial("harmful", 0.3, (removed,) * 2)]
    given = {"jobs": 2, "proj_dim": 16, "model": str(driver / "model"), "patience": 0}
    found = {}
    for config in (toy_config(**given), on_ray(**given)):
        work = driver / config.backend
        work.mkdir()
        if config.backend == "ray":
            for module, name in (
                (checkpoints, "_train_checkpoint"),
                (features, "_featurize"),
                (retraining, "_retrain"),
            ):
                monkeypatch.setattr(module, name, far_from(driver, getattr(module, name)))
        trained = checkpoints.train_checkpoints(config, data, masks, work)
        stores = features.featurize(config, data, [c.folder for c in trained], work / "trak")
        scores = trak.score(config, stores, work / "trak" / "scores.npy")
        stacked = dataclasses.replace(config, model="resnet-mini", image_size=16)
        retrained = comparison.retrain(stacked, data, trials, [1, 2], work / "retrainings")
        found[config.backend] = [
            *(c.folder.joinpath("model.safetensors").read_bytes() for c in trained),
            *(c.logits["train"].tobytes() for c in trained),
            *(str(c.history) for c in trained),
            *(f.read_bytes() for f in sorted((work / "trak").rglob("*.mmap"))),
            scores.values.tobytes(),
            *(logits.tobytes() for logits in retrained),
        ]
    assert len(found["local"]) > 9 + 4 * 3 + 2 and found["ray"] == found["local"]


def whereabouts(_: int) -> tuple[str, str, float]:
    import attribution

    context = ray.get_runtime_context()
    time.sleep(0.2)
    return attribution.__file__, os.getcwd(), context.get_assigned_resources().get("GPU", 0)


@pytest.mark.slow
def test_workers_import_what_the_driver_sent_wherever_they_were_started(on_ray) -> None:
    for file, folder, gpus in mapped(whereabouts, [(i,) for i in range(4)], on_ray()):
        assert "working_dir_files" in file and file.startswith(folder) and not gpus


@pytest.mark.slow
def test_a_task_reserves_the_fraction_of_a_gpu_that_it_is_given(on_ray) -> None:
    config = dataclasses.replace(on_ray(gpus_per_task=0.25), device="cuda")
    assert mapped(whereabouts, [(0,)], config)[0][2] == 0.25


def place_of(data: Any, folder: str, _: int) -> tuple[str, int, int, bool]:
    """Node of this task, and where in which shared file its pixels are (Linux)."""
    node = ray.get_runtime_context().get_node_id()
    Path(folder, node).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # until a task runs on the other node
    array = data.pixels()
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            where = int(offset, 16) + address - start
            return node, int(inode), where, array.flags.writeable
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory maps")
@pytest.mark.slow
def test_the_pixels_are_placed_once_a_node_and_shared_by_its_tasks(on_ray, tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", n_train=300, size=32)  # small objects are not stored
    (tmp_path / "nodes").mkdir()
    tasks = [(str(tmp_path / "nodes"), i) for i in range(20)]
    places = mapped(place_of, tasks, on_ray(), shared=(data,))
    assert len({node for node, *_ in places}) == len({place[:3] for place in places}) == 2
    assert all(inode for _, inode, *_ in places) and not any(place[3] for place in places)


# -- what goes wrong -------------------------------------------------------------------------------


def refuse(value: int) -> int:
    if value == 2:
        raise InputError(f"value={value}: not wanted")
    return value


@pytest.mark.slow
def test_an_error_of_a_task_is_raised_as_itself_and_the_next_map_works(on_ray) -> None:
    with pytest.raises(InputError) as caught:
        mapped(refuse, [(i,) for i in range(4)], on_ray())
    assert type(caught.value) is InputError and str(caught.value) == "value=2: not wanted"
    assert mapped(refuse, [(0,), (1,)], on_ray()) == [0, 1]


def recorded(folder: Path, i: int) -> int:
    run = folder / f"{i} {os.getpid()} {time.time_ns()}"
    run.touch()
    time.sleep(0.5)
    run.write_text("finished")
    return i * i


@pytest.mark.slow
def test_a_killed_node_costs_only_what_it_had_not_finished(cluster, on_ray, tmp_path: Path) -> None:
    lost = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    finished, at_kill = {}, None
    tasks = [(i,) for i in range(24)]
    function = lambda i, folder=str(tmp_path): recorded(Path(folder), i)  # noqa: E731
    for index, result in parallel_map(function, tasks, 2, config=on_ray()):
        finished[index] = result
        if at_kill is None and len(finished) >= 9 and len(list(tmp_path.iterdir())) >= 11:
            at_kill = set(finished)
            cluster.remove_node(lost, allow_graceful=False)
    assert finished == {i: i * i for i in range(24)}
    runs = Counter(int(path.name.split()[0]) for path in tmp_path.iterdir())
    again = {i for i, count in runs.items() if count > 1}
    assert set(runs.values()) <= {1, 2} and not again & at_kill
    # What the node's only core was doing, and what it had done and not handed over.
    cut_off = {int(p.name.split()[0]) for p in tmp_path.iterdir() if not p.read_text()}
    assert cut_off <= again and len(again) <= 2


def dies(folder: str, task: str, times: int, size: int) -> str:
    """A task whose worker is killed in its first attempts; each attempt leaves a file."""
    attempts = len(list(Path(folder).glob(f"{task} *")))
    Path(folder, f"{task} {attempts} {size}").touch()
    if attempts < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def quarter(task: tuple) -> tuple:
    return *task[:-1], task[-1] // 4


@pytest.mark.slow
def test_a_task_whose_worker_is_killed_is_tried_again_with_a_smaller_batch_and_then_named(
    on_ray, tmp_path: Path, capfd
) -> None:
    tasks = [(str(tmp_path), name, times, 64) for name, times in (("a", 0), ("b", 1), ("c", 99))]
    names, found = ["A", "B", "retraining C"], []
    with pytest.raises(InputError, match=r"jobs=1: retraining C: .* memory .* 3 times"):
        for _, result in parallel_map(
            dies, tasks, 1, config=on_ray(jobs=1), names=names, smaller=quarter
        ):
            found.append(result)
    assert found == ["a", "b"]
    attempts = ["a 0 64", "b 0 64", "b 1 64", "c 0 64", "c 1 64", "c 2 16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == attempts
    shown = [line for line in capfd.readouterr().err.splitlines() if "trying again" in line]
    assert [line[0] for line in shown] == ["B", "r", "r"]
    assert [line.endswith("with a smaller batch") for line in shown] == [False, False, True]


def idle(folder: str, seconds: float) -> float:
    Path(folder, str(time.time_ns())).touch()
    time.sleep(seconds)
    return seconds


@pytest.mark.slow
def test_closing_the_map_ends_what_still_runs(on_ray, tmp_path: Path) -> None:
    tasks = [(str(tmp_path), seconds) for seconds in (0, 600, 600, 600)]
    results = parallel_map(idle, tasks, 2, config=on_ray(jobs=3))
    assert next(results) == (0, 0)
    results.close()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "a task still holds its core"
        time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) <= 3  # the last one was never begun


def four_mebibytes(i: int) -> np.ndarray:
    return np.full(1 << 19, i, dtype=np.float64)


def memory_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
def test_the_driver_s_memory_stays_flat_as_tasks_grow(on_ray) -> None:
    peaks = []
    for n in (12, 12, 62):  # the first one warms up
        peak, tasks = 0.0, [(i,) for i in range(n)]
        for index, array in parallel_map(four_mebibytes, tasks, 2, config=on_ray()):
            assert array[0] == index
            peak = max(peak, memory_mib())
        peaks.append(peak)
    assert peaks[2] - peaks[1] < 50  # 200 MB more came through


# -- a cluster that is not there -------------------------------------------------------------------


@pytest.mark.slow
def test_more_gpus_than_any_node_has_are_refused(on_ray) -> None:
    config = dataclasses.replace(on_ray(gpus_per_task=2), device="cuda")
    with pytest.raises(InputError, match="gpus_per_task=2: no machine"):
        mapped(whereabouts, [(0,)], config)


@pytest.mark.slow
def test_a_gpu_by_number_is_refused(on_ray) -> None:
    with pytest.raises(InputError, match="device=cuda:1: .* use device=cuda"):
        mapped(whereabouts, [(0,)], dataclasses.replace(on_ray(), device="cuda:1"))


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that takes a connection and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no.such.host.invalid:6379", "x", "1.2.3.4:a"])
def test_an_address_where_nothing_is_is_refused_at_once(address: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=f"ray_address={address}: no Ray cluster answers"):
        ray_pool._check_answer(address)
    assert time.monotonic() - start < 12


def test_an_address_that_says_nothing_is_refused_in_time(silent: str, monkeypatch) -> None:
    assert ray_pool.ANSWER_SECONDS <= 25
    monkeypatch.setattr(ray_pool, "ANSWER_SECONDS", 4)
    with pytest.raises(InputError, match="no answer in 4 s"):
        ray_pool._check_answer(silent)


@pytest.mark.slow
def test_ray_leaves_sigterm_to_the_command(cluster) -> None:
    def handler(*_: object) -> None: ...

    ray.shutdown()
    before = signal.signal(signal.SIGTERM, handler)
    try:
        ray_pool.connect(cluster.address)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_s_client_is_refused() -> None:
    with pytest.raises(InputError, match="ray_address=ray://head:1: .* host:port"):
        ray_pool._check_answer("ray://head:1")


def test_ray_that_is_not_installed_is_told_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[ray\]'"):
        mapped(refuse, [(0,)], toy_config(backend="ray"))
