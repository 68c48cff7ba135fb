"""Projected gradients of every example under each checkpoint, made by traker's engine and kept on disk."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector, ProjectionType

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.gradients.sketch import dealt
from attribution.models import classifier, memory_layout
from attribution.models.batches import batches_of
from attribution.runtime.device import keep_freed_memory, resolve_device, resolve_precision
from attribution.runtime.hashing import derive_seed
from attribution.runtime.npy_blocks import open_matrix, reserve
from attribution.runtime.parallel import parallel_map, resolve_jobs
from attribution.runtime.progress import progress
from attribution.runtime.safe_files import Files, read_folder, write_folder
from attribution.scores.traker_adapters import HookGradientComputer, MarginOutput, SketchProjector

SHARD_ROWS = 4096  # examples of a task; a finished task survives when the run is killed
GPU_SHARD_ROWS = 16 * SHARD_ROWS  # a GPU is as fast as sixteen tasks on a CPU


@dataclass(frozen=True)
class Store:
    """The files of one checkpoint: features of both splits, and what scores are solved with.

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
    def factor(self) -> Path:
        """Cholesky factors of the blocks of Phi'Phi + lambda I, (blocks k, k)."""
        return self.folder / "factor.npy"

    @property
    def targets(self) -> Path:
        """Whitened features of the targets, (n_targets, blocks k); written after `factor`."""
        return self.folder / "targets.npy"


