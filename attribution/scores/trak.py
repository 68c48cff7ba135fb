"""TRAK scores of an ensemble: one matrix made of every checkpoint's features, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.gradients import GradientError, per_sample
from attribution.models import classifier
from attribution.runtime.device import keep_freed_memory, resolve_device
from attribution.runtime.npy_blocks import ahead, open_matrix, row_blocks, write_matrix
from attribution.runtime.progress import progress
from attribution.scores.features import Store, featurize
from attribution.scores.traker_adapters import RidgeScoreComputer

# Of all checkpoints' factors and targets; where they are larger they are read for every block.
SOLVED_BYTES = 5 << 29


@dataclass(frozen=True)
class TrakScores:
    """Scores of an ensemble.

    Attributes:
        file: .npy of the scores, (n_train, n_targets) float32; positive = helpful.
        self_influence: (n_train,) float32, each example's unweighted score on its own margin:
            phi_i' (Phi'Phi + lambda I)^-1 phi_i, the mean over checkpoints.
        held_out: (n_train,) float32, each example's unweighted scores on the margins of held-out
            training examples, summed by the weights that combine() was given; None without them.
        row_weight: (n_train,) float32, what row i of the scores is multiplied by.
    """

    file: Path
    self_influence: np.ndarray
    held_out: np.ndarray | None
    row_weight: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Memory map of the file."""
        return open_matrix(self.file)


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


