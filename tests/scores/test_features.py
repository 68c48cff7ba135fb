"""Features on disk: shards, their files, batches that do not fit, and blocks of layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trak import store_features
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.gradients.sketch import Sketch
from attribution.models import classifier, model_facts
from attribution.runtime.hashing import derive_seed
from attribution.runtime.npy_blocks import open_matrix
from attribution.scores import features as module
from attribution.scores.features import Shard

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_model(folder: Path, data: ImageData) -> Path:
    """An untrained model as a checkpoint."""
    model = classifier.build("resnet-mini", data.class_names, 0)
    classifier.save(model, folder, 16, *model_facts.normalisation("resnet-mini"))
    return folder


def test_what_a_killed_driver_left_beside_the_shards_is_no_shard(tmp_path: Path) -> None:
    store = store_features(tmp_path, 0, 20, 9, 8, shard=8)
    (store.folder / "train" / "tmpab_1" / "0").mkdir(parents=True)
    assert [len(part) for part in store.features("train")] == [8, 8, 4]
    assert store.count("train") == 20


def test_batches_that_do_not_fit_into_a_gpu_s_memory_are_quartered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def run(config, model, model_id, batches, n, folder, logits_of) -> None:
        size = len(next(iter(batches))[1])
        sizes.append(size)
        if size > most:
            raise torch.OutOfMemoryError
        (folder / "0").mkdir()
        (folder / "0" / "grads.mmap").write_bytes(b"features")

    monkeypatch.setattr(module, "run_traker", run)
    data, config = toy_data(tmp_path / "data", n_train=40), toy_config()
    checkpoint = saved_model(tmp_path / "model", data)
    shard = Shard(0, "train", range(40), 32)
    for fits, expected in ((3, [32, 8, 2]), (32, [32])):
        most = fits
        sizes.clear()
        files = module._featurize(config, data, shard, checkpoint)
        assert sizes == expected and list(files) == ["0/grads.mmap"]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        module._featurize(config, data, shard, checkpoint)


@pytest.mark.parametrize(("after", "left"), [(1, 6), (3, 5), (5, 3), (6, 3)])
def test_interrupted_features_go_on_and_end_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, left: int
) -> None:
    """Stopped after so many batches of 10: 3 of train, 1 of validation, 1 of test, for 2 checkpoints."""
    data = toy_data(tmp_path / "data", n_train=24, n_other=9)
    given = toy_config(proj_dim=16), data, [saved_model(tmp_path / "model", data)] * 2
    monkeypatch.setattr(module, "feature_batch_size", lambda *_: 10)

    def features(work: Path) -> list[bytes]:
        stores = module.featurize(*given, work)
        files = [file for store in stores for file in sorted(store.folder.rglob("*.mmap"))]
        return [file.read_bytes() for file in files]

    whole = features(tmp_path / "whole")
    batches_of, featurize, seen, made = module.batches_of, module._featurize, [], []

    def batches(*given):
        for batch in batches_of(*given):
            if len(seen) == after:
                raise KeyboardInterrupt
            seen.append(batch)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "batches_of", batches)
        features(tmp_path / "work")
    monkeypatch.setattr(
        module, "_featurize", lambda *given: made.append(given[2]) or featurize(*given)
    )
    assert features(tmp_path / "work") == whole and len(made) == left


@pytest.mark.parametrize("asked", [1, 3, 99])
def test_features_hold_a_sketch_for_each_block_of_layers(tmp_path: Path, asked: int) -> None:
    data = toy_data(tmp_path / "data", n_train=12, n_other=6)
    folder = saved_model(tmp_path / "model", data)
    matrices = sum(p.dim() > 1 for p in classifier.load(folder).parameters())
    features = []
    for num_blocks in (1, asked):
        config = toy_config(proj_dim=16, num_blocks=num_blocks)
        store, _ = module.featurize(config, data, [folder, folder], tmp_path / str(num_blocks))
        features.append(np.array(store.features("train")[0]))
    one, several = features
    blocks = min(asked, matrices)
    assert one.shape == (12, 16) and several.shape == (12, blocks * 16)
    # traker divides by the square root of the number of parameters, in both alike.
    np.testing.assert_allclose(
        several.reshape(12, blocks, 16).sum(1), one, rtol=1e-4, atol=1e-5 * np.abs(one).max()
    )


def test_each_checkpoint_has_a_sketch_of_its_own(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", n_train=12, n_other=6)
    folder, config = saved_model(tmp_path / "model", data), toy_config(proj_dim=16, num_blocks=3)
    stores = module.featurize(config, data, [folder, folder], tmp_path / "work")
    model = classifier.load(folder).eval()
    size = sum(p.numel() for p in model.parameters())
    (batch,) = module.batches_of(config, data, "train", 12, torch.device("cpu"))
    for m, store in enumerate(stores):
        sketch = Sketch(16, f"{derive_seed(config.seed, 'projection')}/{m}", num_blocks=3)
        expected = sketch.features(model, *batch)[0].numpy() / np.sqrt(size)  # as traker does
        np.testing.assert_allclose(store.features("train")[0], expected, rtol=1e-4, atol=1e-7)
    one, other = (store.features("train")[0] for store in stores)
    assert not np.allclose(one, other)


@pytest.mark.parametrize("projector", ["sketch", "normal"])
def test_features_are_of_the_layers_that_are_trained(tmp_path: Path, projector: str) -> None:
    data = toy_data(tmp_path / "data")
    folder = saved_model(tmp_path / "model", data)
    config = toy_config(model=str(folder), projector=projector, num_blocks=10, proj_dim=24)
    shapes = {}
    for layers in ("head", "last", "all"):
        changed = dataclasses.replace(config, train_layers=layers)
        batch = next(module.batches_of(changed, data, "train", 8, torch.device("cpu")))
        model = module.load_checkpoint(changed, folder)
        module.run_traker(changed, model, 0, [batch], 8, tmp_path / layers)
        found = open_matrix(tmp_path / layers / "0" / "grads.mmap")
        assert found.any(axis=1).all()
        shapes[layers] = found.shape[1] // 24
    # One block for each matrix: the head is one, the last of three stages has three.
    assert shapes == (
        {"head": 1, "last": 4, "all": 10} if projector == "sketch" else dict.fromkeys(shapes, 1)
    )


def test_features_of_a_head_are_the_same_where_frozen_layers_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = toy_data(tmp_path / "data", n_train=40)
    folder = saved_model(tmp_path / "model", data)
    config = toy_config(model=str(folder), train_layers="head", proj_dim=24)
    shard, found = Shard(0, "train", range(10, 40), 8), []
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(module.frozen, "stored_logits", lambda *_: None)
        files = module._featurize(config, data, shard, folder)
        for name, content in files.items():
            (tmp_path / str(skips) / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(skips) / name).write_bytes(content)
        names = ("grads.mmap", "out_to_loss.mmap")
        found.append([open_matrix(tmp_path / str(skips) / "0" / name) for name in names])
    assert found[0][0].shape == (30, 24) and found[0][0].any(axis=1).all()
    for skipped, whole in zip(*found, strict=True):
        np.testing.assert_allclose(skipped, whole, rtol=1e-4, atol=1e-5)


def test_no_frozen_layer_runs_again_for_another_checkpoint(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", n_train=40)
    folder = saved_model(tmp_path / "model", data)
    config = toy_config(model=str(folder), train_layers="head", proj_dim=24)
    ran: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda layer, x: ran.append(len(x[0])) if type(layer).__name__ == "ResNetModel" else None
    )
    with hook:
        for model_id in range(2):
            module._featurize(config, data, Shard(model_id, "train", range(40), 8), folder)
    assert sum(n for n in ran if n > 2) == 40
