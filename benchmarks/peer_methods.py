"""The methods that `peers` compares: one signature for all, each package imported when it is used."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.experiments.ekfac import Analysis, decoded
from attribution.gradients.per_sample import capture, margins
from attribution.models import classifier
from attribution.scores import trak
from attribution.scores.features import featurize, load_checkpoint, run_traker

QUERIES = 1  # targets for measuring the speed of methods that have no separate features


@dataclass(frozen=True)
class Problem:
    """The input of every method: checkpoints, training and validation split, k, ridge.

    Attributes:
        checkpoints: from_pretrained folders.
        work: an empty folder for the files of the method.
        batch: images per batch.
    """

    config: Config
    data: ImageData
    checkpoints: list[Path]
    work: Path
    batch: int = 0

    def tensors(self, split: str) -> tuple[Tensor, Tensor]:
        """Images (n, 3, H, W) and labels (n,) of a split, on the CPU."""
        return decoded(self.config, self.data, split).tensors

    def loader(self, split: str, limit: int | None = None) -> DataLoader:
        """The first `limit` examples of a split, in order and decoded already."""
        images, labels = self.tensors(split)
        return DataLoader(TensorDataset(images[:limit], labels[:limit]), batch_size=self.batch)


@dataclass(frozen=True)
class Scores:
    """The result of a method.

    Attributes:
        values: (n_train, n_targets), positive = helpful.
        self_influence: returns (n_train,), high = suspect; called after the time is taken. None for
            methods without self-influence.
    """

    values: np.ndarray
    self_influence: Callable[[], np.ndarray] | None = None


class Logits(nn.Module):
    """A transformers classifier that returns logits alone, as the peers expect."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def load(folder: Path) -> nn.Module:
    """Load a checkpoint in eval mode and float32."""
    return Logits(classifier.load(folder)).eval()


def head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a model."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


# ---- ours


def ours(problem: Problem, **settings: Any) -> Scores:
    """Our scores under these parameters; one process, like every other method here."""
    config = dataclasses.replace(problem.config, **settings)
    work = problem.work / "features"
    stores = featurize(config, problem.data, problem.checkpoints, work)
    scores = trak.score(config, stores, work / "scores.npy")
    return Scores(np.array(scores.values), lambda: scores.self_influence)


def ours_features(problem: Problem, **settings: Any) -> Callable[[], None]:
    """A function that featurises the training split with the first checkpoint."""
    config, n = dataclasses.replace(problem.config, **settings), len(problem.data.rows("train"))
    model = load_checkpoint(config, problem.checkpoints[0])
    batches, numbers = list(problem.loader("train")), itertools.count()

    def featurize() -> None:
        number = next(numbers)  # traker skips the features of an id that its folder has
        run_traker(config, model, number, batches, n, problem.work / f"ours-{number}")

    return featurize


def _featurizing(problem: Problem, engine: Any, state: dict[str, Tensor]) -> Callable[[], None]:
    batches, numbers = list(problem.loader("train")), itertools.count()

    def featurize() -> None:
        engine.load_checkpoint(state, model_id=next(numbers))  # it skips features of a known id
        for batch in batches:
            engine.featurize(batch, num_samples=len(batch[1]))

    return featurize


# ---- traker


def traker(problem: Problem, ridge: float = 0.0) -> Scores:
    """TRAKer as in its quick start. Its scores are positive = helpful."""
    models_ = [load(folder) for folder in problem.checkpoints]
    engine = _traker(problem, models_[0], ridge)
    states = [model.state_dict() for model in models_]
    states = [{name: value.clone() for name, value in state.items()} for state in states]
    train, targets = problem.loader("train"), problem.loader(TARGETS)
    for m, state in enumerate(states):
        engine.load_checkpoint(state, model_id=m)
        for batch in train:
            engine.featurize(batch, num_samples=len(batch[1]))
    engine.finalize_features()
    for m, state in enumerate(states):
        engine.start_scoring_checkpoint("run", state, m, num_targets=len(targets.dataset))
        for batch in targets:
            engine.score(batch, num_samples=len(batch[1]))
    return Scores(np.array(engine.finalize_scores("run")))


def traker_ridge(problem: Problem) -> Scores:
    """traker with our ridge, in the units of its features."""
    return traker(problem, mean_eigenvalue(problem) * problem.config.proj_dim)


