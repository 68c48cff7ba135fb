"""The methods that `peers` sets side by side, each behind one signature and imported when it is called."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.gradients.per_sample import capture, margins
from attribution.models import classifier
from attribution.models.batches import batches_of
from attribution.scores import trak
from attribution.scores.features import make_traker

QUERY_BATCH = 128  # kronfluence keeps a gradient of each target of a batch
QUERIES = 1  # targets, in a measure of speed, of the methods that cannot do without any


@dataclass(frozen=True)
class Problem:
    """What every method gets alike: the model's checkpoints, train and validation split, k, ridge.

    Attributes:
        checkpoints: from_pretrained folders.
        work: an empty folder for what a method keeps on disk.
        batch: images a batch; 0 is the method's own choice in METHODS.
    """

    config: Config
    data: ImageData
    checkpoints: list[Path]
    work: Path
    batch: int = 0

    def having(self, **settings: Any) -> Problem:
        """The same under other settings of the project's own."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **settings))

    def tensors(self, split: str) -> tuple[Tensor, Tensor]:
        """Images (n, 3, H, W) and labels (n,) of a split, on the CPU."""
        batches = batches_of(self.config, self.data, split, 4096, torch.device("cpu"))
        images, labels = zip(*batches)
        return torch.cat(images), torch.cat(labels)

    def loader(self, split: str, limit: int | None = None) -> DataLoader:
        """The first `limit` examples of a split, in order and decoded beforehand."""
        images, labels = self.tensors(split)
        return DataLoader(TensorDataset(images[:limit], labels[:limit]), batch_size=self.batch)


@dataclass(frozen=True)
class Scores:
    """What a method says.

    Attributes:
        values: (n_train, n_targets), positive = helpful.
        self_influence: gives (n_train,), high = suspect, where the method has one; called after
            the clock has stopped.
    """

    values: np.ndarray
    self_influence: Callable[[], np.ndarray] | None = None


class Logits(nn.Module):
    """A transformers classifier as the function from images to logits that the peers expect."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def load(folder: Path) -> nn.Module:
    """A checkpoint in eval mode and float32, giving logits."""
    return Logits(classifier.load(folder)).eval()


def head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a model."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


# ---- ours


def ours(problem: Problem) -> Scores:
    """The project's own path: hooks, sketch, ridge; one process, like every other method here."""
    scores = trak.compute_scores(
        problem.config, problem.data, problem.checkpoints, problem.work / "features"
    )
    return Scores(np.array(scores.values), lambda: scores.self_influence)


def dense(problem: Problem) -> Scores:
    """traker's exact gradients and dense Gaussian projection under our ridge: the sketch's loss."""
    return ours(problem.having(projector="normal"))


def one_block(problem: Problem) -> Scores:
    """ours with one Gram matrix for all layers, as TRAK was published: what the peers have."""
    return ours(problem.having(num_blocks=1))


def ours_features(problem: Problem) -> Callable[[], None]:
    """Featurising the training split with the first checkpoint, ready to be timed."""
    n = len(problem.data.rows("train"))
    engine, state = make_traker(
        problem.config, n, problem.checkpoints[0], problem.work / "ours", 0, "cpu"
    )
    return _featurizing(problem, engine, state)


def ours_auto(problem: Problem) -> Scores:
    """ours, with gradients as presets images and food101 take them: bfloat16 where there is any."""
    return ours(problem.having(feature_precision="auto"))


def ours_auto_features(problem: Problem) -> Callable[[], None]:
    """ours_features, with the same gradients."""
    return ours_features(problem.having(feature_precision="auto"))


def _featurizing(problem: Problem, engine: Any, state: dict[str, Tensor]) -> Callable[[], None]:
    batches, numbers = list(problem.loader("train")), iter(range(1 << 30))

    def featurize() -> None:
        engine.load_checkpoint(state, model_id=next(numbers))  # anew: it skips what is done
        for batch in batches:
            engine.featurize(batch, num_samples=len(batch[1]))

    return featurize


