"""The bank that methods are judged by: models retrained on random subsets, and their margins."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.data.splits import TARGETS
from attribution.errors import InputError, reason
from attribution.models.predict import margins
from attribution.models.retrain import Series, retrained_logits
from attribution.models.train import training_key
from attribution.runtime.hashing import derive_seed
from attribution.runtime.npy_blocks import open_matrix
from attribution.runtime.safe_files import is_bool, read_json
from attribution.scores.artifact import local_folder


@dataclass(frozen=True)
class Bank:
    """Margins of models that were trained on random subsets; the scores come from other models.

    Attributes:
        masks: (S, n_train) bool, the examples in each subset.
        margins: (S, R, n_targets) float64, margin of each target under each of R retrainings.
    """

    masks: np.ndarray
    margins: np.ndarray

    @property
    def repeats(self) -> int:
        return self.margins.shape[1]

    def save(self, folder: Path, config: Config, data: ImageData) -> None:
        """Write masks.npy, margins.npy and spec.json, which says what the bank was built for."""
        np.save(folder / "masks.npy", self.masks)
        np.save(folder / "margins.npy", self.margins)
        subsets, repeats, _ = self.margins.shape
        spec = {
            "alpha": round(float(self.masks.mean()), 6),
            "num_subsets": subsets,
            "num_repeats": repeats,
            "fingerprint": fingerprint(config, data),
            "targets": TARGETS,
            "unit": "margin (log-odds of the target's label)",
        }
        (folder / "spec.json").write_text(json.dumps(spec, indent=2) + "\n")


def fingerprint(config: Config, data: ImageData) -> str:
    """Hash of what a bank is built for: data, labels, model and training settings, but no seed."""
    return training_key(dataclasses.replace(config, seed=0), data)


def load_bank(source: str, config: Config, data: ImageData) -> Bank:
    """Read a bank from a folder or a run ('runs:/RUN_ID/bank') and check that it fits.

    Raises:
        InputError: unreadable, inconsistent, or built for something else.
    """
    folder = local_folder(source, "bank")
    try:
        wanted = read_json(folder / "spec.json")["fingerprint"]
        # As memory maps, so that a damaged header cannot ask for more memory than the file has.
        masks, margins = (open_matrix(folder / f"{name}.npy") for name in ("masks", "margins"))
    except Exception as error:  # numpy and json raise many kinds on broken files
        raise InputError(f"bank={source}: cannot be read ({reason(error)})") from None
    if wanted != fingerprint(config, data):
        raise InputError(
            f"bank={source}: was built for other data, labels, model or training settings; "
            "leave it out to build one"
        )
    n, m, count = len(data.rows("train")), len(data.rows(TARGETS)), len(masks)
    fits = masks.shape == (count, n) and margins.shape[::2] == (count, m) and margins.size
    if not fits or count < 2 or not is_bool(masks) or margins.dtype.kind != "f":
        raise InputError(
            f"bank={source}: arrays {masks.dtype} {masks.shape} and {margins.dtype} {margins.shape}; they "
            f"have to be truth values (subsets, {n}) and real numbers (subsets, models, {m})"
        )
    if not np.isfinite(margins).all():
        raise InputError(f"bank={source}: a margin is not finite")
    return Bank(np.array(masks), np.array(margins, np.float64))


def build_bank(
    config: Config,
    data: ImageData,
    num_subsets: int,
    num_repeats: int,
    alpha: float,
    work: Path,
) -> Bank:
    """Train `num_repeats` models on each of `num_subsets` random subsets of share `alpha`.

    A larger bank begins with the subsets and repeats of a smaller one, so that only the rest is
    trained.

    Args:
        work: folder of finished retrainings.
    """
    n = len(data.rows("train"))
    masks = np.zeros((num_subsets, n), dtype=bool)
    for s, mask in enumerate(masks):
        rng = np.random.default_rng(derive_seed(config.seed, "bank", s))
        mask[rng.permutation(n)[: round(alpha * n)]] = True
    series = []
    for r in range(num_repeats):
        seeds = [derive_seed(config.seed, "bank", s, r) for s in range(num_subsets)]
        series.append(Series(f"subsets, repeat {r}", seeds, masks))
    labels = data.labels(TARGETS)
    logits = retrained_logits(config, data, series, TARGETS, work, "bank")
    repeats = [np.stack([margins(each, labels) for each in repeat]) for repeat in logits]
    return Bank(masks, np.stack(repeats, axis=1))
