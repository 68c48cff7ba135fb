"""What each setting of the estimator does to LDS and to finding flips, around the default setting."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from attribution.config import Config, resolve
from attribution.data.dataset import ImageData, load_data
from attribution.data.splits import TARGETS
from attribution.experiments.statistics import detection, lds, noise_ceiling
from attribution.experiments.subset_bank import build_bank
from attribution.gradients.sketch import Sketch
from attribution.models import classifier, memory_layout
from attribution.models.batches import batches_of
from attribution.models.checkpoints import Checkpoint, subset_masks, train_checkpoints
from attribution.models.predict import margins
from attribution.models.train import training_key
from attribution.runtime.device import resolve_device
from attribution.runtime.hashing import derive_seed
from attribution.scores.features import feature_batch_size
from benchmarks.common import add_data_options, data_settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this sub-benchmark."""
    add_data_options(parser)
    parser.add_argument("--subsets", type=int, default=100, help="random halves to retrain on")
    parser.add_argument("--subset_repeats", type=int, default=3, help="models per subset")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.5, 0.8, 1.0])
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[1, 3, 5, 10, 20])
    parser.add_argument("--proj_dims", type=int, nargs="*", default=[64, 256, 512])
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 2, 5, 10])
    parser.add_argument("--lambdas", type=float, nargs="*", default=[0.001, 0.01, 0.1, 1, 10])
    parser.add_argument("--sketches", type=int, nargs="*", default=[1, 2, 4], help="per checkpoint")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the estimator: checkpoints, k, blocks, ridge, sketches per checkpoint."""

    checkpoints: int
    k: int
    blocks: int
    ridge: float
    sketches: int = 1


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Change one part of the default setting at a time; blocks and ridge together.

    Each is judged with independent checkpoints, the default also with the last epochs of one run.
    `choice` is the LDS on even targets and even subsets, for choosing; `lds` is on the odd ones. AUROC
    is of the planted flips, ranked by the mean score over targets, low = suspect.
    """
    most = max(options.checkpoints)
    config = resolve(data_settings(options) | {"num_models": most})
    data = load_data(config)
    work = Path(options.cache_dir) / f"defaults-{data.fingerprint[:12]}"
    bank = build_bank(config, data, options.subsets, options.subset_repeats, 0.5, work / "bank")
    ceiling = float(np.nanmean(noise_ceiling(bank.margins))) if bank.repeats > 1 else np.nan
    default = Setting(min(10, most), config.proj_dim, config.num_blocks, config.lambda_reg)
    rows: list[dict[str, Any]] = []

    def judge(runs: str, ensemble: Ensemble, settings: list[Setting]) -> None:
        for setting in dict.fromkeys(settings):
            start = {"runs": runs, "fraction": ensemble.config.subset_fraction}
            start |= dataclasses.asdict(setting)
            for weight, values in ensemble.scores(setting).items():
                figures = _figures(values, bank, data) | {"ceiling": ceiling}
                rows.append({**start, "1 - p": weight, **figures})

    for fraction in options.fractions:
        is_default = fraction == config.subset_fraction
        count = most if is_default else default.checkpoints
        own = dataclasses.replace(config, subset_fraction=fraction, num_models=count)
        masks = subset_masks(len(data.rows("train")), count, fraction, config.seed)
        folder = work / f"{training_key(own, data)[:12]}-{fraction:g}"
        members = train_checkpoints(own, data, masks, folder)
        settings = [default, *_around(default, options)] if is_default else [default]
        judge("independent", Ensemble(own, data, members), settings)
        last = min(default.checkpoints, own.epochs)
        own = dataclasses.replace(own, num_models=1, checkpoint_epochs=f"last:{last}")
        (one,) = train_checkpoints(own, data, masks[:1], folder.with_name(f"{folder.name}-epochs"))
        setting = dataclasses.replace(default, checkpoints=last)
        judge("epochs of one", Ensemble(own, data, one.epochs), [setting])
    return sorted(rows, key=lambda row: -row["choice"])


