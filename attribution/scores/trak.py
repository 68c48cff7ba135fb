"""TRAK scores of an ensemble: one matrix from the features of every checkpoint, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from attribution.config import Config
from attribution.data.splits import TARGETS
from attribution.errors import InputError
from attribution.gradients import GradientError, per_sample
from attribution.models import classifier
from attribution.runtime.device import keep_freed_memory, resolve_device
from attribution.runtime.npy_blocks import ahead, open_matrix, row_blocks, write_matrix
from attribution.runtime.progress import progress
from attribution.scores.features import Store
from attribution.scores.ridge import Ridge


@dataclass(frozen=True)
class TrakScores:
    """Scores of an ensemble.

    Attributes:
        file: .npy of the scores, (n_train, n_targets) float32; positive = helpful.
        self_influence: (n_train,) float32, each example's unweighted score on its own margin,
            phi_i' (Phi'Phi + lambda I)^-1 phi_i, averaged over checkpoints.
        held_out: (n_train,) float32, how much each example helps held-out training examples: the sum,
            over those examples, of its unweighted score on their margin times their weight (argument
            `held_out` of score), averaged over checkpoints. None if score was given no weights.
        row_weight: (n_train,) float32, the factor of row i of the scores: the mean over checkpoints of
            1 - p, or 1 without weights. It is M times row_scale.
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
    """Refuse features longer than the n training examples if there is no ridge.

    Raises:
        InputError: the Gram matrix would be singular.
    """
    if config.lambda_reg == 0 and config.proj_dim > n:
        raise InputError(
            f"proj_dim={config.proj_dim}: larger than the {n} training examples with lambda_reg=0; "
            f"use lambda_reg above 0, e.g. 0.1, or a proj_dim of at most {n}"
        )


