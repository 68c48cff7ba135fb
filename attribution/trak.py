"""TRAK scores of an ensemble: traker featurises each checkpoint, and its stores become one matrix."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data import ImageData
from attribution.errors import InputError
from attribution.parallel import Files, parallel_map, read_folder, resolve_jobs, write_folder
from attribution.progress import progress
from attribution.training import batches_of, derive_seed, resolve_device

TARGETS = "validation"


@dataclass(frozen=True)
class TrakScores:
    """Scores of an ensemble.

    Attributes:
        values: (n_train, n_targets) float32; positive = helpful.
        self_influence: (n_train,) float32, each example's unweighted score on its own margin:
            phi_i' (Phi'Phi + lambda I)^-1 phi_i, the mean over checkpoints.
    """

    values: np.ndarray
    self_influence: np.ndarray


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
        work: where features are kept while unfinished; a second call goes on from there.

    Raises:
        InputError: a singular or non-finite Gram matrix, or a layer without a gradient rule.
    """
    stores = [work / f"{m:03d}" for m in range(len(checkpoints))]
    missing = [m for m, store in enumerate(stores) if not (store / "done").exists()]
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, len(stores))
    size = feature_batch_size(config.image_size)
    # Workers on this machine write to the stores; those of a cluster have no such disk.
    away = config.backend == "ray"
    tasks = [(checkpoints[m], m, size) + (() if away else (stores[m],)) for m in missing]
    names = [f"features of checkpoint {stores[m].name}" for m in missing]
    function = _featurize_away if away else _featurize
    with progress("trak: checkpoints featurised", len(stores), len(stores) - len(tasks)) as advance:
        results = parallel_map(
            function, tasks, jobs, (config, data), config, names, smaller=_smaller_batch
        )
        for index, files in results:
            if away:
                shutil.rmtree(stores[missing[index]], ignore_errors=True)  # begun by another run
                write_folder(stores[missing[index]], files)
            advance()
    return _combine(stores, config.loss_gradient_weight)


def feature_batch_size(image_size: int) -> int:
    """Images a batch: large enough to be fast, small enough that activations fit in memory."""
    return 64 if image_size <= 96 else 16


def _smaller_batch(task: tuple) -> tuple:
    """The task of _featurize with a quarter of the images in a batch."""
    checkpoint, m, size, *store = task
    return checkpoint, m, max(1, size // 4), *store


def _featurize_away(config: Config, data: ImageData, checkpoint: Path, m: int, size: int) -> Files:
    """What _featurize leaves in its store, as content: the driver has another disk."""
    with tempfile.TemporaryDirectory() as store:
        _featurize(config, data, checkpoint, m, size, Path(store))
        return read_folder(Path(store))


def _featurize(
    config: Config, data: ImageData, checkpoint: Path, m: int, size: int, store: Path
) -> None:
    """Run traker over one checkpoint: features of the training set, gradients of the targets.

    `size` images a batch change the last bit of the features, and nothing else.
    """
    device = str(resolve_device(config.device))
    traker, state = make_traker(config, len(data.rows("train")), checkpoint, store, m, device)
    traker.load_checkpoint(state, model_id=m)
    for batch in batches_of(config, data, "train", size, device):
        traker.featurize(batch, num_samples=len(batch[1]))
    with _silence_tqdm():
        traker.finalize_features(model_ids=[m])
    traker.start_scoring_checkpoint(TARGETS, state, m, num_targets=len(data.rows(TARGETS)))
    for batch in batches_of(config, data, TARGETS, size, device):
        traker.score(batch, num_samples=len(batch[1]))
    (store / "done").touch()


def make_traker(config: Config, n: int, checkpoint: Path, store: Path, m: int, device: str):  # noqa: ANN201
    """traker's engine with our gradients, projection and scores (or its own, projector=normal).

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
        score_computer=traker_plugins.RidgeScoreComputer,
        proj_dim=config.proj_dim,
        logging_level=logging.ERROR,
        use_half_precision=False,  # its float16 default overflows and rounds
        lambda_reg=config.lambda_reg,
    )
    return traker, model.state_dict()


class _silence_tqdm:
    """traker draws a progress bar for each checkpoint; the driver draws one for all."""

    def __enter__(self) -> None:
        import trak.traker as module

        self.module, self.tqdm = module, module.tqdm
        module.tqdm = lambda iterable, **_: iterable

    def __exit__(self, *_: object) -> None:
        self.module.tqdm = self.tqdm


def _combine(stores: list[Path], weight: str) -> TrakScores:
    """Average the checkpoints' scores; the parts are traker's memory maps, read in turn."""
    values = self_influence = residual = 0.0
    for m, store in enumerate(stores):
        features, gradients, one_minus_p, target_gradients = (
            np.load(store / str(m) / name, mmap_mode="r", allow_pickle=False)
            for name in ("features.mmap", "grads.mmap", "out_to_loss.mmap", f"{TARGETS}_grads.mmap")
        )
        values = values + features @ target_gradients.T
        self_influence = self_influence + np.einsum("ik,ik->i", features, gradients)
        residual = residual + one_minus_p
    values /= len(stores)
    if weight == "mean":
        values *= residual / len(stores)
    if not np.isfinite(values).all():
        raise InputError(
            "scores: not all are finite; raise lambda_reg, or look for a diverged model"
        )
    return TrakScores(values.astype(np.float32), self_influence.astype(np.float32) / len(stores))
