"""A model folder that the tests of this room may spoil."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import CLASSES, MEAN, STD

from attribution.models import classifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved two-class model whose running statistics are not those of a fresh one."""
    model = classifier.build("resnet-mini", CLASSES, seed=7).train()
    model(torch.randn(8, 3, 32, 32))
    classifier.save(model, tmp_path / "model", 32, MEAN, STD)
    return tmp_path / "model"