def _around(default: Setting, options: argparse.Namespace) -> list[Setting]:
    """The settings that differ from the default in one part, or in blocks and ridge."""
    changes = [{"checkpoints": count} for count in options.checkpoints]
    both = itertools.product(options.blocks, options.lambdas)
    changes += [{"blocks": blocks, "ridge": ridge} for blocks, ridge in both]
    changes += [{"sketches": count} for count in options.sketches]
    changes += [{"k": k} for k in options.proj_dims]
    return [dataclasses.replace(default, **change) for change in changes]


class Ensemble:
    """Scores of an ensemble under any setting, from features of each layer.

    The sketch of a block is the sum over its layers, so one pass serves every number of blocks.
    """

    def __init__(self, config: Config, data: ImageData, members: Sequence[Checkpoint]) -> None:
        self.config, self.data, self.members = config, data, members
        labels = data.labels("train")
        # 1 - p of each training example under each checkpoint.
        self.each = np.stack([expit(-margins(m.logits["train"], labels)) for m in members])
        self._features: dict[tuple[int, int, int], np.ndarray] = {}

    def scores(self, setting: Setting) -> dict[str, np.ndarray]:
        """Mean scores (n_train, n_targets) over checkpoints and sketches, by their factor 1 - p."""
        count = setting.checkpoints
        draws = list(itertools.product(range(setting.sketches), range(count)))
        plain = sum(self._one(m, draw, setting) for draw, m in draws) / len(draws)
        return {"none": plain, "mean": plain * self.each[:count].mean(axis=0)[:, None]}

    def _one(self, m: int, draw: int, setting: Setting) -> np.ndarray:
        """Scores (n_train, n_targets) of checkpoint m."""
        k, n = setting.k, len(self.data.rows("train"))
        layers = self._layers(m, k, draw)
        blocks = min(setting.blocks, layers.shape[1])
        total: Any = 0.0
        for block in np.array_split(np.arange(layers.shape[1]), blocks):
            features = layers[:, block].sum(axis=1).astype(np.float64)
            train, targets = features[:n], features[n:]
            gram = train.T @ train
            gram[np.diag_indices(k)] += setting.ridge * gram.trace() / k
            total = total + train @ np.linalg.solve(gram, targets.T)
        return total

    def _layers(self, m: int, k: int, draw: int) -> np.ndarray:
        """Features (n, layers, k) of training examples and targets under checkpoint m."""
        key = m, k, draw
        if key in self._features:
            return self._features[key]
        if any(known[1:] != (k, draw) for known in self._features):
            self._features.clear()  # they are large: keep one k and draw at a time
        config = self.config
        device = resolve_device(config.device)
        model = classifier.load(self.members[m].folder)
        memory_layout.place(model, device, config.image_size)
        seed = f"{derive_seed(config.seed, 'projection')}/{m}" + (f"/{draw}" if draw else "")
        sketch, parts = Sketch(k, seed, num_blocks=1 << 20), []
        size = feature_batch_size(config.image_size, device.type)
        for split in ("train", TARGETS):
            for batch in batches_of(config, self.data, split, size, device):
                parts.append(sketch.features(model, *batch)[0].cpu().numpy())
        whole = np.concatenate(parts)
        self._features[key] = whole.reshape(len(whole), -1, k)
        return self._features[key]


def _figures(values: np.ndarray, bank: Any, data: ImageData) -> dict[str, float]:
    actual = bank.margins.mean(axis=1)

    def half(first: int) -> float:
        part = slice(first, None, 2)
        return float(np.nanmean(lds(values[:, part], bank.masks[part], actual[part, part])))

    flipped = data.table("train")["is_flipped"].to_numpy()
    figures = detection(flipped, values.mean(axis=1), draws=0)
    figures.pop("recall_20pct", None)
    return {"choice": half(0), "lds": half(1)} | figures
