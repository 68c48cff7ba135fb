"""EK-FAC influence functions by kronfluence, an optional package (extra `benchmark`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.gradients.per_sample import margins
from attribution.models import classifier
from attribution.models.batches import batches_of

BATCH = 64  # training images
QUERY_BATCH = 128  # targets; kronfluence keeps a gradient of each target of a batch


def ekfac_scores(
    config: Config, data: ImageData, checkpoints: Sequence[Path], work: Path
) -> np.ndarray:
    """Influence on each target's margin, (n_train, n_targets), the mean over checkpoints.

    Positive = helpful.

    Args:
        checkpoints: from_pretrained folders.
        work: folder for factors and scores.
    """
    train, targets = (decoded(config, data, split) for split in ("train", TARGETS))
    total = np.zeros((len(train), len(targets)), np.float32)
    for i, folder in enumerate(checkpoints):
        analysis = Analysis(classifier.load(folder), train, targets, BATCH, work / str(i))
        analysis.fit()
        total += analysis.pairwise()
    return total / len(checkpoints)


def decoded(config: Config, data: ImageData, split: str) -> TensorDataset:
    """Images (n, 3, H, W) and labels (n,) of a split, on the CPU."""
    images, labels = zip(*batches_of(config, data, split, 4096, torch.device("cpu")))
    return TensorDataset(torch.cat(images), torch.cat(labels))


class Analysis:
    """EK-FAC of one checkpoint: `fit`, then `pairwise` or `self_influence`.

    Args:
        model: a transformers classifier.
        batch: training images per batch.
        work: folder for factors and scores.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TensorDataset,
        targets: TensorDataset,
        batch: int,
        work: Path,
    ) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments

        task = _task()
        self.analyzer = Analyzer(
            analysis_name="ekfac",
            model=prepare_model(model.eval(), task),
            task=task,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(work),
        )
        self.targets = targets
        named = {"factors_name": "ekfac", "overwrite_output_dir": True}
        self.factors = named | {"factor_args": FactorArguments(strategy="ekfac")}
        self.sized = {"dataset": train, "per_device_batch_size": batch}
        self.scored = named | {
            "train_dataset": train,
            "per_device_train_batch_size": batch,
            "score_args": ScoreArguments(damping_factor=None),
        }

    def fit(self) -> float:
        """Fit the factors; returns the seconds of the step that does not depend on the examples."""
        self.analyzer.fit_covariance_matrices(**self.factors, **self.sized)
        start = time.perf_counter()
        self.analyzer.perform_eigendecomposition(**self.factors)
        fixed = time.perf_counter() - start
        self.analyzer.fit_lambda_matrices(**self.factors, **self.sized)
        return fixed

    def pairwise(self) -> np.ndarray:
        """Scores (n_train, n_targets), positive = helpful."""
        self.analyzer.compute_pairwise_scores(
            scores_name="pairwise",
            query_dataset=self.targets,
            per_device_query_batch_size=min(QUERY_BATCH, len(self.targets)),
            **self.scored,
        )
        return self.analyzer.load_pairwise_scores("pairwise")["all_modules"].numpy().T

    def self_influence(self) -> np.ndarray:
        """Influence of each training example on its own loss, (n_train,)."""
        self.analyzer.compute_self_scores(scores_name="self", **self.scored)
        return self.analyzer.load_self_scores("self")["all_modules"].numpy()


def _task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):
        """Cross-entropy in training; minus the margin is what is measured on a target."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            images, labels = batch
            logits = model(images).logits
            if sample:  # labels that the model itself would draw: the true Fisher matrix
                labels = logits.detach().softmax(1).multinomial(1).flatten()
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            images, labels = batch
            return -margins(model(images).logits, labels).sum()

    return Classification()
