"""Exact attribution for one model whose head alone was trained: margins derived through all its training steps.

Ilyas and Engstrom 2025, "MAGIC: Near-Optimal Data Attribution for Deep Learning".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.data.transforms import to_batch
from attribution.errors import InputError
from attribution.gradients.per_sample import margins
from attribution.models import classifier, frozen, model_facts, pretrained
from attribution.models.batches import Batches
from attribution.models.checkpoints import checkpoint_name
from attribution.models.ensemble import Ensemble
from attribution.models.train import make_optimizer, new_model, steps_per_epoch
from attribution.runtime.device import autocast, one_thread, resolve_precision
from attribution.runtime.hashing import derive_seed

CPU = torch.device("cpu")
NEEDED = {
    "checkpoints": "", "device": "cpu", "train_layers": "head", "augment": "none", "patience": 0,
    "checkpoint_epochs": "",
}  # fmt: skip
MOST_BYTES = 2**32  # of the graph through all steps
REMOVALS, SHARE = 20, 0.05  # random ones that the derivative is checked by


def check(config: Config, data: ImageData) -> None:
    """Refuse training that cannot be derived through, before anything is trained.

    Raises:
        InputError: more than one linear head is trained, or a parameter of NEEDED has another value,
            or the steps take more than MOST_BYTES.
    """
    for name, value in NEEDED.items():
        if (own := getattr(config, name)) != value:
            wanted = f"{name}={value}" if value != "" else f"no {name}"
            raise InputError(f"{name}={own}: exact=yes needs {wanted}; leave exact out to use TRAK")
    heads = pretrained.heads(config.model)
    if len(heads) != 1:
        raise InputError(f"model={config.model}: exact=yes needs one linear head, not {len(heads)}")
    head = cast(nn.Linear, pretrained.skeleton(config.model).get_submodule(heads[0]))
    steps = config.epochs * len(data.rows("train")) * config.subset_fraction / config.batch_size
    size = 4 * steps * head.in_features * (config.batch_size + 12 * len(data.class_names))
    if size > MOST_BYTES:
        raise InputError(
            f"epochs={config.epochs}: exact=yes would need {size / 2**30:.0f} GiB for its {steps:.0f} "
            f"steps, more than {MOST_BYTES / 2**30:.0f}; leave exact out to use TRAK"
        )


@dataclass(frozen=True)
class Run:
    """A checkpoint's training, which can be repeated with weights of its examples.

    Attributes:
        name: of the checkpoint.
        keep: (n_train,) bool, the examples that it saw.
        start: weight (C, d) and bias (C,) of its head before training.
        inputs, labels: of the head, for the training set: (n_train, d), (n_train,).
        steps: of each the positions of its batch (B,), the learning rate, and AdamW's two betas.
        rest: the head's model.
    """

    config: Config
    name: str
    keep: np.ndarray
    start: list[Tensor]
    inputs: Tensor
    labels: Tensor
    steps: list[tuple[Tensor, float, float, float]]
    rest: frozen.Rest

    @classmethod
    def of(cls, config: Config, data: ImageData, members: Ensemble, m: int) -> Run:
        """Find the run that left checkpoint m, and check that it does.

        Raises:
            InputError: its head cannot be trained alone, or comes out with other predictions.
        """
        seed, keep = derive_seed(config.seed, "checkpoint", m), members.masks[m]
        model = new_model(config, data, seed, CPU).eval()
        head = classifier.freeze(model, config.model, config.train_layers)[0]
        own = frozen.stored_inputs(config, data, model, "train")
        others = frozen.stored_inputs(config, data, model, TARGETS)
        if not (own and others):
            raise InputError(f"model={config.model}: exact=yes cannot run its head alone")
        (rest, inputs), (_, targets) = own, others
        start = [p.detach() for p in head.parameters()]
        labels = torch.from_numpy(data.labels("train"))
        steps = list(_steps(config, data, seed, keep))
        run = cls(config, checkpoint_name(m), keep, start, inputs, labels, steps, rest)
        logits = run.logits(run.trained(torch.ones(len(keep))), targets).detach().numpy()
        wanted = members.validation_logits[m]
        error = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
        if error > frozen.TOLERANCE[resolve_precision(config.precision, CPU)]:
            raise InputError(
                f"exact=yes: {run.name} trained again predicts otherwise (a logit by {error:.1%}); make the "
                "scores on this machine, with these versions"
            )
        return run

    def logits(self, head: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Logits (B, C) float of what the head receives, (B, d)."""
        with autocast(self.config, CPU):
            logits = F.linear(inputs, *head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def received(self, pixels: np.ndarray) -> Tensor:
        """What the head receives for images, uint8 (B, H, W, 3): (B, d)."""
        images = to_batch(pixels, *model_facts.normalisation(self.config.model))
        with autocast(self.config, CPU):
            return self.rest.received(images)

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities of the checkpoint, (1, C), for an image uint8 (size, size, 3)."""
        head = self.trained(torch.ones(len(self.keep)))
        return self.logits(head, self.received(pixels[None])).softmax(1).detach().numpy()

    @one_thread()  # the matrices are small: threads would mostly wait for one another
    def trained(self, weights: Tensor) -> list[Tensor]:
        """Train the head; the result can be derived by the weights if they require gradients.

        Every batch has the loss sum_i weights_i loss_i / B, over its B examples.

        Args:
            weights: (n_train,) of the examples; ones give the checkpoint.
        """
        decay, is_derived = self.config.weight_decay, weights.requires_grad
        head = [p.clone().requires_grad_() for p in self.start]
        first = second = [torch.zeros_like(p) for p in head]
        for t, (rows, rate, beta1, beta2) in enumerate(self.steps, 1):
            logits = self.logits(head, self.inputs[rows])
            losses = F.cross_entropy(logits, self.labels[rows], reduction="none")
            loss = (weights[rows] * losses).mean()
            gradients = torch.autograd.grad(loss, head, create_graph=is_derived)
            first = [m.lerp(g, 1 - beta1) for m, g in zip(first, gradients, strict=True)]
            second = [v.lerp(g.square(), 1 - beta2) for v, g in zip(second, gradients, strict=True)]
            head = [
                p * (1 - rate * decay)
                - rate / (1 - beta1**t) * m / (_root(v / (1 - beta2**t)) + 1e-8)
                for p, m, v in zip(head, first, second, strict=True)
            ]
            if not is_derived:
                head = [p.detach().requires_grad_() for p in head]
        return head

    def margins(self, weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Margins (K,) of K targets after training with these weights."""
        return margins(self.logits(self.trained(weights), inputs), labels)

    @one_thread()
    def derivatives(self, inputs: Tensor, labels: Tensor) -> np.ndarray:
        """Derivative of each target's margin by each example's weight, (n_train, K); positive = helpful.

        Args:
            inputs, labels: of K targets, (K, d) and (K,).
        """
        weights = torch.ones(len(self.keep), dtype=self.start[0].dtype, requires_grad=True)
        found = self.margins(weights, inputs, labels)
        rows = [torch.autograd.grad(f, weights, retain_graph=True)[0].numpy() for f in found]
        return np.stack(rows, axis=1)

    def changes(self, removed: Iterable[np.ndarray], inputs: Tensor, labels: Tensor) -> np.ndarray:
        """Measured changes of the margins (R, K) where the examples at R lists of positions weigh 0."""
        ones = torch.ones(len(self.keep), dtype=self.start[0].dtype)
        whole = self.margins(ones, inputs, labels)
        found = [
            self.margins(ones.index_fill(0, torch.tensor(gone), 0), inputs, labels) - whole
            for gone in removed
        ]
        return torch.stack(found).detach().numpy()


def findings(
    run: Run, values: np.ndarray, parts: Sequence[np.ndarray], inputs: Tensor, labels: Tensor
) -> list[str]:
    """Train a run again without examples, and say for each of K targets what that shows.

    Args:
        values: (n_train, K), derivatives.
        parts: for each target, positions that are left out.
        inputs, labels: as of Run.derivatives.
    """
    random = random_removals(run)
    changes = run.changes([*parts, *random], inputs, labels)
    rho = agreement(values, random, changes[len(parts) :])
    return [
        f"Checked by training {run.name} again with the same seed: without the {len(part)} helpful images "
        f"shown, its margin changes by {changes[i, i]:+.2g} (predicted {-values[part, i].sum():+.2g}). "
        f"Over {REMOVALS} random removals of {100 * SHARE:g} % of its images, predicted and measured "
        f"changes have a rank correlation of {rho[i]:.2f}"
        for i, part in enumerate(parts)
    ]


def random_removals(run: Run) -> list[np.ndarray]:
    """Draw REMOVALS random parts of the examples that a run saw, each a SHARE of them."""
    rng = np.random.default_rng(derive_seed(run.config.seed, "exact"))
    seen = np.flatnonzero(run.keep)
    size = max(1, round(SHARE * len(seen)))
    return [rng.choice(seen, size, replace=False) for _ in range(REMOVALS)]


def agreement(
    values: np.ndarray, removed: Sequence[np.ndarray], measured: np.ndarray
) -> np.ndarray:
    """Spearman's correlation over removals of predicted and measured changes, (K,).

    Args:
        values: (n_train, K), derivatives.
        removed, measured: R lists of positions, and the changes (R, K).
    """
    predicted = np.stack([-values[gone].sum(axis=0) for gone in removed])
    pairs = zip(predicted.T, measured.T, strict=True)
    return np.array([spearmanr(*pair).statistic for pair in pairs])


def _root(x: Tensor) -> Tensor:
    """The square root with derivative 0 at 0: there every gradient so far was 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)


def _steps(
    config: Config, data: ImageData, seed: int, keep: np.ndarray
) -> Iterable[tuple[Tensor, float, float, float]]:
    """The batches and settings of train()'s steps."""
    batches, count = Batches(config, data, seed, CPU), steps_per_epoch(config, keep)
    nothing = torch.zeros(1, requires_grad=True)
    optimizer, scheduler = make_optimizer(config, [nothing], count * config.epochs)
    for _ in range(config.epochs):
        for draw in batches.draws(np.flatnonzero(keep), count):
            group = optimizer.param_groups[0]
            yield draw[0], group["lr"], *group["betas"]
            optimizer.step()
            scheduler.step()
