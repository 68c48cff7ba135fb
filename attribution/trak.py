"""TRAK scores of an ensemble: traker featurises each checkpoint, and its stores become one matrix."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attribution.config import Config
from attribution.data import ImageData
from attribution.errors import InputError
from attribution.matrices import open_matrix, read_rows, row_blocks, row_slices, write_matrix
from attribution.parallel import parallel_map, resolve_jobs
from attribution.progress import progress
from attribution.training import batches_of, derive_seed, resolve_device

if TYPE_CHECKING:
    import torch

    from attribution.traker_plugins import RidgeScoreComputer

TARGETS = "validation"


@dataclass(frozen=True)
class TrakScores:
    """Scores of an ensemble.

    Attributes:
        file: .npy of the scores, (n_train, n_targets) float32; positive = helpful.
        self_influence: (n_train,) float32, each example's unweighted score on its own margin:
            phi_i' (Phi'Phi + lambda I)^-1 phi_i, the mean over checkpoints.
    """

    file: Path
    self_influence: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Memory map of the file."""
        return open_matrix(self.file)


@dataclass(frozen=True)
class Store:
    """The files of one checkpoint, in a folder of its own.

    Attributes:
        folder: where they are.
        model_id: traker's number of the checkpoint.
    """

    folder: Path
    model_id: int

    def traker_folder(self, split: str) -> Path:
        return self.folder / split

    def features_file(self, split: str) -> Path:
        """Projected gradients (n_split, k) float32, as traker's saver writes them."""
        return self.traker_folder(split) / str(self.model_id) / "grads.mmap"

    def one_minus_p_file(self, split: str) -> Path:
        """1 - p of every example's label, (n_split, 1) float32, as traker's saver writes it."""
        return self.traker_folder(split) / str(self.model_id) / "out_to_loss.mmap"

    def features(self, split: str) -> np.ndarray:
        """Memory map of features_file."""
        return open_matrix(self.features_file(split))

    @property
    def factor(self) -> Path:
        """File of the Cholesky factor L of Phi'Phi + lambda I, (k, k)."""
        return self.folder / "factor.npy"

    @property
    def targets(self) -> Path:
        """File of the targets' features times L^-T, (n_targets, k); written after `factor`."""
        return self.folder / "targets.npy"


def check_proj_dim(config: Config, n: int) -> None:
    """Refuse features that are longer than there are n training examples, where nothing is added.

    Raises:
        InputError: the Gram matrix could not be but singular.
    """
    if config.lambda_reg == 0 and config.proj_dim > n:
        raise InputError(
            f"proj_dim={config.proj_dim}: larger than the {n} training examples with lambda_reg=0; "
            f"use lambda_reg above 0, e.g. 0.1, or a proj_dim of at most {n}"
        )


def compute_scores(
    config: Config, data: ImageData, checkpoints: list[Path], work: Path
) -> TrakScores:
    """Score every training example against every validation example.

    tau = (1/M sum_m Phi_m (Phi_m'Phi_m + lambda_m I)^-1 phi_m(target)) * (1/M sum_m (1 - p_m,i)),
    row i scaled by the second factor where loss_gradient_weight is 'mean' (Park et al. 2023,
    "TRAK: Attributing Model Behavior at Scale", equation 17, with a ridge in place of none and
    without the soft threshold).

    Args:
        checkpoints: from_pretrained folders of the ensemble.
        work: where features and scores are kept while unfinished; a second call goes on from
            there. The scores are a file in it.

    Raises:
        InputError: a singular or non-finite Gram matrix, or a layer without a gradient rule.
    """
    device = resolve_device(config.device)
    stores = [Store(work / "features" / f"{m:03d}", m) for m in range(len(checkpoints))]
    tasks = [(config, data, *pair) for pair in zip(checkpoints, stores, strict=True)]
    jobs = resolve_jobs(config.jobs, device.type, len(tasks))
    with progress("trak: checkpoints featurised", len(tasks)) as advance:
        for _ in parallel_map(_featurize, tasks, jobs):
            advance()
    return combine(
        stores, work / "scores.npy", config.lambda_reg, config.loss_gradient_weight, device
    )


def feature_batch_size(image_size: int) -> int:
    """Images a batch: large enough to be fast, small enough that activations fit in memory."""
    return 64 if image_size <= 96 else 16


def _featurize(config: Config, data: ImageData, checkpoint: Path, store: Store) -> None:
    """Features of the training set and of the targets under one checkpoint."""
    done = store.folder / "done"
    if done.exists():
        return
    for split in ("train", TARGETS):
        _featurize_split(config, data, checkpoint, store, split)
    done.touch()


def _featurize_split(
    config: Config, data: ImageData, checkpoint: Path, store: Store, split: str
) -> None:
    """Run traker over a split; batches that are in its store already are not computed again."""
    device, m = str(resolve_device(config.device)), store.model_id
    folder = store.traker_folder(split)
    traker, state = make_traker(config, len(data.rows(split)), checkpoint, folder, m, device)
    traker.load_checkpoint(state, model_id=m)
    for batch in batches_of(config, data, split, feature_batch_size(config.image_size), device):
        traker.featurize(batch, num_samples=len(batch[1]))


