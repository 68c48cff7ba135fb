"""TRAK scores of an ensemble: traker featurises each checkpoint, and its stores become one matrix."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attribution.config import Config
from attribution.data import ImageData
from attribution.errors import InputError
from attribution.matrices import ahead, open_matrix, reserve, row_blocks, write_matrix
from attribution.memory import keep_freed_memory
from attribution.parallel import Files, parallel_map, read_folder, resolve_jobs, write_folder
from attribution.progress import progress
from attribution.training import batches_of, derive_seed, resolve_device, resolve_precision

if TYPE_CHECKING:
    import torch
    from trak import TRAKer

    from attribution.traker_plugins import RidgeScoreComputer

TARGETS = "validation"
# Of all checkpoints' factors and targets; where they are larger they are read for every block.
SOLVED_BYTES = 5 << 29
# Examples of a task: what is featurised at a time, and kept when a run is killed.
SHARD_ROWS = 4096
GPU_SHARD_ROWS = 16 * SHARD_ROWS  # which takes no longer there


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


@dataclass(frozen=True)
class Store:
    """The files of one checkpoint, in a folder of its own.

    Attributes:
        folder: where they are.
        model_id: traker's number of the checkpoint.
    """

    folder: Path
    model_id: int

    def shard(self, split: str, first: int) -> Path:
        """traker's folder of the rows of a split from `first` on."""
        return self.folder / split / f"{first:09d}"

    def features_file(self, split: str, first: int = 0) -> Path:
        """Projected gradients (rows, blocks k) float32 of a shard, as traker's saver writes them."""
        return self.shard(split, first) / str(self.model_id) / "grads.mmap"

    def one_minus_p_file(self, split: str, first: int = 0) -> Path:
        """1 - p of every label of a shard, (rows, 1) float32, as traker's saver writes it."""
        return self.shard(split, first) / str(self.model_id) / "out_to_loss.mmap"

    def features(self, split: str) -> list[np.ndarray]:
        """Memory maps of the shards' features, in order."""
        return [open_matrix(self.features_file(split, first)) for first in self._shards(split)]

    def one_minus_p(self, split: str) -> np.ndarray:
        """1 - p of every example's label, (n_split, 1) float32."""
        files = (self.one_minus_p_file(split, first) for first in self._shards(split))
        return np.concatenate([open_matrix(file) for file in files])

    def _shards(self, split: str) -> list[int]:
        names = (folder.name for folder in (self.folder / split).iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def factor(self) -> Path:
        """File of the blocks' Cholesky factors L of Phi'Phi + lambda I, (blocks k, k)."""
        return self.folder / "factor.npy"

    @property
    def targets(self) -> Path:
        """File of the targets' whitened features, (n_targets, blocks k); written after `factor`."""
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


def featurize(
    config: Config, data: ImageData, checkpoints: Sequence[Path], work: Path
) -> list[Store]:
    """Projected gradients of both splits under each checkpoint; `work` keeps what is finished.

    A GPU's apart from a processor's: their shards are not of one size, nor their last bits the same.
    """
    device = resolve_device(config.device).type
    here = device == "cuda" and config.backend == "local"  # a cluster sends shards about
    size = GPU_SHARD_ROWS if here else SHARD_ROWS
    folder = work / f"features-{device}-{size}"
    stores = [Store(folder / f"{m:03d}", m) for m in range(len(checkpoints))]
    shards = [
        (m, split, range(start, min(start + size, len(data.rows(split)))))
        for m in range(len(stores))
        for split in ("train", TARGETS)
        for start in range(0, len(data.rows(split)), size)
    ]
    _featurize_all(config, data, checkpoints, stores, shards)
    return stores


def _featurize_all(
    config: Config,
    data: ImageData,
    checkpoints: Sequence[Path],
    stores: list[Store],
    shards: list[tuple[int, str, range]],
) -> None:
    """Fill the stores with what they lack."""
    folders = [stores[m].shard(split, rows.start) for m, split, rows in shards]
    missing = [i for i, folder in enumerate(folders) if not (folder / "done").exists()]
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, len(shards))
    size = feature_batch_size(config.image_size, resolve_device(config.device).type)
    # Workers on this machine write to the stores; those of a cluster have no such disk.
    away = config.backend == "ray"
    function = _featurize_away if away else _featurize
    tasks, names = [], []
    for i in missing:
        m, split, rows = shards[i]
        tasks.append((checkpoints[m], m, split, rows, size) + (() if away else (folders[i],)))
        names.append(f"features of checkpoint {m}, {split} from {rows.start}")
    with progress("trak: shards featurised", len(shards), len(shards) - len(tasks)) as advance:
        results = parallel_map(
            function, tasks, jobs, (config, data), config, names, smaller=_smaller_batch
        )
        for index, files in results:
            if files is not None:
                folder = folders[missing[index]]
                shutil.rmtree(folder, ignore_errors=True)  # begun by another run
                write_folder(folder, files)
            advance()


