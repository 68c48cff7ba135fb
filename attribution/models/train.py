"""One seeded training loop for everything that is trained here: a model alone, or small ones as one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models import classifier
from attribution.models.batches import Batches
from attribution.models.cuda_graphs import Outputs, Replayed
from attribution.models.predict import classification_metrics, predict
from attribution.runtime.device import autocast, resolve_device
from attribution.runtime.hashing import derive_seed, digest
from attribution.runtime.memory import keep_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Raise it when training would compute something else from the same parameters and data.
TRAINING_VERSION = 2


@lru_cache(maxsize=8)  # it reads every file of a model folder, and one command calls it often
def training_key(config: Config, data: ImageData) -> str:
    """Hash what a trained model depends on, apart from its seed and the examples that it sees."""
    settings = config.group("training") | {"model": classifier.fingerprint(config.model)}
    return digest(TRAINING_VERSION, settings, data.fingerprint)


@dataclass
class Trained:
    """A model as training left it (the best epoch's weights where patience > 0)."""

    model: PreTrainedModel
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0


def train(
    config: Config,
    data: ImageData,
    seed: int,
    keep: np.ndarray,
    on_epoch: Callable[[dict[str, float], nn.Module], None] | None = None,
    validate: bool = True,
    labels: np.ndarray | None = None,
) -> Trained:
    """Train one model on the kept part of the training set.

    Two calls with one seed start from the same weights, and give every example that both keep the
    same augmentation and the same place relative to the others: they differ in `keep` alone.

    Args:
        seed: of weights, order and augmentation.
        keep: (n_train,) bool, which training examples are seen.
        on_epoch: receives each epoch's metrics, and the model as it then is.
        validate: measure validation loss and accuracy each epoch even where patience is 0.
        labels: (n_train,) to train with in place of the data's own, where given.

    Raises:
        InputError: the loss is not finite, or nothing is kept.
    """
    device = _prepare(config)
    kept, steps = np.flatnonzero(keep), _steps(config, keep)
    model = _new_model(config, data, seed, device)
    optimizer, scheduler = make_optimizer(config, model.parameters(), steps * config.epochs)
    batches = Batches(config, data, seed, device, labels)

    def loss_of(draw: torch.Tensor) -> torch.Tensor:
        images, classes = batches.load(draw)
        with autocast(config, device):
            logits = model(images).logits
        return nn.functional.cross_entropy(logits.float(), classes)

    step = _step(loss_of, list(model.parameters()), batches.resident)
    trained, best_loss, best_state = Trained(model), math.inf, None
    for epoch in range(config.epochs):
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once: a GPU runs ahead
        for draw in batches.draws(kept, steps):
            loss = step(draw)
            optimizer.step()
            scheduler.step()
            total += loss.double() * draw.shape[1]
        metrics = {"epoch": epoch, "train_loss": float(total) / len(kept)}
        _check_loss(config, float(total), epoch)
        if validate or config.patience:
            logits = predict(config, model, data, "validation")
            metrics |= classification_metrics(logits, data.labels("validation"), "validation_")
        trained.history.append(metrics)
        if on_epoch:
            on_epoch(metrics, model)
        if config.patience:
            if metrics["validation_log_loss"] < best_loss:
                best_loss, trained.best_epoch = metrics["validation_log_loss"], epoch
                best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            elif epoch - trained.best_epoch >= config.patience:
                break
        else:
            trained.best_epoch = epoch
    optimizer.zero_grad()  # a CUDA graph's memory
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return trained


def train_stacked(
    config: Config,
    data: ImageData,
    seeds: Sequence[int],
    keeps: Sequence[np.ndarray],
    labels: Sequence[np.ndarray | None] | None = None,
) -> list[PreTrainedModel]:
    """Train one model for each (seed, keep) as a single batched model; each equals train()'s.

    Up to rounding, that is: every model has its own weights, order, augmentation and statistics.
    For models so small that the calls of a step cost more than its arithmetic (stacking_pays).
    The size of a stack and the place in it can change a model's last bits, and so, after many steps,
    its figures: a stack is trained as a whole, and always of the same models.

    Args:
        seeds: of each model.
        keeps: (n_train,) bool each, all with equally many examples kept.
        labels: (n_train,) of each model in place of the data's own, where given.

    Raises:
        InputError: as train() does.
    """
    if len(seeds) == 1:  # a stack of one would take other kernels, and differ in the last bit
        twice = None if labels is None else [*labels] * 2
        return train_stacked(config, data, [*seeds] * 2, [*keeps] * 2, twice)[:1]
    device = _prepare(config)
    steps = _steps(config, keeps[0])
    members = [_new_model(config, data, seed, device).train() for seed in seeds]
    weights, buffers = torch.func.stack_module_state(members)
    optimizer, scheduler = make_optimizer(config, weights.values(), steps * config.epochs)
    labels = [None] * len(seeds) if labels is None else labels
    batches = [
        Batches(config, data, seed, device, own) for seed, own in zip(seeds, labels, strict=True)
    ]

    def logits_of(weights: dict, buffers: dict, images: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(members[0], (weights, buffers), (images,)).logits

    forward = torch.vmap(logits_of, randomness="different")
    all_classes = torch.stack([each.labels for each in batches])

    def loss_of(draw: torch.Tensor) -> torch.Tensor:
        images = batches[0].images(draw.flatten(1)).unflatten(0, draw.shape[1:]).contiguous()
        with autocast(config, device):
            logits = forward(weights, buffers, images)
        classes = all_classes.gather(1, draw[0].to(device))
        # The sum over models of each one's mean: their gradients stay apart.
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), classes.flatten())
        return loss * len(seeds)

    step = _step(loss_of, list(weights.values()), batches[0].resident)
    with _without_cudnn(members[0] if device.type == "cuda" else nn.Identity()):
        for epoch in range(config.epochs):
            total = torch.zeros((), device=device)
            parts = (b.draws(np.flatnonzero(k), steps) for b, k in zip(batches, keeps, strict=True))
            for draws in zip(*parts, strict=True):
                total += step(torch.stack(draws, dim=1))
                optimizer.step()
                scheduler.step()
            _check_loss(config, float(total), epoch)
    for i, member in enumerate(members):
        member.load_state_dict({k: v[i] for k, v in (weights | buffers).items()})
        member.eval()
    return members


