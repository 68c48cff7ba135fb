"""Exact replay (MAGIC): derivatives of final margins through the whole training run, against TRAK."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attribution.gradients.per_sample import margins

if TYPE_CHECKING:
    from attribution.config import Config
    from attribution.data.dataset import ImageData

BETA2 = 0.999


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--replays", type=int, default=8, help="runs, those of the checkpoints")
    parser.add_argument("--targets", type=int, default=48, help="drawn from the validation split")
    parser.add_argument("--subsets", type=int, default=100, help="of half the training set")
    parser.add_argument("--subset_repeats", type=int, default=3, help="models on each")
    parser.add_argument("--batch_size", type=int, default=32, help="of the runs that are replayed")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of them")
    parser.add_argument("--eps", type=float, default=1e-8, help="of their AdamW")
    parser.add_argument("--smooth", action="store_true", help="average pooling, GELU for ReLU")
    parser.add_argument("--cache_dir", default=tempfile.gettempdir() + "/trak-ablation-benchmark")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """LDS of 1, 2, 4, … replays on some targets, less TRAK's from as many checkpoints and from ten.

    The digits of the preset, and its own checkpoints: run m has the seed and the examples of
    checkpoint m. Flags that change how the replayed runs are trained leave bank and TRAK as they are.
    One more derivative a run, of the mean margin by label, ranks examples for the flips' AUROC.
    """
    import dataclasses

    from attribution.config import resolve
    from attribution.data.dataset import load_data
    from attribution.experiments.statistics import (
        detection,
        lds,
        lds_difference,
        predicted_margins,
        slope,
    )
    from attribution.experiments.subset_bank import build_bank
    from attribution.models.batches import batches_of
    from attribution.models.ensemble import subset_masks, train_checkpoints
    from attribution.runtime.hashing import derive_seed, digest
    from attribution.scores.features import TARGETS, featurize
    from attribution.scores.trak import combine

    config = resolve({"preset": "digits", "device": "cpu", "cache_dir": options.cache_dir})
    data, work = load_data(config), Path(options.cache_dir) / "magic"
    n, labels = len(data.rows("train")), data.labels(TARGETS)
    bank = build_bank(config, data, options.subsets, options.subset_repeats, 0.5, work / "bank")
    masks = subset_masks(n, config.num_models, config.subset_fraction, config.seed)
    members = train_checkpoints(config, data, masks, work / "checkpoints")
    stores = featurize(config, data, [member.folder for member in members], work)
    chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[: options.targets])
    actual = bank.margins.mean(axis=1)[:, chosen]
    flipped = data.table("train")["is_flipped"].to_numpy()

    def trak(count: int) -> np.ndarray:
        folder = work / f"trak-{count}"
        folder.mkdir(exist_ok=True)
        settings = config.lambda_reg, "mean", torch.device("cpu"), config.num_blocks
        return combine(stores[:count], folder / "scores.npy", *settings).values[:, chosen]

    own = dataclasses.replace(
        config, batch_size=options.batch_size, learning_rate=options.learning_rate
    )
    by_label = 1 / np.bincount(labels)[labels] / len(data.class_names)
    wanted = torch.from_numpy(np.vstack([np.eye(len(labels))[chosen], by_label]))
    images, _ = next(batches_of(config, data, TARGETS, len(labels), torch.device("cpu")))
    total, seconds, rows = np.zeros((n, len(wanted))), [], []
    settings = options.batch_size, options.learning_rate, options.eps, options.smooth
    for m in range(options.replays):
        file = work / f"{digest(chosen.tolist(), *settings)}-{m}.npz"
        if not file.exists():  # a killed run goes on from here
            start, seed = time.monotonic(), derive_seed(config.seed, "checkpoint", m)
            replay = Replay(own, data, seed, masks[m], eps=options.eps, smooth=options.smooth)
            found = replay.derivatives(images, torch.from_numpy(labels), wanted)
            np.savez(file, found=found, seconds=time.monotonic() - start)
        kept = np.load(file)
        total += kept["found"]
        seconds.append(float(kept["seconds"]))
        if (m + 1) & m and m + 1 < options.replays:
            continue  # neither a power of two nor the last
        mean = total / (m + 1)
        scores = mean[:, :-1]
        row = {"replays": m + 1, "seconds each": float(np.median(seconds))}
        row |= {"lds": float(np.nanmean(lds(scores, bank.masks, actual)))}
        for count in dict.fromkeys((m + 1, config.num_models)):
            less = lds_difference(scores, trak(count), bank.masks, actual)
            text = f"{less.mean:+.3f} [{less.ci_low:+.3f}, {less.ci_high:+.3f}]"
            row["less trak of ten" if count == config.num_models else "less trak of as many"] = text
        row["slope"] = slope(predicted_margins(scores, bank.masks), actual)
        rows.append(row | {"auroc": detection(flipped, mean[:, -1], draws=0)["auroc"]})
    return rows


class _Norm(nn.Module):
    """BatchNorm2d whose statistics of the batch stay in the graph, in `seen`."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.momentum = norm.momentum
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            n = x.numel() / x.shape[1]
            self.seen = torch.cat([mean, variance * n / (n - 1)])
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


