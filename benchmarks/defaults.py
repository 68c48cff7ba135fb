"""The estimator's settings by evidence: chosen on half of the targets and subsets, told of the others."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import data_settings

if TYPE_CHECKING:
    from attribution.config import Config
    from attribution.data.dataset import ImageData
    from attribution.models.checkpoints import Checkpoint


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of this sub-benchmark."""
    parser.add_argument("--dataset", default="", help="a folder, in place of the digits")
    parser.add_argument("--model", default="resnet-mini", help="with --dataset")
    parser.add_argument("--epochs", type=int, default=3, help="with --dataset")
    parser.add_argument("--subsets", type=int, default=100, help="of half the training set")
    parser.add_argument("--subset_repeats", type=int, default=3, help="models on each")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.5, 0.8, 1.0])
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[1, 3, 5, 10, 20])
    parser.add_argument("--proj_dims", type=int, nargs="*", default=[64, 256, 512])
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 2, 5, 10])
    parser.add_argument("--lambdas", type=float, nargs="*", default=[0.001, 0.01, 0.1, 1, 10])
    parser.add_argument("--sketches", type=int, nargs="*", default=[1, 2, 4], help="a checkpoint")
    parser.add_argument("--no_run_epochs", action="store_true", help="leave out epochs of one run")
    parser.add_argument("--cache_dir", default=tempfile.gettempdir() + "/trak-ablation-benchmark")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting around the default one: one of them moved at a time, but blocks with lambda.

    Beside independent checkpoints, the last epochs of one run as if they were as many. `choice` is
    the LDS on even targets and even subsets, `lds` on the odd ones, which no choice has seen; AUROC
    is of the planted flips, by minus the mean score over targets.
    """
    from attribution.config import resolve
    from attribution.data.dataset import load_data
    from attribution.experiments.statistics import noise_ceiling
    from attribution.experiments.subset_bank import build_bank
    from attribution.models.checkpoints import subset_masks

    most = max(options.checkpoints)
    config = resolve(data_settings(options) | {"num_models": most})
    data = load_data(config)
    work = Path(options.cache_dir) / f"defaults-{data.fingerprint[:12]}"
    bank = build_bank(config, data, options.subsets, options.subset_repeats, 0.5, work / "bank")
    usual = min(10, most)
    rows: list[dict[str, Any]] = []

    k, blocks, reg = config.proj_dim, config.num_blocks, config.lambda_reg
    normal = (usual, k, blocks, reg, 1)

    def judge(runs: str, own: Config, grid: _Grid, points: list[tuple]) -> None:
        for point in dict.fromkeys(points):
            names = ("checkpoints", "k", "blocks", "lambda", "sketches")
            settings = {"runs": runs, "fraction": own.subset_fraction}
            settings |= dict(zip(names, point, strict=True))
            for name, values in grid.scores(*point).items():
                rows.append({**settings, "1 - p": name} | _figures(values, bank, data))

    for fraction in options.fractions:
        count = most if fraction == config.subset_fraction else usual
        own = dataclasses.replace(config, subset_fraction=fraction, num_models=count)
        masks = subset_masks(len(data.rows("train")), count, fraction, config.seed)
        points = [normal]
        if fraction == config.subset_fraction:
            points += [(c, k, blocks, reg, 1) for c in options.checkpoints]
            both = itertools.product(options.blocks, options.lambdas)
            points += [(usual, k, b, r, 1) for b, r in both]
            points += [(usual, k, blocks, reg, s) for s in options.sketches]
            points += [(usual, d, blocks, reg, 1) for d in options.proj_dims]
        judge(
            "independent",
            own,
            _Grid(own, data, _checkpoints(own, data, masks, work), masks),
            points,
        )
        if not options.no_run_epochs:
            members = _epochs_of_one_run(own, data, masks[0], usual, work)
            grid = _Grid(own, data, members, np.tile(masks[0], (len(members), 1)))
            judge("epochs of one", own, grid, [(len(members), k, blocks, reg, 1)])
    ceiling = float(np.nanmean(noise_ceiling(bank.margins))) if bank.repeats > 1 else np.nan
    return sorted(({**row, "ceiling": ceiling} for row in rows), key=lambda row: -row["choice"])


class _Grid:
    """Scores of an ensemble under any settings, from features of every layer on its own.

    A block's sketch is the sum of its layers', so that one pass serves every number of blocks.
    """

    def __init__(
        self, config: Config, data: ImageData, members: list[Checkpoint], masks: np.ndarray
    ) -> None:
        self.config, self.data, self.members = config, data, members
        labels = data.labels("train")
        each = np.stack([_one_minus_p(m.train_logits, labels) for m in members])
        self.each, self.unseen = each, ~masks
        self._features: dict[tuple[int, int, int], np.ndarray] = {}

    def scores(
        self, count: int, k: int, blocks: int, reg: float, sketches: int
    ) -> dict[str, np.ndarray]:
        """Scores of the first checkpoints: without 1 - p, with its mean, with it out of sample.

        They are the mean over so many independent sketches of each checkpoint.
        """
        draws = itertools.product(range(sketches), range(count))
        plain = sum(self._one(m, k, blocks, reg, s) for s, m in draws) / (count * sketches)
        found = {"none": plain, "mean": plain * self.each[:count].mean(axis=0)[:, None]}
        unseen = self.unseen[:count]
        if unseen.any(axis=0).all():
            weight = (self.each[:count] * unseen).sum(axis=0) / unseen.sum(axis=0)
            found["out of sample"] = plain * weight[:, None]
        return found

    def _one(self, m: int, k: int, blocks: int, reg: float, draw: int) -> np.ndarray:
        """Scores (n_train, n_targets) of one checkpoint."""
        layers, n = self._layers(m, k, draw), len(self.data.rows("train"))
        total: Any = 0.0
        for share in np.array_split(np.arange(layers.shape[1]), min(blocks, layers.shape[1])):
            features = layers[:, share].sum(axis=1).astype(np.float64)
            train, targets = features[:n], features[n:]
            gram = train.T @ train
            gram[np.diag_indices(k)] += reg * gram.trace() / k
            total = total + train @ np.linalg.solve(gram, targets.T)
        return total

    def _layers(self, m: int, k: int, draw: int) -> np.ndarray:
        """Features (n, layers, k) of train and targets under a checkpoint."""

        from attribution.data.splits import TARGETS
        from attribution.gradients.sketch import Sketch
        from attribution.models import classifier
        from attribution.models.batches import batches_of
        from attribution.runtime.device import resolve_device
        from attribution.runtime.hashing import derive_seed
        from attribution.scores.features import feature_batch_size

        key = m, k, draw
        if key not in self._features:
            if any(known[1:] != (k, draw) for known in self._features):
                self._features.clear()  # one length and draw at a time: they are large
            device = resolve_device(self.config.device)
            model = classifier.load(self.members[m].folder)
            classifier.place(model, device, self.config.image_size)
            seed = derive_seed(self.config.seed, "projection")
            own = f"{seed}/{m}" + (f"/{draw}" if draw else "")
            sketch, parts = Sketch(k, own, num_blocks=1 << 20), []
            size = feature_batch_size(self.config.image_size, device.type)
            for split in ("train", TARGETS):
                for batch in batches_of(self.config, self.data, split, size, device):
                    parts.append(sketch.features(model, *batch)[0].cpu().numpy())
            whole = np.concatenate(parts)
            self._features[key] = whole.reshape(len(whole), -1, k)
        return self._features[key]


def _figures(values: np.ndarray, bank: Any, data: ImageData) -> dict[str, float]:
    from attribution.experiments.statistics import detection, lds

    margins = bank.margins.mean(axis=1)

    def half(first: int) -> float:
        targets = slice(first, None, 2)
        part = values[:, targets], bank.masks[targets], margins[targets, targets]
        return float(np.nanmean(lds(*part)))

    found = {"choice": half(0), "lds": half(1)}
    flipped = data.table("train")["is_flipped"].to_numpy()
    figures = detection(flipped, values.mean(axis=1), draws=0)
    return found | {name: figures[name] for name in figures if name != "recall_20pct"}


def _one_minus_p(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    from attribution.models.predict import margins

    return expit(-margins(logits, labels))


def _checkpoints(
    config: Config, data: ImageData, masks: np.ndarray, work: Path
) -> list[Checkpoint]:
    from attribution.models.checkpoints import train_checkpoints
    from attribution.models.train import training_key

    name = f"{training_key(config, data)[:12]}-{config.subset_fraction:g}"
    return train_checkpoints(config, data, masks, work / name)


def _epochs_of_one_run(
    config: Config, data: ImageData, mask: np.ndarray, count: int, work: Path
) -> list[Checkpoint]:
    """The first checkpoint's run as it was after each of its last `count` epochs."""
    from attribution.models import classifier
    from attribution.models.checkpoints import Checkpoint
    from attribution.models.predict import predict
    from attribution.models.train import train
    from attribution.runtime.hashing import derive_seed

    members: list[Checkpoint] = []

    def keep(metrics: dict[str, float], model: Any) -> None:
        folder = work / "epochs" / f"{config.subset_fraction:g}-{len(members):03d}"
        classifier.save(model, folder, config.image_size, *classifier.normalisation(config.model))
        both = (predict(config, model, data, split) for split in ("train", "validation"))
        members.append(Checkpoint(folder, [metrics], *both))

    train(config, data, derive_seed(config.seed, "checkpoint", 0), mask, keep, validate=False)
    return members[-count:]
