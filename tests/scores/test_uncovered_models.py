"""Models on their way to features: from a saved folder to files, or refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import ARCHITECTURES, tiny
from toy import toy_config, toy_data

from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.gradients.sketch import Sketch
from attribution.models import classifier, model_facts
from attribution.scores.features import featurize
from attribution.scores.trak import check_gradients
from attribution.scores.traker_adapters import MarginOutput, SketchComputer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "ConvNext", "MobileNetV2"])
def test_a_saved_model_goes_all_the_way_to_features(name: str, tmp_path: Path) -> None:
    side = ARCHITECTURES[name][1]
    tiny(name).float().save_pretrained(tmp_path / name)
    data = toy_data(tmp_path / "data", n_train=8, n_other=4, size=side)
    config = toy_config(model=str(tmp_path / name), image_size=side, proj_dim=16, num_blocks=2)
    check_gradients(config, data.class_names)
    model = classifier.build(config.model, data.class_names, seed=0)
    classifier.save(model, tmp_path / "checkpoint", side, *model_facts.normalisation(config.model))
    store = featurize(config, data, [tmp_path / "checkpoint"], tmp_path / "work")[0]
    for split, rows in (("train", 8), (TARGETS, 4)):
        features = np.concatenate(store.features(split))
        assert features.shape == (rows, 32) and np.isfinite(features).all()
        assert (np.abs(features.reshape(rows, 2, 16)).sum(2) > 0).all()


def test_a_fixed_input_size_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    tiny("ViT").save_pretrained(tmp_path / "ViT")
    data = toy_data(tmp_path / "data", n_train=8, n_other=4, size=24)
    with pytest.raises(InputError, match="image_size=24.*config's is 16"):
        check_gradients(toy_config(model=str(tmp_path / "ViT"), image_size=24), data.class_names)


class Mixing(torch.nn.Module):
    """Adds to every sample its neighbour in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * 16 * 16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((images + images.roll(1, 0)).flatten(1))


def test_a_model_whose_samples_mix_is_refused_in_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classifier, "build", lambda *_, **__: Mixing())
    monkeypatch.setattr(classifier, "check_image_size", lambda *_: None)
    with pytest.raises(InputError, match="^model=resnet-mini: head.weight: .*samples mix"):
        check_gradients(toy_config(), ("dark", "bright"))


def test_a_batch_without_gradients_is_refused_as_input() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).train()
    images, labels = torch.randn(2, 3, 2, 2), torch.tensor([0, 1])
    computer = SketchComputer(model, MarginOutput(), Sketch(8))
    with pytest.raises(InputError, match="^model: .*is in train mode"):
        computer.compute_per_sample_grad((images, labels))
