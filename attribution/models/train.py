"""The training loop, for one model or for a stack of small models that are trained as one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import classifier, frozen, memory_layout, pretrained
from attribution.models.batches import Batches
from attribution.models.predict import classification_metrics, predict
from attribution.runtime.device import autocast, keep_freed_memory, one_thread, resolve_device
from attribution.runtime.hashing import derive_seed, digest
from attribution.runtime.progress import noting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Raise it when the same parameters and data would give another model, or the finetune stage other
# artifacts.
TRAINING_VERSION = 3


@lru_cache(maxsize=8)  # it reads every file of a model folder, and one command calls it often
def training_key(config: Config, data: ImageData) -> str:
    """Hash what a trained model depends on, apart from its seed and the examples that it sees."""
    settings = config.group("training") | {"model": pretrained.fingerprint(config.model)}
    return digest(TRAINING_VERSION, settings, data.fingerprint)


@dataclass
class Trained:
    """A trained model, with the weights of its best epoch where patience is above 0.

    Attributes:
        history: the metrics of each epoch.
    """

    model: PreTrainedModel
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    config: Config,
    data: ImageData,
    seed: int,
    keep: np.ndarray,
    on_epoch: Callable[[dict[str, float], nn.Module], None] | None = None,
    validate: bool = True,
    labels: np.ndarray | None = None,
) -> Trained:
    """Train one model on a part of the training set.

    Two calls with the same seed start from the same weights, and give every example that both keep
    the same augmentation and the same place relative to the others: they differ only in `keep`.

    Args:
        seed: of the weights, order and augmentation.
        keep: (n_train,) bool, the training examples that the model sees.
        on_epoch: called with each epoch's metrics and the model after that epoch.
        validate: whether to measure validation metrics each epoch although patience is 0.
        labels: (n_train,) labels to train with in place of the data's.

    Raises:
        InputError: the loss is not finite, or fewer than two examples are kept.
    """
    device = _prepare(config)
    kept, steps = np.flatnonzero(keep), steps_per_epoch(config, keep)
    model = new_model(config, data, seed, device)
    parts = classifier.freeze(model, config.model, config.train_layers)
    weights = [p for p in model.parameters() if p.requires_grad]
    batches = _batches(config, data, seed, device, labels)
    skipping = None
    if config.augment == "none":
        skipping = frozen.stored_logits(config, data, model, "train")

    def loss_of(draw: Tensor) -> Tensor:
        images, classes = (draw[0], batches.labels[draw[0]]) if skipping else batches.load(draw)
        with autocast(config, device):
            logits = skipping(images) if skipping else model(images).logits
        return nn.functional.cross_entropy(logits.float(), classes)

    optimizer, scheduler = make_optimizer(config, weights, steps * config.epochs)
    step = _gradient_step(loss_of, weights, model.buffers(), batches)
    trained, best_weights = Trained(model), None
    for epoch in range(config.epochs):
        for part in parts:
            part.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for draw in batches.draws(kept, steps):
            total += step(draw).double() * draw.shape[1]
            optimizer.step()
            scheduler.step()
        metrics = {"epoch": epoch, "train_loss": _finite(config, total, epoch) / len(kept)}
        if validate or config.patience:
            logits = predict(config, model, data, "validation")
            metrics |= classification_metrics(logits, data.labels("validation"), "validation_")
        trained.history.append(metrics)
        if on_epoch:
            on_epoch(metrics, model)
        if config.patience:
            best = int(np.argmin([row["validation_log_loss"] for row in trained.history]))
            if best == epoch:
                best_weights = {k: v.clone() for k, v in model.state_dict().items()}
            elif epoch - best >= config.patience:
                break
    if best_weights:
        model.load_state_dict(best_weights)
    model.zero_grad()  # gradients may lie in the memory of a CUDA graph
    model.eval()
    return trained


@contextmanager
def noting_epochs(
    config: Config, file: str, name: str = ""
) -> Iterator[Callable[[dict[str, float], nn.Module], None]]:
    """Yield an `on_epoch` of train() that notes the finished epochs, see runtime.progress.noting.

    Args:
        name: of what is trained; the file's own if it is empty.
    """
    with noting(file) as note:
        shown = name or Path(file).name
        yield lambda metrics, _: note(f"{shown}: epoch {metrics['epoch'] + 1}/{config.epochs}")


def train_stacked(
    config: Config,
    data: ImageData,
    seeds: Sequence[int],
    keeps: Sequence[np.ndarray],
    labels: Sequence[np.ndarray | None] | None = None,
) -> list[PreTrainedModel]:
    """Train one model for each (seed, keep) as a single batched model; up to rounding each is train()'s.

    Every model has its own weights, order, augmentation and statistics. This is faster for models
    so small that the calls of a step cost more than its arithmetic (see stacking_pays). The size of
    the stack and a model's place in it can change that model's last bits: always train the same
    models together.

    Args:
        seeds: of each model.
        keeps: (n_train,) bool of each model, all with equally many examples kept.
        labels: (n_train,) of each model in place of the data's; None entries take the data's.

    Raises:
        InputError: as train() does.
    """
    labels = [None] * len(seeds) if labels is None else labels
    if len(seeds) == 1:  # other kernels, with other last bits, would run for a stack of one
        return train_stacked(config, data, [*seeds] * 2, [*keeps] * 2, [*labels] * 2)[:1]
    device, steps = _prepare(config), steps_per_epoch(config, keeps[0])
    members = [new_model(config, data, seed, device).train() for seed in seeds]
    weights, buffers = torch.func.stack_module_state(members)
    batches = [
        _batches(config, data, seed, device, own) for seed, own in zip(seeds, labels, strict=True)
    ]
    forward = torch.vmap(_stateless(members[0], device), randomness="different")
    all_labels = torch.stack([each.labels for each in batches])

    def loss_of(draw: Tensor) -> Tensor:
        images = batches[0].images(draw.flatten(1)).unflatten(0, draw.shape[1:]).contiguous()
        with autocast(config, device):
            logits = forward(weights, buffers, images)
        classes = all_labels.gather(1, draw[0].to(device))
        # A sum over models of each model's mean loss: no gradient reaches another model.
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), classes.flatten())
        return loss * len(seeds)

    optimizer, scheduler = make_optimizer(config, weights.values(), steps * config.epochs)
    step = _gradient_step(loss_of, weights.values(), buffers.values(), batches[0])
    kept = [np.flatnonzero(keep) for keep in keeps]
    for epoch in range(config.epochs):
        total = torch.zeros((), device=device)
        draws = [own.draws(rows, steps) for own, rows in zip(batches, kept, strict=True)]
        for parts in zip(*draws, strict=True):
            total += step(torch.stack(parts, dim=1))
            optimizer.step()
            scheduler.step()
        _finite(config, total, epoch)
    for i, member in enumerate(members):
        member.load_state_dict({k: v[i] for k, v in (weights | buffers).items()})
        member.eval()
    return members


def _stateless(model: nn.Module, device: torch.device) -> Callable[..., Tensor]:
    """Return the model as a function of its weights, its buffers and images (B, 3, H, W)."""
    if device.type == "cuda":
        from attribution.models.cuda_graphs import without_cudnn

        model = without_cudnn(model)

    def logits_of(weights: dict, buffers: dict, images: Tensor) -> Tensor:
        return torch.func.functional_call(model, (weights, buffers), (images,)).logits

    return logits_of


def _gradient_step(
    loss_of: Callable[[Tensor], Tensor],
    weights: Iterable[Tensor],
    buffers: Iterable[Tensor],
    batches: Batches,
) -> Callable[[Tensor], Tensor]:
    """Return a function that leaves the gradients of a draw's loss at the weights and returns the loss."""
    weights = list(weights)

    def step(draw: Tensor) -> Tensor:
        for weight in weights:
            weight.grad = None
        loss = loss_of(draw)
        loss.backward()
        return loss.detach()

    if not batches.is_resident:
        return step
    from attribution.models.cuda_graphs import ReplayedStep

    return ReplayedStep(step, weights, buffers, batches.labels.device)