@dataclass
class _Step:
    """A step's batch and settings, and the state before it: weights, first and second moments (P,)."""

    images: Tensor
    positions: Tensor
    labels: Tensor
    lr: float
    beta1: float
    corrections: tuple[float, float]  # 1 - beta^t of the two moments
    state: tuple[Tensor, Tensor, Tensor] = ()  # type: ignore[assignment]


class Replay:
    """A run of training.train, kept step by step, and what can be derived by going back through it.

    Ilyas and Engstrom 2025, "MAGIC: Near-Optimal Data Attribution for Deep Learning": with w_i the
    weight of example i's loss in every batch that holds it (1 in training), the derivative of a
    function of the trained model by w, exactly, by reverse accumulation over all steps of AdamW. The
    chain rule's product with a step is one double backward pass; BatchNorm's statistics, those of the
    batch and the running ones, are in the graph. Memory: 3 numbers a parameter and step.

    Args:
        seed, keep: as of training.train; the model is it up to rounding.
        weights: (n_train,) w; ones where left out.
        eps: AdamW's.
        smooth: average pooling in the stem, and GELU in place of ReLU: another model.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        seed: int,
        keep: np.ndarray,
        weights: np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
        eps: float = 1e-8,
        smooth: bool = False,
    ) -> None:
        from attribution.models import classifier
        from attribution.runtime.hashing import derive_seed

        self.decay, self.eps, self.n = config.weight_decay, eps, len(keep)
        model = classifier.build(config.model, data.class_names, derive_seed(seed, "weights"))
        self.norms: list[_Norm] = []
        self._prepare(model, smooth)
        self.model = model.to(dtype)
        self.parameters = {name: p.shape for name, p in model.named_parameters()}
        self.buffers = {name: b.shape for name, b in model.named_buffers()}
        given = np.ones(self.n) if weights is None else weights
        self.weights = torch.from_numpy(given).to(dtype)
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        statistics = torch.cat([b.flatten() for b in model.buffers()])
        state = theta, torch.zeros_like(theta), torch.zeros_like(theta)
        self.steps: list[_Step] = []
        for step in _steps(config, data, seed, keep, dtype):
            step.state = state
            self.steps.append(step)
            leaf = theta.clone().requires_grad_()
            loss, seen = self._loss(leaf, step, self.weights[step.positions])
            (gradient,) = torch.autograd.grad(loss, leaf)
            statistics = torch.lerp(statistics, seen.detach(), self.momentum)
            m, v, root = self._moments(step, gradient)
            theta = theta * (1 - step.lr * self.decay)
            theta = theta - step.lr / step.corrections[0] * m / (root + eps)
            state = theta, m, v
        self.theta, self.statistics = theta, statistics

    def _prepare(self, module: nn.Module, smooth: bool) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                self.norms.append(_Norm(child))
                setattr(module, name, self.norms[-1])
                self.momentum = child.momentum
            elif smooth and isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
            elif smooth and isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            else:
                self._prepare(child, smooth)

    def _logits(self, theta: Tensor, images: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Logits (B, C) with the batch's statistics, or in eval mode with running ones."""
        state = _shaped(theta, self.parameters)
        if statistics is not None:
            state |= _shaped(statistics, self.buffers)
        self.model.train(statistics is None)
        return torch.func.functional_call(self.model, state, (images,)).logits

    def _loss(self, theta: Tensor, step: _Step, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The step's loss () and the statistics of its batch, in the order of the buffers."""
        logits = self._logits(theta, step.images)
        each = nn.functional.cross_entropy(logits, step.labels, reduction="none")
        return (weights * each).mean(), torch.cat([norm.seen for norm in self.norms])

    def _moments(self, step: _Step, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """AdamW's moments after a step, and the root of the second one without its bias."""
        _, m, v = step.state
        m = torch.lerp(m, gradient, 1 - step.beta1)
        v = BETA2 * v + (1 - BETA2) * gradient.square()
        return m, v, (v / step.corrections[1]).sqrt()

    def margins(self, images: Tensor, labels: Tensor) -> Tensor:
        """Margins (B,) of the trained model, which is in eval mode."""
        images = images.to(self.theta.dtype)
        return margins(self._logits(self.theta, images, self.statistics), labels)

    def derivatives(self, images: Tensor, labels: Tensor, wanted: Tensor) -> np.ndarray:
        """d (wanted @ margins) / d w, (n_train, K) float64; positive = helpful, 0 where not seen.

        Args:
            images, labels: of B targets.
            wanted: (K, B), the combinations of their margins to derive.
        """
        wanted = wanted.to(self.theta.dtype)
        theta, statistics = (x.clone().requires_grad_() for x in (self.theta, self.statistics))
        found = margins(self._logits(theta, images.to(theta.dtype), statistics), labels)
        # The derivatives by the state after the step that is gone back through.
        ends = torch.autograd.grad(found, (theta, statistics), wanted, is_grads_batched=True)
        by_theta, by_statistics = ends
        by_m, by_v = torch.zeros_like(by_theta), torch.zeros_like(by_theta)
        by_weight = np.zeros((self.n, len(wanted)))
        for step in reversed(self.steps):
            leaf = step.state[0].clone().requires_grad_()
            weights = self.weights[step.positions].requires_grad_()
            loss, seen = self._loss(leaf, step, weights)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            g = gradient.detach()
            m, _, root = self._moments(step, g)
            rate = step.lr / step.corrections[0]
            by_m = by_m - by_theta * rate / (root + self.eps)
            slope = rate * m / (root + self.eps).square() / (2 * step.corrections[1] * root)
            # Where the root is zero every gradient so far was, and so is every derivative by it.
            by_v = by_v + by_theta * torch.where(root > 0, slope, 0)
            by_gradient = (1 - step.beta1) * by_m + 2 * (1 - BETA2) * g * by_v
            by_seen = self.momentum * by_statistics
            by_leaf, by_weights = torch.autograd.grad(
                (gradient, seen), (leaf, weights), (by_gradient, by_seen), is_grads_batched=True
            )
            by_weight[step.positions.numpy()] += by_weights.T.double().numpy()
            by_theta = (1 - step.lr * self.decay) * by_theta + by_leaf
            by_m, by_v = step.beta1 * by_m, BETA2 * by_v
            by_statistics = (1 - self.momentum) * by_statistics
        return by_weight


def _shaped(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def _steps(
    config: Config, data: ImageData, seed: int, keep: np.ndarray, dtype: torch.dtype
) -> list[_Step]:
    """The steps of training.train: the same batches, learning rates and momenta."""
    from attribution.models import train as training
    from attribution.models.batches import Batches

    kept, a_step = np.flatnonzero(keep), training._steps(config, keep)
    positions = np.arange(len(keep))
    batches = Batches(config, data, seed, torch.device("cpu"), positions)
    labels = torch.from_numpy(data.labels("train"))
    nothing = [torch.zeros(1, requires_grad=True)]
    optimizer, scheduler = training.make_optimizer(config, nothing, a_step * config.epochs)
    steps = []
    for _ in range(config.epochs):
        for images, rows in batches(kept, a_step):
            group, t = optimizer.param_groups[0], len(steps) + 1
            beta1 = group["betas"][0]
            corrections = 1 - beta1**t, 1 - BETA2**t
            batch = images.to(dtype), rows, labels[rows]
            steps.append(_Step(*batch, group["lr"], beta1, corrections))
            optimizer.step()
            scheduler.step()
    return steps
