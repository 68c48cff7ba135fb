"""Projected gradients of every example under each checkpoint, made by traker's engine and kept on disk."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import SPLITS
from attribution.gradients.per_sample import trained_parameters
from attribution.gradients.sketch import Sketch, dealt
from attribution.models import classifier, frozen, memory_layout
from attribution.models.batches import batches_of
from attribution.runtime.device import keep_freed_memory, resolve_device, resolve_precision
from attribution.runtime.hashing import derive_seed
from attribution.runtime.npy_blocks import open_matrix, reserve
from attribution.runtime.parallel import parallel_map, resolve_jobs
from attribution.runtime.progress import progress
from attribution.runtime.safe_files import Files, read_folder, write_folder
from attribution.scores.traker_adapters import MarginOutput, SketchComputer

SHARD_ROWS = 4096  # examples of a task; a finished task survives when the run is killed
GPU_SHARD_ROWS = 16 * SHARD_ROWS  # a GPU is as fast as sixteen tasks on a CPU


@dataclass(frozen=True)
class Store:
    """The files of one checkpoint: features of each split, and what scores are solved with.

    Attributes:
        folder: folder of the files.
        model_id: traker's number of the checkpoint.
    """

    folder: Path
    model_id: int

    def shard(self, split: str, first: int) -> Path:
        """Folder in which traker writes the rows of a split from row `first` on."""
        return self.folder / split / f"{first:09d}"

    def features_file(self, split: str, first: int = 0) -> Path:
        """Projected gradients of a shard, (rows, blocks k) float32, as traker writes them."""
        return self.shard(split, first) / str(self.model_id) / "grads.mmap"

    def one_minus_p_file(self, split: str, first: int = 0) -> Path:
        """1 - p of each label of a shard, (rows, 1) float32, as traker writes it."""
        return self.shard(split, first) / str(self.model_id) / "out_to_loss.mmap"

    def features(self, split: str) -> list[np.ndarray]:
        """Memory maps of the shards' features, in order of rows."""
        return [open_matrix(self.features_file(split, first)) for first in self._shards(split)]

    def one_minus_p(self, split: str) -> np.ndarray:
        """1 - p of each example's label, (n_split, 1) float32."""
        files = (self.one_minus_p_file(split, first) for first in self._shards(split))
        return np.concatenate([open_matrix(file) for file in files])

    def count(self, split: str) -> int:
        """Number of examples of a split."""
        return sum(map(len, self.features(split)))

    def _shards(self, split: str) -> list[int]:
        names = (folder.name for folder in (self.folder / split).iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def factor_file(self) -> Path:
        """Cholesky factors of the blocks of Phi'Phi + lambda I, (blocks k, k)."""
        return self.folder / "factor.npy"

    @property
    def whitened_targets_file(self) -> Path:
        """Whitened features of the targets, (n_targets, blocks k); written after the factors."""
        return self.folder / "targets.npy"


@dataclass(frozen=True)
class Shard:
    """One task: some examples of a split under one checkpoint.

    Attributes:
        model_id: traker's number of the checkpoint, which also seeds the projection.
        split: name of the split.
        rows: positions of the examples in the split.
        batch_size: images per batch. It changes only the last bit of the features.
    """

    model_id: int
    split: str
    rows: range
    batch_size: int

    def __str__(self) -> str:
        return f"features of checkpoint {self.model_id}, {self.split} from {self.rows.start}"

    def in_smaller_batches(self) -> Shard:
        """The same examples in batches of a quarter of the size."""
        return replace(self, batch_size=max(1, self.batch_size // 4))


def featurize(
    config: Config, data: ImageData, checkpoints: Sequence[Path], work: Path
) -> list[Store]:
    """Projected gradients of every example under each checkpoint.

    Args:
        checkpoints: from_pretrained folders.
        work: folder of the stores. A second call makes only what is missing.

    Returns:
        One store per checkpoint.

    Raises:
        InputError: a layer without a gradient rule, or a task that fails in every attempt.
    """
    device = resolve_device(config.device).type
    is_local_gpu = device == "cuda" and config.backend == "local"  # a cluster sends shards around
    size = GPU_SHARD_ROWS if is_local_gpu else SHARD_ROWS
    # GPU and CPU have folders of their own: shard sizes and the features' last bits differ.
    folder = work / f"features-{device}-{size}"
    stores = [Store(folder / f"{m:03d}", m) for m in range(len(checkpoints))]
    batch_size = feature_batch_size(config.image_size, device)
    folders = {}
    for store in stores:
        for split in SPLITS:
            n = len(data.rows(split))
            for start in range(0, n, size):
                rows = range(start, min(start + size, n))
                shard = Shard(store.model_id, split, rows, batch_size)
                folders[shard] = store.shard(split, start)
    _make_missing(config, data, checkpoints, folders)
    return stores


def _make_missing(
    config: Config, data: ImageData, checkpoints: Sequence[Path], folders: dict[Shard, Path]
) -> None:
    """Make each shard that has no folder yet."""
    missing = [shard for shard, folder in folders.items() if not folder.exists()]
    tasks = [(shard, checkpoints[shard.model_id]) for shard in missing]
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, len(folders))
    names = [str(shard) for shard in missing]
    total, left = (sum(len(shard.rows) for shard in shards) for shards in (folders, missing))
    with progress("trak: examples featurised", total, total - left) as advance:
        for index, files in parallel_map(
            _featurize, tasks, jobs, (config, data), config, names, _smaller_batch
        ):
            write_folder(folders[missing[index]], files)
            advance(len(missing[index].rows))


def feature_batch_size(image_size: int, device_type: str) -> int:
    """Images per batch: enough for speed, few enough for their activations to fit in memory."""
    if device_type == "cuda":  # launches dominate: a batch takes 2,000, at any size
        return 4096 if image_size <= 64 else 512
    return 256 if image_size <= 32 else 64 if image_size <= 96 else 16


def _smaller_batch(task: tuple[Shard, Path]) -> tuple[Shard, Path]:
    """A task of parallel_map with smaller batches."""
    return task[0].in_smaller_batches(), task[1]


def _featurize(config: Config, data: ImageData, shard: Shard, checkpoint: Path) -> Files:
    """Featurise a shard, in smaller batches if a GPU runs out of memory.

    Returns:
        The files of traker's folder as bytes, because workers may not share a disk.

    Raises:
        torch.OutOfMemoryError: a single image does not fit.
    """
    keep_freed_memory()
    while True:
        try:
            return _files(config, data, shard, checkpoint)
        except torch.OutOfMemoryError:
            if shard.batch_size == 1:
                raise
        shard = shard.in_smaller_batches()


def _files(config: Config, data: ImageData, shard: Shard, checkpoint: Path) -> Files:
    """The files of traker's folder."""
    model, device = load_checkpoint(config, checkpoint), resolve_device(config.device)
    logits_of = None
    # Stored outputs of the frozen layers have the precision of training.
    same = config.precision == config.feature_precision and config.projector == "sketch"
    if config.train_layers == "head" and same:
        logits_of = frozen.stored_logits(config, data, model, shard.split)
    batches: Iterable = batches_of(config, data, shard.split, shard.batch_size, device, shard.rows)
    if logits_of:  # of positions in the split
        labels = torch.from_numpy(data.labels(shard.split))
        batches = ((x, labels[x]) for x in torch.tensor(shard.rows).split(shard.batch_size))
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), len(shard.rows)
        run_traker(config, model, shard.model_id, batches, n, folder, logits_of)
        # traker leaves a second array of this size, for its own way of scoring.
        (folder / str(shard.model_id) / "features.mmap").unlink(missing_ok=True)
        return read_folder(folder)


def load_checkpoint(config: Config, folder: Path) -> torch.nn.Module:
    """A checkpoint on its device, in which only the parameters that are scored require gradients."""
    model = classifier.load(folder).requires_grad_()
    classifier.freeze(model, config.model, config.train_layers)
    memory_layout.place(model, resolve_device(config.device), config.image_size)
    return model


def run_traker(
    config: Config,
    model: torch.nn.Module,
    model_id: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    n: int,
    folder: Path,
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Write the features of n examples under a checkpoint into traker's folder, by parameter `projector`.

    Args:
        model: from load_checkpoint.
        batches: images (B, 3, H, W), or what `logits_of` takes, and labels (B,), on the model's device.
        logits_of: computes logits by the model's trained layers alone; only with projector=sketch.

    Raises:
        OSError: the disk is full.
    """
    logging.getLogger("TRAK").setLevel(logging.ERROR)
    if config.projector == "sketch":
        gradients, projector = _sketch_parts(config, model, model_id, logits_of)
    else:
        gradients, projector = _normal_parts(config, model)
    traker = TRAKer(
        model=model,
        task=MarginOutput(),
        train_set_size=n,
        save_dir=str(folder),
        device=str(resolve_device(config.device)),
        gradient_computer=gradients,
        projector=projector,
        grad_wrt=None if config.projector == "sketch" else [*trained_parameters(model)],
        proj_dim=projector.proj_dim,
        logging_level=logging.ERROR,
        use_half_precision=False,  # its float16 default overflows and rounds
    )
    traker.load_checkpoint(model.state_dict(), model_id=model_id)
    # On a full disk this raises. A write to the memory map would end the process.
    reserve(folder.glob("*/grads.mmap"))
    for batch in batches:
        traker.featurize(batch, num_samples=len(batch[1]))


def _sketch_parts(
    config: Config, model: torch.nn.Module, model_id: int, logits_of: Callable | None
) -> tuple:
    """The sketch in place of gradients, and no projection, for projector=sketch."""
    device = resolve_device(config.device)
    shapes = {name: p.shape for name, p in trained_parameters(model).items()}
    num_blocks = 1 + max(dealt(shapes, config.num_blocks).values())
    sketch = Sketch(
        config.proj_dim,
        f"{derive_seed(config.seed, 'projection')}/{model_id}",
        num_blocks=num_blocks,
        gpu_kernels=config.gpu_kernels == "on",
    )
    is_bfloat16 = resolve_precision(config.feature_precision, device) == torch.bfloat16
    gradients = partial(SketchComputer, sketch=sketch, bfloat16=is_bfloat16, logits_of=logits_of)
    return gradients, NoOpProjector(proj_dim=num_blocks * config.proj_dim, device=device)


def _normal_parts(config: Config, model: torch.nn.Module) -> tuple:
    """traker's own gradients and projection, for projector=normal."""
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in trained_parameters(model).values()),
        proj_dim=config.proj_dim,
        seed=derive_seed(config.seed, "projection"),
        proj_type=ProjectionType.normal,
        device=resolve_device(config.device),
        dtype=torch.float32,
    )
    return FunctionalGradientComputer, projector
