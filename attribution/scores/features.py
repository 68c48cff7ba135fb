"""Projected gradients of every example under each checkpoint of an ensemble, by traker's engine, on disk."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector, ProjectionType

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.gradients import per_sample
from attribution.gradients.sketch import dealt
from attribution.models import classifier
from attribution.models.batches import batches_of
from attribution.runtime.device import keep_freed_memory, resolve_device, resolve_precision
from attribution.runtime.hashing import derive_seed
from attribution.runtime.npy_blocks import open_matrix, reserve
from attribution.runtime.parallel import parallel_map, resolve_jobs
from attribution.runtime.progress import progress
from attribution.runtime.safe_files import Files, read_folder, write_folder
from attribution.scores import traker_adapters

# Examples of a task: what is featurised at a time, and kept when a run is killed.
SHARD_ROWS = 4096


GPU_SHARD_ROWS = 16 * SHARD_ROWS  # which takes no longer there


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


def check_gradients(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuse a model whose per-sample gradients cannot be computed.

    Raises:
        InputError: it does not take images of this size, or its gradients fail the check.
    """
    model = classifier.build(config.model, class_names, seed=0).eval()
    classifier.check_image_size(model, config.image_size)
    if config.projector == "sketch":
        size = (2, 3, config.image_size, config.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        per_sample.check(model, images)


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
    logging.getLogger("TRAK").setLevel(logging.ERROR)
    model = classifier.load(checkpoint)
    classifier.place(model, device, config.image_size)
    seed = derive_seed(config.seed, "projection")
    num_blocks = 1
    if config.projector == "sketch":
        shapes = {name: p.shape for name, p in model.named_parameters()}
        num_blocks = 1 + max(dealt(shapes, config.num_blocks).values())
        precision = resolve_precision(config.feature_precision, torch.device(device))
        gradients = traker_adapters.HookGradientComputer
        if precision == torch.bfloat16:
            gradients = traker_adapters.BFloat16GradientComputer
        length = num_blocks * config.proj_dim
        projector = traker_adapters.SketchProjector(
            length, seed, device, num_blocks, config.gpu_kernels == "on"
        )
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
        task=traker_adapters.MarginOutput(),
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