def stacking_pays(config: Config) -> bool:
    """Whether small models train faster as one: from scratch, with few pixels a step, one pass.

    One AVX-512 core, ms a step of one resnet-mini at batch 32: alone 3.9, in a stack of five 2.9
    and of ten 2.2 at 16 x 16; at 32 x 32 6.3 either way. A GPU gains by it at batch 64 of 32 x 32 too
    (docs/performance.md).
    """
    most = 2**16 if resolve_device(config.device).type == "cuda" else 2**14
    few = config.batch_size * config.image_size**2 <= most
    return few and config.model in classifier.MINI_CONFIGS and not config.patience


def seconds_per_example(config: Config, class_names: tuple[str, ...], flops: int) -> float:
    """What one example of a training step takes in one thread here, in seconds, the best of three.

    On a CPU it is the process's own time, which other work on the machine changes little.

    Args:
        flops: of its forward pass; they bound a processor's batch, so that the trial stays short.
    """
    device, threads = _prepare(config), torch.get_num_threads()
    model = classifier.build(config.model, class_names, 0).train()
    classifier.place(model, device, config.image_size)
    n = config.batch_size
    if device.type == "cpu":
        n = max(2, min(n, 10**11 // (3 * flops)))
    images = torch.zeros(n, 3, config.image_size, config.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(1)
    times, clock = [], time.process_time if device.type == "cpu" else time.perf_counter
    try:
        for _ in range(3):  # the first one warms up
            start = clock()
            with autocast(config, device):
                loss = model(images).logits.float().logsumexp(1).sum()
            loss.backward()
            loss.item()  # waits for a GPU
            times.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times) / n


def _step(
    loss_of: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor], replays: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that leaves the gradients of a draw's loss at the weights, and returns the loss."""

    def step(draw: torch.Tensor) -> Outputs:
        for weight in weights:
            weight.grad = None
        loss = loss_of(draw)
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in weights)]

    run = Replayed(step, weights[0].device) if replays else step

    def take(draw: torch.Tensor) -> torch.Tensor:
        loss, *gradients = run(draw)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        assert loss is not None  # gradients may be missing
        return loss

    return take


@contextmanager
def _without_cudnn(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorms from cuDNN, whose own asks for a memory layout that tensors under vmap do not tell."""

    def plain(forward: Callable[..., Any], *arguments: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return forward(*arguments)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        vars(module)["forward"] = partial(plain, module.forward)
    try:
        yield
    finally:
        for module in norms:
            del vars(module)["forward"]


def _prepare(config: Config) -> torch.device:
    torch.backends.cudnn.deterministic = True  # on a GPU its fastest kernels are not repeatable
    keep_freed_memory()
    return resolve_device(config.device)


def _steps(config: Config, keep: np.ndarray) -> int:
    """Steps of an epoch: BatchNorm needs two examples in every batch."""
    kept = int(keep.sum())
    if kept < 2:
        raise InputError("keep: no training example is left, or a single one; remove fewer")
    return min(math.ceil(kept / config.batch_size), kept // 2)


def _new_model(config: Config, data: ImageData, seed: int, device: torch.device) -> PreTrainedModel:
    model = classifier.build(config.model, data.class_names, derive_seed(seed, "weights"))
    classifier.place(model, device, config.image_size)
    return model


def _check_loss(config: Config, total: float, epoch: int) -> None:
    if not math.isfinite(total):
        raise InputError(
            f"learning_rate={config.learning_rate}: the loss became {total} in epoch {epoch}; "
            "use a smaller one, or precision=float32"
        )


def make_optimizer(
    config: Config, weights: Iterable[torch.Tensor], total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and the schedule of its learning rate over the whole run."""
    optimizer = torch.optim.AdamW(
        weights, config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule: torch.optim.lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    else:
        # One cycle divides by zero where its rise or its fall is one step long: with 1 or 5 steps.
        total_steps += total_steps in (1, 5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=total_steps, pct_start=0.2
        )
    return optimizer, schedule