# ---- traker


def traker(problem: Problem, ridge: float = 0.0) -> Scores:
    """TRAKer as its quick start uses it; its scores are positive = helpful already."""
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
    """traker with the ridge that ours uses, in the units of its features."""
    return traker(problem, mean_eigenvalue(problem) * problem.config.proj_dim)


def traker_features(problem: Problem) -> Callable[[], None]:
    """Featurising the training split with the first checkpoint, ready to be timed."""
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
    """lambda_reg times the mean eigenvalue, for features P g / sqrt(p k): dattri's; traker's is k times it.

    With p parameters and P Gaussian (p, k), tr(Phi'Phi)/k is sum_i |g_i|^2 / (p k) in the mean.
    The gradients are those of the first checkpoint; the others' differ by little.
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
    """TRAKAttributor with the margin as its target; positive = helpful already."""
    attributor = _dattri(problem, ridge)
    attributor.cache(problem.loader("train"))
    with torch.no_grad():
        values = attributor.attribute(problem.loader(TARGETS))

    def self_influence() -> np.ndarray:
        with torch.no_grad():  # without a cache: with one it fails
            found = _dattri(problem, ridge).self_attribute(problem.loader("train"))
        return found.flatten().numpy()

    return Scores(values.numpy(), self_influence)


def dattri_ridge(problem: Problem) -> Scores:
    """dattri with the ridge that ours uses, in the units of its features."""
    return dattri(problem, mean_eigenvalue(problem))


def dattri_features(problem: Problem) -> Callable[[], None]:
    """Its cache(): features of the training split and its solve, ready to be timed."""
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
    """TracInCPFast: dot products of the last layer's loss gradients; positive lowers the loss."""
    tracin = _captum(problem, problem.loader("train"))
    values = tracin.influence(problem.tensors(TARGETS)).T
    return Scores(values.detach().numpy(), lambda: tracin.self_influence().detach().numpy())


def captum_features(problem: Problem) -> Callable[[], None]:
    """Scores for a few targets: it keeps nothing of the training split between calls."""
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
        return 1.0  # in place of the learning rate: all are ends of training, and count alike

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
    """EK-FAC influence on minus the margin, its examples' measurement: positive = helpful."""
    analyses = [EkfacAnalysis(problem, folder) for folder in problem.checkpoints]
    values = 0.0
    for analysis in analyses:
        analysis.fit()
        values = values + analysis.pairwise()

    def self_influence() -> np.ndarray:
        return np.mean([analysis.self_scores() for analysis in analyses], axis=0)

    return Scores(values / len(analyses), self_influence)


def kronfluence_features(problem: Problem) -> Callable[[], float]:
    """Factors and the scores of a few targets; gives the seconds that do not grow with n."""
    analysis = EkfacAnalysis(problem, problem.checkpoints[0], QUERIES)

    def run() -> float:
        fixed = analysis.fit()
        analysis.pairwise()
        return fixed

    return run