def check_gradients(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuse a model without exact per-sample gradients before its checkpoints are trained.

    Raises:
        InputError: a layer without a gradient rule, or images too small for the model.
    """
    model = classifier.build(config.model, class_names, seed=0).eval()
    classifier.freeze(model, config.model, config.train_layers)
    classifier.check_image_size(model, config.image_size)
    if config.projector == "sketch":
        size = (2, 3, config.image_size, config.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        try:
            per_sample.check(model, images)
        except GradientError as error:
            raise InputError(f"model={config.model}: {error}") from error


def _ridge(config: Config, stores: list[Store]) -> Ridge:
    num_blocks = stores[0].features(TARGETS)[0].shape[1] // config.proj_dim
    return Ridge(config.lambda_reg, num_blocks, resolve_device(config.device))


def score(
    config: Config,
    stores: list[Store],
    file: Path,
    held_out: np.ndarray | None = None,
    scale: float = 1.0,
) -> TrakScores:
    """Score every training example against every validation example, as the config says.

    tau = (1/M sum_m Phi_m (Phi_m'Phi_m + lambda_m I)^-1 phi_m(target)) * (1/M sum_m (1 - p_m,i)).
    The second factor scales row i if loss_gradient_weight is 'mean'. This is equation 17 of Park et
    al. 2023, "TRAK: Attributing Model Behavior at Scale", with a ridge and without the soft
    threshold. With num_blocks above 1 tau is a sum over blocks of layers, each with its own
    Phi'Phi, k and lambda.

    The scores are written to the file block by block. Memory holds factors (blocks, k, k), the targets
    of a checkpoint (n_targets, blocks k), some rows and some vectors, for any number of training
    examples and checkpoints. A second call continues from the factors, targets and scores that are
    finished.

    Args:
        stores: from featurize.
        file: the score matrix to write, .npy.
        held_out: (M, n_train) weights of the training examples as targets under each checkpoint;
            0 for examples that the checkpoint saw.
        scale: factor of all scores, see calibration.calibrate. It changes neither self_influence nor
            held_out.

    Raises:
        InputError: a Gram matrix that is singular, or a value that is not finite.
    """
    ridge, weight = _ridge(config, stores), config.loss_gradient_weight
    keep_freed_memory()  # or the system would clear the memory of every block
    _factorise_all(stores, ridge)
    done = file.with_name("per_example.npy")
    if not (file.exists() and done.exists()):
        n = stores[0].count("train")
        weights = np.zeros((len(stores), n)) if held_out is None else held_out
        # One array: a small one kept for each block would leave gaps that no later block fits in.
        per_example = np.zeros((n, 2))
        blocks = _score_blocks(
            stores, ridge, scale * row_scale(stores, weight), weights, per_example
        )
        write_matrix(file, ahead(blocks), (n, stores[0].count(TARGETS)))
        write_matrix(done, [per_example], (n, 2))
    self_influence, found = np.array(open_matrix(done)).T
    row_weight = row_scale(stores, weight)[:, 0] * len(stores)
    return TrakScores(file, self_influence, None if held_out is None else found, row_weight)


def trust_of_unseen(
    config: Config, stores: list[Store], held_out: np.ndarray, split: str
) -> np.ndarray:
    """What `held_out` of TrakScores is for training examples, of a split that none was trained on.

    Args:
        stores: that score() has factorised.
        held_out: (M, n_train) weights of the training examples as targets, as for score.

    Returns:
        (n_split,) float32: how much each example would help held-out training examples.
    """
    ridge = _ridge(config, stores)
    total = torch.zeros(stores[0].count(split), device=ridge.device)
    for store, weights in zip(stores, held_out, strict=True):
        factor = np.load(store.factor_file)
        target = ridge.whiten(_weighted_sums(store, weights[None]), factor)[0]
        rows = row_blocks(*store.features(split))
        total += torch.cat([ridge.whiten(block, factor) @ target for block in rows])
    return (total / len(stores)).cpu().numpy()


def predicted_margins(config: Config, stores: list[Store], subsets: np.ndarray) -> np.ndarray:
    """The margins of the targets under models that are trained on subsets, up to a constant.

    They are sums of the scores of each subset's examples, computed without the score matrix.

    Args:
        stores: from featurize.
        subsets: (S, n_train) bool, the examples that each model sees.

    Returns:
        (S, n_targets) float64, in the unit of score() with scale 1.

    Raises:
        InputError: as score().
    """
    ridge = _ridge(config, stores)
    _factorise_all(stores, ridge)
    weights = subsets * row_scale(stores, config.loss_gradient_weight)[:, 0]
    total = np.zeros((len(subsets), stores[0].count(TARGETS)))
    for store in stores:
        white = ridge.whiten(_weighted_sums(store, weights), np.load(store.factor_file))
        total += (white @ _targets(store, ridge).T).double().cpu().numpy()
    return total


def _factorise_all(stores: list[Store], ridge: Ridge) -> None:
    """Factorise the checkpoints that are not yet."""
    missing = [store for store in stores if not store.whitened_targets_file.exists()]
    with progress(
        "trak: checkpoints factorised", len(stores), len(stores) - len(missing)
    ) as advance:
        for store in missing:
            _factorise(store, ridge)
            advance()


def _factorise(store: Store, ridge: Ridge) -> None:
    """Write the Cholesky factors of a checkpoint's Phi'Phi + lambda I, and its whitened targets."""
    blocks = ahead(row_blocks(*store.features("train")))
    factors = ridge.factor(ridge.gram(blocks))
    flat = factors.flatten(0, 1)
    write_matrix(store.factor_file, [flat.cpu().numpy()], (len(flat), flat.shape[1]))
    targets = (
        ridge.whiten(block, factors).cpu().numpy() for block in row_blocks(*store.features(TARGETS))
    )
    write_matrix(store.whitened_targets_file, targets, (store.count(TARGETS), len(flat)))


def row_scale(stores: Sequence[Store], weight: str) -> np.ndarray:
    """Factor of each row of the sum over the M checkpoints, (n_train, 1) float32: row_weight / M."""
    scale = np.full((stores[0].count("train"), 1), 1 / len(stores), np.float32)
    if weight == "mean":
        scale *= np.mean([store.one_minus_p("train") for store in stores], axis=0)
    return scale


def _score_blocks(
    stores: list[Store],
    ridge: Ridge,
    scale: np.ndarray,
    weights: np.ndarray,
    per_example: np.ndarray,
) -> Iterator[np.ndarray]:
    """Rows of the score matrix in order, in blocks (b, n_targets) float32.

    x' A^-1 y is the product of the whitened x and y, and self-influence the squared length of a
    whitened x. The sum of scores on held-out examples is the product with their whitened weighted
    sum, minus the example's own part.

    Args:
        scale: (n_train, 1) from row_scale.
        weights: (M, n_train) held-out weights.
        per_example: (n_train, 2) zeros; the rows of a block are filled before it is yielded, with
            self-influence and the sum over held-out examples.
    """
    m, start = len(open_matrix(stores[0].whitened_targets_file)), 0
    held_out_sums = [
        ridge.whiten(_weighted_sums(store, weight[None]), np.load(store.factor_file))[0]
        for store, weight in zip(stores, weights, strict=True)
    ]
    features = [row_blocks(*store.features("train"), columns=m) for store in stores]
    for first in features[0]:
        rows = slice(start, start + len(first))
        start = rows.stop
        scores = torch.zeros(len(first), m, device=ridge.device)
        blocks = chain([first], map(next, features[1:]))  # one checkpoint's block in memory
        for store, block, held_out_sum, held_out_weight in zip(
            stores, blocks, held_out_sums, weights
        ):
            white = ridge.whiten(block, np.load(store.factor_file))
            scores.addmm_(white, _targets(store, ridge).T)
            norms = torch.linalg.vector_norm(white, dim=1).square().cpu().numpy()
            aligned = (white @ held_out_sum).cpu().numpy() - held_out_weight[rows] * norms
            per_example[rows] += np.stack([norms, aligned], axis=1) / len(stores)
        scores *= torch.from_numpy(scale[rows]).to(ridge.device)
        yield scores.cpu().numpy()
        del scores, white  # free their memory before the next block is made


def _targets(store: Store, ridge: Ridge) -> torch.Tensor:
    """Whitened features of the targets, (n_targets, blocks k), on the device."""
    return torch.from_numpy(np.load(store.whitened_targets_file)).to(ridge.device)


def _weighted_sums(store: Store, weights: np.ndarray) -> np.ndarray:
    """Sums of the training features by weights (S, n_train), (S, blocks k) float32."""
    total, start = np.zeros((len(weights), len(open_matrix(store.factor_file)))), 0
    if weights.any():
        for block in row_blocks(*store.features("train")):
            total += weights[:, start : start + len(block)] @ block
            start += len(block)
    return total.astype(np.float32)
