"""Features on disk: shards, their files, batches that do not fit, and blocks of layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_trak import store_features
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.models import classifier, model_facts
from attribution.scores import features as module
from attribution.scores.features import Shard, Store

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


def test_a_shard_begun_with_another_batch_size_is_made_anew(tmp_path: Path) -> None:
    data, config = toy_data(tmp_path / "data", n_train=20, n_other=6), toy_config(proj_dim=16)
    model = saved_model(tmp_path / "model", data)
    whole, begun = (Store(tmp_path / name, 0) for name in ("whole", "begun"))
    for store, size, rows in ((whole, 8, range(20)), (begun, 3, range(6)), (begun, 8, range(20))):
        folder = store.shard("train", 0)
        module._featurize(config, data, Shard(model, 0, "train", rows, size), folder)
    np.testing.assert_array_equal(*(s.features("train")[0] for s in (whole, begun)))
    np.testing.assert_array_equal(whole.one_minus_p("train"), begun.one_minus_p("train"))


def test_batches_that_do_not_fit_into_a_gpu_s_memory_are_quartered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def run(config, checkpoint, model_id, batches, n, folder) -> None:
        size = len(next(iter(batches))[1])
        sizes.append(size)
        if size > most:
            raise torch.OutOfMemoryError
        (folder / "0").mkdir(parents=True)

    monkeypatch.setattr(module, "run_traker", run)
    data, config = toy_data(tmp_path / "data", n_train=40), toy_config()
    shard = Shard(tmp_path, 0, "train", range(40), 32)
    for most, expected in ((3, [32, 8, 2]), (32, [32])):
        sizes.clear()
        folder = tmp_path / str(most)
        module._featurize(config, data, shard, folder)
        assert sizes == expected and (folder / "done").exists()
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        module._featurize(config, data, shard, tmp_path / "none")
    assert not (tmp_path / "none" / "done").exists()


@pytest.mark.parametrize("asked", [1, 3, 99])
def test_features_hold_a_sketch_for_each_block_of_layers(tmp_path: Path, asked: int) -> None:
    data = toy_data(tmp_path / "data", n_train=12, n_other=6)
    folder = saved_model(tmp_path / "model", data)
    matrices = sum(p.dim() > 1 for p in classifier.load(folder).parameters())
    features, store = [], Store(tmp_path / "s", 0)
    for num_blocks in (1, asked):
        config = toy_config(proj_dim=16, num_blocks=num_blocks)
        shard = Shard(folder, 0, "train", range(12), 12)
        module._featurize(config, data, shard, store.shard("train", 0))
        features.append(np.array(store.features("train")[0]))
    one, several = features
    blocks = min(asked, matrices)
    assert one.shape == (12, 16) and several.shape == (12, blocks * 16)
    # traker divides by the square root of the number of parameters, in both alike.
    np.testing.assert_allclose(
        several.reshape(12, blocks, 16).sum(1), one, rtol=1e-4, atol=1e-5 * np.abs(one).max()
    )