def make_traker(config: Config, n: int, checkpoint: Path, store: Path, m: int, device: str):  # noqa: ANN201
    """traker's engine with our gradients and projection (or its own, projector=normal).

    Returns the TRAKer and the checkpoint's state dictionary.
    """
    import torch
    from trak import TRAKer
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.projectors import BasicProjector, ProjectionType

    from attribution import models, traker_plugins

    logging.getLogger("TRAK").setLevel(logging.ERROR)
    model = models.load(checkpoint).to(device, memory_format=torch.channels_last)
    seed = derive_seed(config.seed, "projection")
    if config.projector == "sketch":
        gradients = traker_plugins.HookGradientComputer
        projector = traker_plugins.SketchProjector(config.proj_dim, seed, device)
    else:
        gradients = FunctionalGradientComputer
        projector = BasicProjector(
            grad_dim=sum(p.numel() for p in model.parameters()),
            proj_dim=config.proj_dim,
            seed=seed,
            proj_type=ProjectionType.normal,
            device=torch.device(device),
            dtype=torch.float32,
        )
    traker = TRAKer(
        model=model,
        task=traker_plugins.MarginOutput(),
        train_set_size=n,
        save_dir=str(store),
        device=device,
        gradient_computer=gradients,
        projector=projector,
        proj_dim=config.proj_dim,
        logging_level=logging.ERROR,
        use_half_precision=False,  # its float16 default overflows and rounds
    )
    return traker, model.state_dict()


def combine(
    stores: list[Store], file: Path, lambda_reg: float, weight: str, device: torch.device
) -> TrakScores:
    """Scores of featurised checkpoints, written to a file block by block.

    In memory are some (k, k) matrices, one checkpoint's (n_targets, k), blocks of rows and vectors,
    whatever the number of training examples and of checkpoints. What a killed run had finished is
    not computed again: each checkpoint's factor and targets, and the file.

    Args:
        file: becomes the score matrix, .npy.
        lambda_reg, weight: parameters `lambda_reg` and `loss_gradient_weight`.

    Raises:
        InputError: a singular Gram matrix, or a value that is not finite.
    """
    import torch

    from attribution.traker_plugins import RidgeScoreComputer

    computer = RidgeScoreComputer(torch.float32, device, lambda_reg=lambda_reg)
    with progress("trak: checkpoints factorised", len(stores)) as advance:
        for store in stores:
            if not store.targets.exists():
                _factorise(store, computer)
            advance()
    done = file.with_name("self_influence.npy")
    if not (file.exists() and done.exists()):
        n, n_targets = (len(stores[0].features(split)) for split in ("train", TARGETS))
        self_influence = np.zeros((n, 1))
        blocks = _score_blocks(stores, computer, weight, self_influence)
        write_matrix(file, blocks, (n, n_targets))
        write_matrix(done, [self_influence], (n, 1))
    return TrakScores(file, np.array(open_matrix(done)[:, 0]))


def _factorise(store: Store, computer: RidgeScoreComputer) -> None:
    """Write the Cholesky factor of A = Phi'Phi + lambda I = L L', and the whitened targets."""
    import torch

    gram = computer.gram(map(torch.from_numpy, row_blocks(store.features("train"))))
    factor = computer.factor(gram)
    write_matrix(store.factor, [factor.cpu().numpy()], tuple(factor.shape))
    targets = store.features(TARGETS)
    blocks = (
        computer.whiten(torch.from_numpy(block), factor).cpu().numpy()
        for block in row_blocks(targets)
    )
    write_matrix(store.targets, blocks, targets.shape)


def _score_blocks(
    stores: list[Store], computer: RidgeScoreComputer, weight: str, self_influence: np.ndarray
) -> Iterator[np.ndarray]:
    """Rows of the score matrix in order; a block is overwritten when the next is asked for.

    x' A^-1 y is the product of x' L^-T and y' L^-T, and self-influence the former's square.

    Args:
        self_influence: zeros (n_train, 1), filled in on the way.
    """
    import torch

    device = computer.device

    @lru_cache(maxsize=2)  # of one checkpoint: all checkpoints' might not fit in memory
    def load(file: Path) -> torch.Tensor:
        return torch.from_numpy(np.load(file, allow_pickle=False)).to(device)

    features = [store.features("train") for store in stores]
    scale = np.full((len(features[0]), 1), 1 / len(stores), np.float32)
    if weight == "mean":
        scale *= np.mean([open_matrix(store.one_minus_p_file("train")) for store in stores], axis=0)
    n_targets, k = stores[0].features(TARGETS).shape
    slices = list(row_slices(len(scale), max(n_targets, k)))
    buffer = torch.empty(slices[0].stop, n_targets, device=device)
    for rows in slices:
        scores = buffer[: rows.stop - rows.start].zero_()
        for store, phi in zip(stores, features, strict=True):
            block = torch.from_numpy(read_rows(phi, rows))
            whitened = computer.whiten(block, load(store.factor))
            computer.get_scores(whitened, load(store.targets), accumulator=scores)
            norms = torch.linalg.vector_norm(whitened, dim=1, keepdim=True)
            self_influence[rows] += norms.square().cpu().numpy() / len(stores)
        scores *= torch.from_numpy(scale[rows]).to(device)
        yield scores.cpu().numpy()