@dataclass(frozen=True)
class Shard:
    """One task: some examples of a split under one checkpoint.

    Attributes:
        checkpoint: from_pretrained folder.
        model_id: traker's number of the checkpoint, which also seeds the projection.
        split: name of the split.
        rows: positions of the examples in the split.
        batch_size: images per batch. It changes only the last bit of the features.
    """

    checkpoint: Path
    model_id: int
    split: str
    rows: range
    batch_size: int

    def __str__(self) -> str:
        return f"features of checkpoint {self.model_id}, {self.split} from {self.rows.start}"

    def smaller(self) -> Shard:
        """The same examples in batches of a quarter of the size."""
        return replace(self, batch_size=max(1, self.batch_size // 4))


def featurize(
    config: Config, data: ImageData, checkpoints: Sequence[Path], work: Path
) -> list[Store]:
    """Projected gradients of train and validation examples under each checkpoint.

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
    shards = [
        Shard(
            checkpoint,
            m,
            split,
            range(start, min(start + size, len(data.rows(split)))),
            feature_batch_size(config.image_size, device),
        )
        for m, checkpoint in enumerate(checkpoints)
        for split in ("train", TARGETS)
        for start in range(0, len(data.rows(split)), size)
    ]
    folders = {
        shard: stores[shard.model_id].shard(shard.split, shard.rows.start) for shard in shards
    }
    _make_missing(config, data, folders)
    return stores


def _make_missing(config: Config, data: ImageData, folders: dict[Shard, Path]) -> None:
    """Make each shard whose folder is not finished."""
    missing = [shard for shard, folder in folders.items() if not (folder / "done").exists()]
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, len(folders))
    # Workers on this machine write to the folders. Those of a cluster return the content.
    is_away = config.backend == "ray"
    results = parallel_map(
        _featurize_away if is_away else _featurize,
        [(shard, shard.checkpoint if is_away else folders[shard]) for shard in missing],
        jobs,
        (config, data),
        config,
        [str(shard) for shard in missing],
        smaller=_smaller_batch,
    )
    done = len(folders) - len(missing)
    with progress("trak: shards featurised", len(folders), done) as advance:
        for index, files in results:
            if files is not None:
                folder = folders[missing[index]]
                shutil.rmtree(folder, ignore_errors=True)  # begun by another run
                write_folder(folder, files)
            advance()


def feature_batch_size(image_size: int, device_type: str) -> int:
    """Images per batch: enough for speed, few enough for their activations to fit in memory."""
    if device_type == "cuda":  # launches dominate: a batch takes 2,000, at any size
        return 4096 if image_size <= 64 else 512
    return 256 if image_size <= 32 else 64 if image_size <= 96 else 16


def _smaller_batch(task: tuple) -> tuple:
    """A task of parallel_map with smaller batches."""
    return task[0].smaller(), *task[1:]


def _featurize_away(config: Config, data: ImageData, shard: Shard, checkpoint: Path) -> Files:
    """Content of the folder that _featurize leaves, for a driver with another disk.

    Args:
        checkpoint: where the checkpoint lies on this machine. The shard names the driver's folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        _featurize(config, data, replace(shard, checkpoint=checkpoint), Path(folder))
        return read_folder(Path(folder))


def _featurize(config: Config, data: ImageData, shard: Shard, folder: Path) -> None:
    """Featurise a shard into a folder, in smaller batches if a GPU runs out of memory.

    Raises:
        torch.OutOfMemoryError: a single image does not fit.
    """
    keep_freed_memory()
    while not _fits(config, data, shard, folder):
        shard = shard.smaller()
    # traker leaves a second array of this size, for its own way of scoring.
    (folder / str(shard.model_id) / "features.mmap").unlink(missing_ok=True)
    (folder / "done").touch()


def _fits(config: Config, data: ImageData, shard: Shard, folder: Path) -> bool:
    """Featurise a shard; whether its batches fit in memory."""
    # traker cannot continue with another batch size: a shard is whole or made again.
    shutil.rmtree(folder, ignore_errors=True)
    device = resolve_device(config.device)
    batches = batches_of(config, data, shard.split, shard.batch_size, device, shard.rows)
    try:
        run_traker(config, shard.checkpoint, shard.model_id, batches, len(shard.rows), folder)
    except torch.OutOfMemoryError:
        if shard.batch_size == 1:
            raise
        return False
    return True


def run_traker(
    config: Config,
    checkpoint: Path,
    model_id: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    n: int,
    folder: Path,
) -> None:
    """Write the features of n examples under a checkpoint into traker's folder.

    Args:
        batches: images (B, 3, H, W) and labels (B,), on the device of the config.

    Raises:
        OSError: the disk is full.
    """
    traker, state = make_traker(config, n, checkpoint, folder)
    traker.load_checkpoint(state, model_id=model_id)
    # On a full disk this raises. A write to the memory map would end the process.
    reserve(folder.glob("*/grads.mmap"))
    for batch in batches:
        traker.featurize(batch, num_samples=len(batch[1]))


def make_traker(
    config: Config, n: int, checkpoint: Path, folder: Path
) -> tuple[TRAKer, dict[str, Tensor]]:
    """traker's engine with the gradients and projection of parameter `projector`.

    Returns:
        The engine, and the checkpoint's state dictionary for its `load_checkpoint`.
    """
    logging.getLogger("TRAK").setLevel(logging.ERROR)
    device = resolve_device(config.device)
    model = classifier.load(checkpoint)
    memory_layout.place(model, str(device), config.image_size)
    make_parts = _sketch_parts if config.projector == "sketch" else _normal_parts
    gradients, projector = make_parts(config, model, device)
    traker = TRAKer(
        model=model,
        task=MarginOutput(),
        train_set_size=n,
        save_dir=str(folder),
        device=str(device),
        gradient_computer=gradients,
        projector=projector,
        proj_dim=projector.proj_dim,
        logging_level=logging.ERROR,
        use_half_precision=False,  # its float16 default overflows and rounds
    )
    return traker, model.state_dict()


def _sketch_parts(config: Config, model: torch.nn.Module, device: torch.device) -> tuple:
    """Gradients by hooks, and the sketch, for projector=sketch."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    num_blocks = 1 + max(dealt(shapes, config.num_blocks).values())
    is_bfloat16 = resolve_precision(config.feature_precision, device) == torch.bfloat16
    seed = derive_seed(config.seed, "projection")
    projector = SketchProjector(
        num_blocks * config.proj_dim, seed, str(device), num_blocks, config.gpu_kernels == "on"
    )
    return partial(HookGradientComputer, bfloat16=is_bfloat16), projector


def _normal_parts(config: Config, model: torch.nn.Module, device: torch.device) -> tuple:
    """traker's own gradients and projection, for projector=normal."""
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in model.parameters()),
        proj_dim=config.proj_dim,
        seed=derive_seed(config.seed, "projection"),
        proj_type=ProjectionType.normal,
        device=device,
        dtype=torch.float32,
    )
    return FunctionalGradientComputer, projector