def traker_features(problem: Problem) -> Callable[[], None]:
    """A function that featurises the training split with the first checkpoint."""
    model = load(problem.checkpoints[0])
    engine = _traker(problem, model, 0.0)
    return _featurizing(problem, engine, model.state_dict())


def _traker(problem: Problem, model: nn.Module, ridge: float) -> Any:
    from trak import TRAKer

    logging.getLogger("TRAK").setLevel(logging.ERROR)
    return TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(problem.data.rows("train")),
        save_dir=str(problem.work / "traker"),
        device="cpu",  # a torch.device would be taken for a GPU
        proj_dim=problem.config.proj_dim,
        lambda_reg=ridge,
        use_half_precision=False,  # its float16 default is 10 to 30 times slower on a CPU
        logging_level=logging.ERROR,
    )


def mean_eigenvalue(problem: Problem) -> float:
    """Our ridge in dattri's units: lambda_reg times the mean eigenvalue for features P g / sqrt(p k).

    traker's features are larger by sqrt(k), so its ridge is k times this one. With p parameters and
    P Gaussian (p, k), the expectation of tr(Phi'Phi) / k is sum_i |g_i|^2 / (p k). The gradients are
    those of the first checkpoint; the others differ little.
    """
    model = classifier.load(problem.checkpoints[0])
    images, labels = problem.tensors("train")
    total = 0.0
    for x, y in zip(images.split(64), labels.split(64)):
        gradients = capture(model, x, y).per_sample().values()
        total += sum(float(g.square().sum()) for g in gradients)
    parameters = sum(p.numel() for p in model.parameters())
    return problem.config.lambda_reg * total / (parameters * problem.config.proj_dim)


# ---- dattri


def dattri(problem: Problem, ridge: float = 0.0) -> Scores:
    """TRAKAttributor with the margin as its target. Its scores are positive = helpful."""
    attributor = _dattri(problem, ridge)
    attributor.cache(problem.loader("train"))
    with torch.no_grad():
        values = attributor.attribute(problem.loader(TARGETS))

    def self_influence() -> np.ndarray:
        with torch.no_grad():  # it fails after cache(), so this is another attributor
            found = _dattri(problem, ridge).self_attribute(problem.loader("train"))
        return found.flatten().numpy()

    return Scores(values.numpy(), self_influence)


def dattri_ridge(problem: Problem) -> Scores:
    """dattri with our ridge, in the units of its features."""
    return dattri(problem, mean_eigenvalue(problem))


def dattri_features(problem: Problem) -> Callable[[], None]:
    """A function that calls its cache(): features of the training split, and the solve."""
    loader = problem.loader("train")
    attributor = _dattri(problem, ridge=1.0)  # fewer examples than k: singular without one
    return lambda: attributor.cache(loader)


