"""The methods that evaluate compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy import toy_config, toy_data

from attribution.errors import InputError
from attribution.experiments import methods
from attribution.experiments.methods import Subject, check_methods
from attribution.gradients.per_sample import capture
from attribution.models import classifier
from attribution.models.batches import batches_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ekfac_without_its_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[benchmark\]'"):
        check_methods(["ekfac"])


@pytest.mark.slow
def test_gradient_products_are_those_of_explicit_gradients(tmp_path: Path) -> None:
    """With long features, whose sketch is nearly the gradient itself."""
    data = toy_data(tmp_path / "data", n_train=12, n_other=5)
    config = toy_config(proj_dim=1 << 15, num_blocks=1, epochs=1)
    folder = tmp_path / "model"
    classifier.save(
        classifier.build("resnet-mini", data.class_names, 0), folder, 16, (0.5,) * 3, (0.5,) * 3
    )

    class Stub:
        values = np.zeros((12, 5), np.float32)

    work = tmp_path / "work"
    work.mkdir()
    subject = Subject(config, data, [folder], Stub, work)
    model = classifier.load(folder)

    def gradients(split: str) -> np.ndarray:
        ((images, labels),) = batches_of(config, data, split, 64, torch.device("cpu"))
        found = capture(model, images, labels).per_sample().values()
        return torch.cat([g.flatten(1) for g in found], 1).double().numpy()

    train, targets = gradients("train"), gradients("validation")
    exact = train @ targets.T
    dot = methods.gradient_dot(subject).values
    assert np.corrcoef(dot.ravel(), exact.ravel())[0, 1] > 0.99
    lengths = np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(targets, axis=1)
    cosine = methods.gradient_cosine(subject).values
    assert np.abs(cosine - exact / lengths).max() < 0.1

    found: list[torch.Tensor] = []
    for split in ("train", "validation"):
        ((images, _),) = batches_of(config, data, split, 64, torch.device("cpu"))
        with torch.no_grad():
            found.append(model.resnet(images).pooler_output.flatten(1))
    similarity = torch.nn.functional.cosine_similarity(found[0][:, None], found[1][None], dim=2)
    same = data.labels("train")[:, None] == data.labels("validation")
    expected = np.where(same, 1, -1) * similarity.numpy()
    np.testing.assert_allclose(methods.penultimate(subject).values, expected, atol=1e-5)
