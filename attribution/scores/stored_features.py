"""Stored features: score a new image without featurising the training set again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attribution.config import Config
from attribution.data.transforms import to_batch
from attribution.errors import InputError, reason
from attribution.models import classifier, model_facts
from attribution.runtime.device import resolve_device
from attribution.runtime.npy_blocks import (
    ahead,
    checked_matrix,
    open_matrix,
    row_blocks,
    write_matrix,
)
from attribution.runtime.safe_files import read_json, sha256
from attribution.scores.features import Store, load_checkpoint, run_traker
from attribution.scores.ridge import Ridge
from attribution.scores.trak import row_scale

SCHEMA_VERSION = 1
AUTO_BYTES = 2 << 30  # most that keep_features=auto stores


def are_wanted(config: Config, length: int) -> bool:
    """Whether parameter `keep_features` asks for so many stored float16; auto asks for up to 2 GiB."""
    if config.keep_features != "auto":
        return config.keep_features == "yes"
    return 2 * length <= AUTO_BYTES


def write_features(
    folder: Path, stores: Sequence[Store], config: Config, scale: float = 1.0
) -> StoredFeatures:
    """Write what load_features reads, from stores that score() has factorised.

    The files of each checkpoint are the Cholesky factors L of its blocks, (blocks k, k) float32, and
    the whitened training features X L^-T, (n_train, blocks k) float16. No entry of the latter is
    above 1: their squares add up to leverages.

    Args:
        scale: as of score().
    """
    for m, store in enumerate(stores):
        own = folder / f"{m:03d}"
        own.mkdir(parents=True, exist_ok=True)
        factors = open_matrix(store.factor_file)
        write_matrix(own / "factor.npy", [factors], factors.shape)
        blocks = _whitened(np.array(factors), row_blocks(*store.features("train")))
        shape = store.count("train"), len(factors)
        write_matrix(own / "train.npy", ahead(blocks), shape, "<f2")
    row_scales = scale * row_scale(stores, config.loss_gradient_weight)
    write_matrix(folder / "scale.npy", [row_scales], row_scales.shape)
    document = {
        "schema_version": SCHEMA_VERSION,
        "num_models": len(stores),
        "sha256": {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*.npy"))},
    }
    (folder / "metadata.json").write_text(json.dumps(document, indent=2) + "\n")
    return StoredFeatures(folder, len(stores))


def _whitened(factors: np.ndarray, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    ridge = Ridge(0, num_blocks=len(factors) // factors.shape[1])
    return (ridge.whiten(block, factors).numpy() for block in blocks)


@dataclass(frozen=True)
class StoredFeatures:
    """Features of a trak run, just written or checked by load_features.

    Attributes:
        folder: folder of the files.
        num_models: number of checkpoints.
    """

    folder: Path
    num_models: int

    def scores(self, features: list[np.ndarray]) -> np.ndarray:
        """Scores of the training set on new examples, (n_train, b) float32; positive = helpful.

        Args:
            features: of the new examples under each of the same checkpoints, (b, blocks k) float32.

        Raises:
            InputError: a score that is not finite.
        """
        scale = np.array(open_matrix(self.folder / "scale.npy"))
        total = np.zeros((len(scale), len(features[0])), np.float32)
        for m, own in zip(range(self.num_models), features, strict=True):
            factors = np.array(open_matrix(self.folder / f"{m:03d}" / "factor.npy"))
            (white,) = _whitened(factors, [own])
            train = open_matrix(self.folder / f"{m:03d}" / "train.npy")
            products = [block.astype(np.float32) @ white.T for block in row_blocks(train)]
            total += np.concatenate(products)
        total *= scale
        if not np.isfinite(total).all():
            raise InputError(f"features={self.folder}: they make scores that are not finite")
        return total


def load_features(folder: Path) -> StoredFeatures:
    """Open the features of a trak run.

    Raises:
        InputError: a file is missing, or differs from what metadata.json says.
    """
    try:
        document = read_json(folder / "metadata.json")
        count, hashes = document["num_models"], dict(document["sha256"])
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"metadata.json does not have schema_version {SCHEMA_VERSION}")
        if type(count) is not int or not 0 < count < len(hashes):  # two files each, and scale.npy
            raise ValueError(f"num_models {count!r} does not fit its {len(hashes)} hashes")

        def shape(name: str, dtype: type) -> tuple[int, ...]:
            return checked_matrix(folder / name, hashes[name], dtype).shape

        n, one = shape("scale.npy", np.float32)
        for m in range(count):
            length, k = shape(f"{m:03d}/factor.npy", np.float32)
            train = shape(f"{m:03d}/train.npy", np.float16)
            if one != 1 or length % k or train != (n, length):
                raise ValueError(f"factors {length, k} and features {train} of {n} do not fit")
    except Exception as error:  # numpy and json raise many kinds on broken files
        raise InputError(f"features={folder}: cannot be read ({reason(error)})") from None
    return StoredFeatures(folder, count)


def probabilities(config: Config, checkpoints: Sequence[Path], pixels: np.ndarray) -> np.ndarray:
    """Probabilities of each checkpoint, (M, b, C), for images uint8 (b, size, size, 3)."""
    images = _batch(config, pixels)
    with torch.inference_mode():
        each = [
            classifier.load(folder).to(images.device)(images).logits.float().softmax(1)
            for folder in checkpoints
        ]
    return torch.stack(each).cpu().numpy()


def new_features(
    config: Config, checkpoints: Sequence[Path], pixels: np.ndarray, labels: np.ndarray
) -> list[np.ndarray]:
    """Features of new examples under each checkpoint, (b, blocks k) float32, as in the trak stage.

    Args:
        pixels: uint8 (b, size, size, 3).
        labels: (b,) int64, the classes whose margins are explained.
    """
    images, found = _batch(config, pixels), []
    batch = images, torch.from_numpy(labels).to(images.device)
    for m, checkpoint in enumerate(checkpoints):
        with tempfile.TemporaryDirectory() as name:
            model = load_checkpoint(config, checkpoint)
            run_traker(config, model, m, [batch], len(labels), Path(name))
            found.append(np.array(open_matrix(Path(name) / str(m) / "grads.mmap")))
    return found


def _batch(config: Config, pixels: np.ndarray) -> torch.Tensor:
    """Images uint8 (b, size, size, 3) as a normalised batch (b, 3, size, size) on the device."""
    normalisation = model_facts.normalisation(config.model)
    return to_batch(pixels, *normalisation, resolve_device(config.device))