def _batches(
    config: Config, data: ImageData, seed: int, device: torch.device, labels: np.ndarray | None
) -> Batches:
    if device.type == "cuda" and config.cuda_graphs == "on":
        from attribution.models.cuda_graphs import ResidentBatches, images_on_gpu

        if (images := images_on_gpu(data, device)) is not None:
            return ResidentBatches(images, config, data, seed, device, labels)
    return Batches(config, data, seed, device, labels)


def stacking_pays(config: Config) -> bool:
    """Whether models train faster as one stack: small ones without early stopping, on few pixels a step.

    A step on fewer pixels costs more in calls than in arithmetic; docs/performance.md has the
    measurements behind the limits.
    """
    most = 2**16 if resolve_device(config.device).type == "cuda" else 2**14
    has_few_pixels = config.batch_size * config.image_size**2 <= most
    return has_few_pixels and config.model in pretrained.MINI_CONFIGS and not config.patience


def seconds_per_example(
    config: Config, class_names: tuple[str, ...], flops: int, whole: bool = False
) -> float:
    """Measure the seconds of a training step per example with one thread, the median of three.

    Where other processes want the cores too, a step takes longer by what it waits for them.

    Args:
        flops: of the forward pass of one image; they limit the batch on a CPU, which keeps the trial
            short.
        whole: whether frozen layers run too, although training skips them.
    """
    device = _prepare(config)
    model = classifier.build(config.model, class_names, 0)
    parts = classifier.freeze(model, config.model, config.train_layers)
    memory_layout.place(model, device, config.image_size)
    n = config.batch_size
    if device.type == "cpu":
        n = max(2, min(n, 10**11 // (3 * flops)))
    images = torch.zeros(n, 3, config.image_size, config.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    rest = None if whole or config.augment != "none" else frozen.Rest.of(config, model, images)
    inputs = rest.received(images) if rest else images
    for part in parts:
        part.train()
    times = []
    with one_thread():
        for _ in range(3):
            start = time.perf_counter()
            with autocast(config, device):
                logits = rest(inputs) if rest else model(images).logits
                loss = logits.float().logsumexp(1).sum()
            loss.backward()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - start)
    return sorted(times)[1] / n


def _prepare(config: Config) -> torch.device:
    torch.backends.cudnn.deterministic = True  # on a GPU its fastest kernels are not repeatable
    keep_freed_memory()
    return resolve_device(config.device)


def steps_per_epoch(config: Config, keep: np.ndarray) -> int:
    """Return the number of steps in an epoch; every batch has two examples at least, for BatchNorm."""
    kept = int(keep.sum())
    if kept < 2:
        raise InputError(
            f"keep: leaves {kept} training examples, and training needs 2; remove fewer"
        )
    return min(math.ceil(kept / config.batch_size), kept // 2)


def new_model(config: Config, data: ImageData, seed: int, device: torch.device) -> PreTrainedModel:
    model = classifier.build(config.model, data.class_names, derive_seed(seed, "weights"))
    memory_layout.place(model, device, config.image_size)
    return model


def _finite(config: Config, total: Tensor, epoch: int) -> float:
    """Return the summed loss of an epoch; reading it once an epoch lets a GPU run ahead."""
    if not math.isfinite(total):
        raise InputError(
            f"learning_rate={config.learning_rate}: the loss became {float(total)} in epoch {epoch}; "
            "use a smaller learning rate, or precision=float32"
        )
    return float(total)


def make_optimizer(
    config: Config, weights: Iterable[Tensor], total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW and the schedule of its learning rate over the whole training."""
    optimizer = torch.optim.AdamW(
        weights, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule: torch.optim.lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    else:
        # OneCycleLR divides by zero where a phase is one step long, as with 1 or 5 steps.
        total_steps += 1 if total_steps in (1, 5) else 0
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=total_steps, pct_start=0.2
        )
    return optimizer, schedule