class EkfacAnalysis:
    """kronfluence on one checkpoint."""

    def __init__(self, problem: Problem, folder: Path, queries: int | None = None) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments

        task = _kronfluence_task()
        self.analyzer = Analyzer(
            analysis_name=folder.parent.name,
            model=prepare_model(load(folder), task),
            task=task,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(problem.work / "kronfluence"),
        )
        self.train = problem.loader("train").dataset
        self.targets = problem.loader(TARGETS, queries).dataset
        self.batch = problem.batch
        self.factors = FactorArguments(strategy="ekfac")
        self.scores = ScoreArguments(damping_factor=None)

    def fit(self) -> float:
        """Fit all factors; gives the seconds of the step that does not depend on the examples."""
        told = {"factors_name": "ekfac", "factor_args": self.factors, "overwrite_output_dir": True}
        sized = told | {"dataset": self.train, "per_device_batch_size": self.batch}
        self.analyzer.fit_covariance_matrices(**sized)
        start = time.perf_counter()
        self.analyzer.perform_eigendecomposition(**told)
        fixed = time.perf_counter() - start
        self.analyzer.fit_lambda_matrices(**sized)
        return fixed

    def pairwise(self) -> np.ndarray:
        """Scores (n_train, n_targets)."""
        self.analyzer.compute_pairwise_scores(
            query_dataset=self.targets,
            per_device_query_batch_size=min(QUERY_BATCH, len(self.targets)),
            **self._told("pairwise"),
        )
        return self.analyzer.load_pairwise_scores("pairwise")["all_modules"].numpy().T

    def self_scores(self) -> np.ndarray:
        """Self-influence (n_train,) of the loss."""
        self.analyzer.compute_self_scores(**self._told("self"))
        return self.analyzer.load_self_scores("self")["all_modules"].numpy()

    def _told(self, name: str) -> dict[str, Any]:
        return {
            "scores_name": name,
            "factors_name": "ekfac",
            "train_dataset": self.train,
            "per_device_train_batch_size": self.batch,
            "score_args": self.scores,
            "overwrite_output_dir": True,
        }


def _kronfluence_task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):
        """Cross-entropy in training; minus the margin is what is measured on a target."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            images, labels = batch
            logits = model(images)
            if sample:  # labels that the model itself would draw: the true Fisher matrix
                labels = logits.detach().softmax(1).multinomial(1).flatten()
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            images, labels = batch
            return -margins(model(images), labels).sum()

    return Classification()


# ---- baselines without gradients


def random(problem: Problem) -> Scores:
    """Numbers that know nothing."""
    shape = [len(problem.data.rows(split)) for split in ("train", TARGETS)]
    return Scores(np.random.default_rng(0).standard_normal(shape))


@dataclass(frozen=True)
class Method:
    """A method in the comparison.

    Attributes:
        scores: all of it, or None where only speed is of interest.
        batch: images a batch in the measure of quality, the fastest of those tried.
        note: what a reader has to know to compare it.
        features: the part that grows with the training split, for the measure of speed.
        speed: images a batch and in all there; each pair is a row.
    """

    scores: Callable[[Problem], Scores]
    batch: int
    note: str = ""
    features: Callable[[Problem], Callable[[], float | None]] | None = None
    speed: tuple[tuple[int, int], ...] = ()


NOT_FLOAT16 = "float32, since its float16 default is 10 to 30 times slower on a CPU"
METHODS = {
    "ours": Method(ours, 64, "", ours_features, ((16, 32),)),
    "ours-auto": Method(
        ours_auto,
        64,
        "gradients in bfloat16 where the processor has it, as for photographs by default",
        ours_auto_features,
        ((16, 32),),
    ),
    "one-block": Method(
        one_block, 64, "num_blocks=1: one Gram matrix for all layers, and our ridge"
    ),
    "dense": Method(dense, 64, "traker's gradients and Gaussian projection, our ridge"),
    "traker": Method(
        traker,
        256,
        f"as it comes (lambda_reg 0); {NOT_FLOAT16}",
        traker_features,
        ((8, 8), (32, 32)),
    ),
    "traker-ridge": Method(traker_ridge, 256, "lambda_reg equal to ours in its units"),
    "dattri": Method(
        dattri,
        64,
        "TRAKAttributor as it comes (regularization 0), on a margin that does not overflow",
        dattri_features,
        ((32, 32),),
    ),
    "dattri-ridge": Method(dattri_ridge, 64, "regularization equal to ours in its units"),
    "captum": Method(
        captum,
        2048,
        "TracInCPFast: last layer only, loss on loss, all checkpoints weighted 1",
        captum_features,
        ((32, 32),),
    ),
    "kronfluence": Method(
        kronfluence,
        128,
        "EK-FAC of Conv2d and Linear, BatchNorm left out; heuristic damping; "
        "for the ResNet-18 its eigendecomposition is counted once in s_per_1000",
        kronfluence_features,
        ((8, 8),),
    ),
    "random": Method(random, 1),
}