def check_gradients(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuse a model without exact per-sample gradients, before checkpoints are trained.

    Raises:
        InputError: a layer without a gradient rule, or images too small for the model.
    """
    model = classifier.build(config.model, class_names, seed=0).eval()
    classifier.check_image_size(model, config.image_size)
    if config.projector == "sketch":
        size = (2, 3, config.image_size, config.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        try:
            per_sample.check(model, images)
        except GradientError as error:
            raise InputError(f"model={config.model}: {error}") from error


def compute_scores(
    config: Config, data: ImageData, checkpoints: Sequence[Path], work: Path
) -> TrakScores:
    """Score every training example against every validation example.

    tau = (1/M sum_m Phi_m (Phi_m'Phi_m + lambda_m I)^-1 phi_m(target)) * (1/M sum_m (1 - p_m,i)),
    row i scaled by the second factor where loss_gradient_weight is 'mean' (Park et al. 2023,
    "TRAK: Attributing Model Behavior at Scale", equation 17, with a ridge in place of none and
    without the soft threshold). With num_blocks above 1 Phi'Phi keeps its blocks of layers along
    the diagonal alone, each with its own k and lambda: the sum of one such tau a block.

    Args:
        checkpoints: from_pretrained folders of the ensemble.
        work: where features and scores are kept while unfinished; a second call goes on from
            there. The scores are a file in it.

    Raises:
        InputError: a singular or non-finite Gram matrix, or a layer without a gradient rule.
    """
    return score(config, featurize(config, data, checkpoints, work), work / "scores.npy")


def score(
    config: Config, stores: list[Store], file: Path, held_out: np.ndarray | None = None
) -> TrakScores:
    """combine() under the settings that the stores were featurised with."""
    return combine(
        stores,
        file,
        config.lambda_reg,
        config.loss_gradient_weight,
        resolve_device(config.device),
        stores[0].features(TARGETS)[0].shape[1] // config.proj_dim,
        held_out,
    )


def combine(
    stores: list[Store],
    file: Path,
    lambda_reg: float,
    weight: str,
    device: torch.device,
    num_blocks: int = 1,
    held_out: np.ndarray | None = None,
) -> TrakScores:
    """Scores of featurised checkpoints, written to a file block by block.

    In memory are some (blocks, k, k), one checkpoint's (n_targets, blocks k), some rows and vectors,
    whatever the number of training examples and of checkpoints. What a killed run had finished is
    not computed again: each checkpoint's factor and targets, and the file.

    Args:
        file: becomes the score matrix, .npy.
        lambda_reg, weight: parameters `lambda_reg` and `loss_gradient_weight`.
        num_blocks: how many there are in the features, side by side.
        held_out: (M, n_train) weights of the training examples as targets under each checkpoint,
            0 where it saw them.

    Raises:
        InputError: a singular Gram matrix, or a value that is not finite.
    """
    keep_freed_memory()  # the system would zero every block anew
    computer = RidgeScoreComputer(
        torch.float32, device, lambda_reg=lambda_reg, num_blocks=num_blocks
    )
    with progress("trak: checkpoints factorised", len(stores)) as advance:
        for store in stores:
            if not store.targets.exists():
                _factorise(store, computer)
            advance()
    done = file.with_name("per_example.npy")
    if not (file.exists() and done.exists()):
        n, n_targets = (sum(map(len, stores[0].features(s))) for s in ("train", TARGETS))
        per_example = np.zeros((n, 2))
        blocks = _score_blocks(stores, computer, weight, per_example, held_out)
        write_matrix(file, ahead(blocks), (n, n_targets))
        write_matrix(done, [per_example], (n, 2))
    self_influence, found = np.array(open_matrix(done)).T
    row_weight = row_scale(stores, weight)[:, 0] * len(stores)
    return TrakScores(file, self_influence, None if held_out is None else found, row_weight)


def _factorise(store: Store, computer: RidgeScoreComputer) -> None:
    """Write the Cholesky factors of A = Phi'Phi + lambda I = L L', and the whitened targets."""
    gram = computer.gram(map(torch.from_numpy, ahead(row_blocks(*store.features("train")))))
    factors = computer.factor(gram)
    flat = factors.flatten(0, 1)
    write_matrix(store.factor, [flat.cpu().numpy()], (len(flat), flat.shape[1]))
    targets = store.features(TARGETS)
    blocks = (
        computer.whiten(torch.from_numpy(block), factors).cpu().numpy()
        for block in row_blocks(*targets)
    )
    write_matrix(store.targets, blocks, (sum(map(len, targets)), len(flat)))


def row_scale(stores: Sequence[Store], weight: str) -> np.ndarray:
    """What the sum over checkpoints is multiplied by, (n_train, 1) float32."""
    scale = np.full((sum(map(len, stores[0].features("train"))), 1), 1 / len(stores), np.float32)
    if weight == "mean":
        scale *= np.mean([store.one_minus_p("train") for store in stores], axis=0)
    return scale


def _score_blocks(
    stores: list[Store],
    computer: RidgeScoreComputer,
    weight: str,
    per_example: np.ndarray,
    held_out: np.ndarray | None,
) -> Iterator[np.ndarray]:
    """Rows of the score matrix in order; a block is overwritten when the next is asked for.

    x' A^-1 y is the product of x' L^-T and y' L^-T, and self-influence the former's square. Scores on
    held-out examples j, weighted, are one product with the whitened sum of their features, less an
    example's own part in it.

    Args:
        per_example: zeros (n_train, 2), filled in on the way: self-influence, and the alignment with
            held-out examples.
    """
    device = computer.device

    (length, k), m = open_matrix(stores[0].factor).shape, len(open_matrix(stores[0].targets))
    all_fit = 4 * length * (k + m) * len(stores) <= SOLVED_BYTES

    @lru_cache(maxsize=2 * len(stores) if all_fit else 2)
    def load(file: Path) -> torch.Tensor:
        return torch.from_numpy(np.load(file, allow_pickle=False)).to(device)

    def whitened(store: Store, rows: np.ndarray) -> torch.Tensor:
        return computer.whiten(torch.from_numpy(rows), load(store.factor).view(-1, k, k))

    weights = np.zeros((len(stores), len(per_example))) if held_out is None else held_out
    sums = [whitened(s, _weighted_sum(s, w)) for s, w in zip(stores, weights, strict=True)]
    features = [row_blocks(*store.features("train"), columns=m) for store in stores]
    scale, start = row_scale(stores, weight), 0
    for first in features[0]:
        rows = slice(start, start := start + len(first))
        scores = torch.zeros(len(first), m, device=device)
        blocks = chain([first], map(next, features[1:]))  # of every checkpoint, read one by one
        for store, block, total, own in zip(stores, blocks, sums, weights):
            white = whitened(store, block)
            computer.get_scores(white, load(store.targets), accumulator=scores)
            norms = torch.linalg.vector_norm(white, dim=1).square().cpu().numpy()
            aligned = (white @ total[0]).cpu().numpy() - own[rows] * norms
            per_example[rows] += np.stack([norms, aligned], axis=1) / len(stores)
        scores *= torch.from_numpy(scale[rows]).to(device)
        yield scores.cpu().numpy()


def _weighted_sum(store: Store, weights: np.ndarray) -> np.ndarray:
    """Sum of the training features with weights (n_train,), (1, blocks k) float32."""
    total, start = 0.0, 0
    if weights.any():
        for block in row_blocks(*store.features("train")):
            total = total + weights[start : start + len(block)] @ block
            start += len(block)
    return np.broadcast_to(total, (1, len(open_matrix(store.factor)))).astype(np.float32)