def _dattri(problem: Problem, ridge: float) -> Any:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = load(problem.checkpoints[0])

    def margin(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        image, label = pair
        logits = torch.func.functional_call(model, params, image.unsqueeze(0))
        return margins(logits, label.unsqueeze(0)).sum()

    def probability(params: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return margin(params, pair).sigmoid()

    task = AttributionTask(
        loss_func=margin,
        model=model,
        checkpoints=[load(folder).state_dict() for folder in problem.checkpoints],
    )
    projector = {"proj_dim": problem.config.proj_dim, "device": "cpu"}
    return TRAKAttributor(task, probability, projector, device="cpu", regularization=ridge)


# ---- captum


def captum(problem: Problem) -> Scores:
    """TracInCPFast: dot products of loss gradients of the last layer; positive lowers the loss."""
    tracin = _captum(problem, problem.loader("train"))
    values = tracin.influence(problem.tensors(TARGETS)).T
    return Scores(values.detach().numpy(), lambda: tracin.self_influence().detach().numpy())


def captum_features(problem: Problem) -> Callable[[], None]:
    """A function that scores a few targets: captum keeps no features of the training split."""
    tracin = _captum(problem, problem.loader("train"))
    targets = next(iter(problem.loader(TARGETS, QUERIES)))

    def run() -> None:
        tracin.influence(tuple(targets))

    return run


def _captum(problem: Problem, loader: DataLoader) -> Any:
    from captum.influence import TracInCPFast

    model = load(problem.checkpoints[0])
    states = {str(folder): load(folder).state_dict() for folder in problem.checkpoints}

    def load_checkpoint(model: nn.Module, folder: str) -> float:
        model.load_state_dict(states[folder])
        return 1.0  # the weight; elsewhere the learning rate, but here each checkpoint is fully trained

    return TracInCPFast(
        model,
        final_fc_layer=head(model),
        train_dataset=loader,
        checkpoints=list(states),
        checkpoints_load_func=load_checkpoint,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )


# ---- kronfluence


def kronfluence(problem: Problem) -> Scores:
    """EK-FAC influence on minus the margin, the mean over checkpoints; positive = helpful."""
    analyses = [_kronfluence(problem, folder) for folder in problem.checkpoints]
    values = 0.0
    for analysis in analyses:
        analysis.fit()
        values = values + analysis.pairwise()

    def self_influence() -> np.ndarray:
        return np.mean([analysis.self_influence() for analysis in analyses], axis=0)

    return Scores(values / len(analyses), self_influence)


def kronfluence_features(problem: Problem) -> Callable[[], float]:
    """A function that fits factors, scores a few targets and returns the seconds of the fixed part."""
    analysis = _kronfluence(problem, problem.checkpoints[0], QUERIES)

    def run() -> float:
        fixed = analysis.fit()
        analysis.pairwise()
        return fixed

    return run


def _kronfluence(problem: Problem, folder: Path, queries: int | None = None) -> Analysis:
    train, targets = (
        problem.loader(split, limit).dataset
        for split, limit in (("train", None), (TARGETS, queries))
    )
    work = problem.work / "kronfluence" / folder.parent.name
    return Analysis(classifier.load(folder), train, targets, problem.batch, work)


# ---- a baseline


def random(problem: Problem) -> Scores:
    """Random numbers."""
    shape = [len(problem.data.rows(split)) for split in ("train", TARGETS)]
    return Scores(np.random.default_rng(0).standard_normal(shape))


@dataclass(frozen=True)
class Method:
    """A method in the comparison.

    Attributes:
        scores: all scores of the problem.
        batch: images per batch when measuring quality: the fastest of those tried.
        note: what a reader has to know for a fair comparison.
        features: prepares the part that grows with the training split, to measure its speed; the
            prepared function returns the seconds of it that do not grow, or None.
        speed: (images per batch, images in all) when measuring speed; each pair is a row.
    """

    scores: Callable[[Problem], Scores]
    batch: int
    note: str = ""
    features: Callable[[Problem], Callable[[], float | None]] | None = None
    speed: tuple[tuple[int, int], ...] = ()


AUTO = {"feature_precision": "auto"}
# fmt: off
METHODS = {
    "ours": Method(ours, 64, "", ours_features, ((16, 32),)),
    "ours-auto": Method(
        partial(ours, **AUTO), 64, "bfloat16 gradients if the hardware computes in it, as for photographs",
        partial(ours_features, **AUTO), ((16, 32),),
    ),
    "one-block": Method(partial(ours, num_blocks=1), 64, "num_blocks=1: one Gram matrix for all layers, as published"),
    "dense": Method(partial(ours, projector="normal"), 64, "traker's gradients and Gaussian projection, our ridge"),
    "traker": Method(
        traker, 256, "lambda_reg 0 (its default); float32 (its default float16 is 10 to 30 times slower on a CPU)",
        traker_features, ((8, 8), (32, 32)),
    ),
    "traker-ridge": Method(traker_ridge, 256, "lambda_reg equal to ours in its units"),
    "dattri": Method(
        dattri, 64, "TRAKAttributor, regularization 0 (its default), on a margin that does not overflow",
        dattri_features, ((32, 32),),
    ),
    "dattri-ridge": Method(dattri_ridge, 64, "regularization equal to ours in its units"),
    "captum": Method(
        captum, 2048, "TracInCPFast: last layer only, loss on loss, all checkpoints weighted 1",
        captum_features, ((32, 32),),
    ),
    "kronfluence": Method(
        kronfluence, 128, "EK-FAC of Conv2d and Linear, not BatchNorm; heuristic damping; for the ResNet-18, "
        "s_per_1000 counts the eigendecomposition once", kronfluence_features, ((8, 8),),
    ),
    "random": Method(random, 1),
}
# fmt: on