def feature_batch_size(image_size: int, device_type: str) -> int:
    """Images a batch: large enough to be fast, small enough that activations fit in memory."""
    if device_type == "cuda":  # where a batch has two thousand launches, whatever its size
        return 4096 if image_size <= 64 else 512
    return 256 if image_size <= 32 else 64 if image_size <= 96 else 16


def _smaller_batch(task: tuple) -> tuple:
    """The task of _featurize with a quarter of the images in a batch."""
    *shard, size = task[:5]
    return *shard, max(1, size // 4), *task[5:]


def _featurize_away(
    config: Config, data: ImageData, checkpoint: Path, m: int, split: str, rows: range, size: int
) -> Files:
    """What _featurize leaves in its folder, as content: the driver has another disk."""
    with tempfile.TemporaryDirectory() as folder:
        _featurize(config, data, checkpoint, m, split, rows, size, Path(folder))
        return read_folder(Path(folder))


def _featurize(
    config: Config,
    data: ImageData,
    checkpoint: Path,
    m: int,
    split: str,
    rows: range,
    size: int,
    folder: Path,
) -> None:
    """Featurise some rows of a split.

    `size` images a batch change the last bit of the features, and nothing else. Where they do not fit
    into a GPU's memory, a batch has a quarter of them.
    """
    import torch

    keep_freed_memory()
    while True:
        # A shard is whole or made anew: traker's store cannot go on with batches of another size.
        shutil.rmtree(folder, ignore_errors=True)
        batches = batches_of(config, data, split, size, resolve_device(config.device), rows)
        try:
            run_traker(config, checkpoint, m, batches, len(rows), folder)
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size = max(1, size // 4)  # not in the handler, whose traceback holds the memory
    (folder / str(m) / "features.mmap").unlink(
        missing_ok=True
    )  # as large again, for what is not done here
    (folder / "done").touch()


def run_traker(
    config: Config,
    checkpoint: Path,
    m: int,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    n: int,
    folder: Path,
) -> None:
    """Leave the features of n examples under checkpoint m in traker's folder.

    Args:
        batches: images (B, 3, H, W) and labels (B,), on the device of the config.
    """
    device = str(resolve_device(config.device))
    traker, state = make_traker(config, n, checkpoint, folder, m, device)
    traker.load_checkpoint(state, model_id=m)
    reserve(
        folder.glob("*/grads.mmap")
    )  # on a full disk an error now, and not a crash while writing
    for batch in batches:
        traker.featurize(batch, num_samples=len(batch[1]))


def make_traker(
    config: Config, n: int, checkpoint: Path, store: Path, m: int, device: str
) -> tuple[TRAKer, dict[str, torch.Tensor]]:
    """traker's engine with our gradients and projection (or its own, projector=normal).

    Returns the TRAKer and the checkpoint's state dictionary.
    """
    import torch
    from trak import TRAKer
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.projectors import BasicProjector, ProjectionType

    from attribution import models, traker_plugins
    from attribution.sketch import dealt

    logging.getLogger("TRAK").setLevel(logging.ERROR)
    model = models.load(checkpoint)
    models.place(model, device, config.image_size)
    seed = derive_seed(config.seed, "projection")
    num_blocks = 1
    if config.projector == "sketch":
        shapes = {name: p.shape for name, p in model.named_parameters()}
        num_blocks = 1 + max(dealt(shapes, config.num_blocks).values())
        precision = resolve_precision(config.feature_precision, torch.device(device))
        gradients = traker_plugins.HookGradientComputer
        if precision == torch.bfloat16:
            gradients = traker_plugins.BFloat16GradientComputer
        length = num_blocks * config.proj_dim
        projector = traker_plugins.SketchProjector(length, seed, device, num_blocks)
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
        proj_dim=num_blocks * config.proj_dim,
        logging_level=logging.ERROR,
        use_half_precision=False,  # its float16 default overflows and rounds
    )
    return traker, model.state_dict()


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
    import torch

    from attribution.traker_plugins import RidgeScoreComputer

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
    import torch

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


def row_scale(stores: list[Store], weight: str) -> np.ndarray:
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
    import torch

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
