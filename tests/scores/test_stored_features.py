"""Stored features: scores of anything by the formula, and what is refused when they are read."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_trak import config_of
from toy import toy_config

from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.scores import stored_features
from attribution.scores.features import Store, featurize
from attribution.scores.stored_features import load_features, write_features
from attribution.scores.trak import score

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = ("mean", "none")
HALF = 2.0**-11  # the relative rounding of float16


def write_store(folder: Path, m: int, rng: np.random.Generator, sizes: dict[str, int], k: int):
    """A store as traker leaves it, of random features; returns it with what it holds."""
    store, held = Store(folder / f"{m:03d}", m), {}
    for split, n in sizes.items():
        held[split] = rng.normal(size=(n, k)).astype(np.float32)
        held[f"{split} 1 - p"] = rng.random((n, 1)).astype(np.float32)
        for file, values in (
            (store.features_file(split), held[split]),
            (store.one_minus_p_file(split), held[f"{split} 1 - p"]),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                np.save(stream, values)
    return store, held


def ridge_scores(
    train: list[np.ndarray], new: list[np.ndarray], one_minus_p: list[np.ndarray], blocks: int,
    lambda_reg: float, weight: str,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The formula of score, block by block in float64, and how far float16 may move it."""
    total = bound = 0.0
    for X, Y in zip(train, new, strict=True):
        k = X.shape[1] // blocks
        lengths = np.zeros(len(X)), np.zeros(len(Y))
        for b in range(blocks):
            x, y = (part[:, b * k : (b + 1) * k].astype(np.float64) for part in (X, Y))
            gram = x.T @ x
            inverse = np.linalg.inv(gram + lambda_reg * np.trace(gram) / k * np.eye(k))
            total = total + x @ inverse @ y.T / len(train)
            for own, part in zip(lengths, (x, y), strict=True):
                own += np.einsum("ij,jk,ik->i", part, inverse, part)
        bound = bound + np.sqrt(np.outer(*lengths)) / len(train)
    factor = np.mean(one_minus_p, axis=0) if weight == "mean" else np.ones((len(total), 1))
    return total * factor, bound * factor


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(3, 12), st.integers(1, 3), st.integers(1, 5),
    st.integers(1, 3), st.sampled_from(WEIGHTS), st.sampled_from([0.1, 2.0]),
)  # fmt: skip
def test_stored_features_score_anything_by_the_formula(
    tmp_path_factory, seed, n, blocks, k, models, weight, lambda_reg
) -> None:
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(seed)
    sizes = {"train": n, "validation": 2}
    stores, held = zip(
        *(write_store(folder / "work", m, rng, sizes, blocks * k) for m in range(models))
    )
    score(config_of(stores, lambda_reg, blocks, weight), list(stores), folder / "scores.npy")
    config = toy_config(loss_gradient_weight=weight)
    write_features(folder / "features", list(stores), config)
    new = [rng.normal(size=(4, blocks * k)).astype(np.float32) for _ in stores]
    found = load_features(folder / "features").scores(new)
    expected, bound = ridge_scores(
        [each["train"] for each in held], new, [each["train 1 - p"] for each in held],
        blocks, lambda_reg, weight,
    )  # fmt: skip
    assert found.dtype == np.float32 and found.shape == (n, 4)
    assert (np.abs(found - expected) <= (2 * HALF + 1e-4) * bound + 1e-7).all()


@pytest.fixture
def trained(ensemble) -> tuple[ImageData, list[Path]]:
    """The toy data and the folders of two checkpoints."""
    data, finetuned = ensemble
    return data, finetuned.folders


SETTINGS = [
    {"loss_gradient_weight": "mean", "num_blocks": 1},
    {"loss_gradient_weight": "mean", "num_blocks": 5},
    {"loss_gradient_weight": "none", "num_blocks": 5},
    {"loss_gradient_weight": "none", "num_blocks": 1, "projector": "normal"},
]


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: " ".join(map(str, given.values())))
def test_a_target_looked_at_anew_has_the_scores_of_its_column(trained, tmp_path, given) -> None:
    data, checkpoints = trained
    config = toy_config(num_models=2, proj_dim=16, lambda_reg=0.1, **given)
    stores = featurize(config, data, checkpoints, tmp_path / "work")
    values = np.array(score(config, stores, tmp_path / "work" / "scores.npy").values)
    write_features(tmp_path / "features", stores, config)
    stored, rows, labels = load_features(tmp_path / "features"), data.rows("validation"), (
        data.labels("validation")
    )  # fmt: skip
    chosen = np.array([0, 3, 7])
    for some in ([chosen], chosen[:, None]):  # three at once, and one at a time
        found = np.concatenate(
            [
                stored.scores(
                    stored_features.new_features(
                        config, checkpoints, np.array(data.pixels()[rows[i]]), labels[i]
                    )
                )
                for i in some
            ],
            axis=1,
        )
        assert np.abs(found - values[:, chosen]).max() < 2e-3 * np.abs(values).max()
        assert np.abs(values).max() > 0


def test_the_probabilities_are_the_mean_of_the_checkpoints(trained) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    data, checkpoints = trained
    pixels = np.array(data.pixels()[data.rows("test")[:3]])
    expected = 0
    for folder in checkpoints:
        processor = AutoImageProcessor.from_pretrained(folder)
        images = processor([Image.fromarray(p) for p in pixels], return_tensors="pt")
        with torch.no_grad():
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            expected = expected + model(images["pixel_values"]).logits.softmax(1).numpy() / 2
    config = toy_config(num_models=2)
    found = stored_features.probabilities(config, checkpoints, pixels)
    np.testing.assert_allclose(found.mean(0), expected, atol=1e-5)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder of write_features: two checkpoints, 6 examples, 2 blocks of 3."""
    rng, sizes = np.random.default_rng(0), {"train": 6, "validation": 2}
    stores = [write_store(tmp_path / "work", m, rng, sizes, 6)[0] for m in range(2)]
    score(config_of(stores, 0.1, 2), stores, tmp_path / "scores.npy")
    write_features(tmp_path / "features", stores, toy_config())
    return tmp_path / "features"


STORED = ["000/factor.npy", "000/train.npy", "001/factor.npy", "001/train.npy", "scale.npy"]


def test_the_training_features_are_kept_in_half_precision(stored: Path) -> None:
    assert sorted(str(f.relative_to(stored)) for f in stored.rglob("*.npy")) == STORED
    train = np.load(stored / "000" / "train.npy")
    assert train.dtype == np.float16 and train.shape == (6, 6) and np.abs(train).max() <= 1


@pytest.mark.parametrize("name", [*STORED, "metadata.json"])
@pytest.mark.parametrize("damage", ["missing", "one byte", "short"])
def test_damaged_features_are_refused_in_one_line(stored: Path, name: str, damage: str) -> None:
    load_features(stored)
    file = stored / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 128
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "one byte" else file.read_bytes()[:-4])
    with pytest.raises(InputError, match=f"^features={stored}: cannot be read") as caught:
        load_features(stored)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"schema_version": 2},
        *(
            (lambda d, count=count: d | {"num_models": count})
            for count in (3, 0, -1, True, 2.0, "2", None, 10**12)
        ),
        lambda d: d | {"sha256": {"../" + name: value for name, value in d["sha256"].items()}},
        lambda d: d | {"sha256": dict.fromkeys(d["sha256"], 1)},
        lambda d: d | {"sha256": {}},
        lambda d: {"schema_version": 1},
        lambda d: [d],
    ],
)
def test_features_with_other_metadata_are_refused(stored: Path, change) -> None:
    file = stored / "metadata.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match="^features=.*cannot be read"):
        load_features(stored)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "pickled objects": ("scale.npy", np.full((6, 1), {}, object)),
        "another type": ("000/train.npy", np.zeros((6, 6), np.float32)),
        "other examples": ("001/train.npy", np.zeros((5, 6), np.float16)),
        "other lengths": ("000/train.npy", np.zeros((6, 5), np.float16)),
        "factors that are no squares": ("001/factor.npy", np.ones((6, 4), np.float32)),
        "one dimension": ("scale.npy", np.ones(6, np.float32)),
        "nothing": ("scale.npy", np.ones((0, 1), np.float32)),
        "two scales": ("scale.npy", np.ones((6, 2), np.float32)),
    }.values(),
)
def test_features_that_do_not_fit_are_refused_whatever_their_hashes(stored, name, values) -> None:
    np.save(stored / name, values, allow_pickle=True)
    bless(stored)
    with pytest.raises(InputError, match="^features=.*cannot be read"):
        load_features(stored)


def bless(stored: Path) -> None:
    """Give every file the hash that metadata.json promises."""
    file = stored / "metadata.json"
    document = json.loads(file.read_text())
    document["sha256"] = {n: sha256((stored / n).read_bytes()).hexdigest() for n in STORED}
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["000/train.npy", "001/factor.npy", "scale.npy"])
def test_stored_features_that_are_not_finite_make_no_scores(stored: Path, name: str) -> None:
    values = np.load(stored / name)
    values.flat[0] = np.nan
    np.save(stored / name, values)
    bless(stored)
    with pytest.raises(InputError, match="^features=.*not finite"):
        load_features(stored).scores([np.ones((1, 6), np.float32)] * 2)


@pytest.mark.parametrize("count", [1, 3])
def test_features_of_other_checkpoints_make_no_scores(stored: Path, count: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        load_features(stored).scores([np.zeros((1, 6), np.float32)] * count)


def test_auto_keeps_features_up_to_its_bound(trained, tmp_path, monkeypatch) -> None:
    data, checkpoints = trained
    config = toy_config(num_models=2, proj_dim=16, num_blocks=2, lambda_reg=0.1)
    assert config.keep_features == "auto"
    stores = featurize(config, data, checkpoints, tmp_path / "work")
    score(config, stores, tmp_path / "work" / "scores.npy")
    write_features(tmp_path / "features", stores, config)
    size = sum(np.load(f).nbytes for f in (tmp_path / "features").glob("*/train.npy"))
    assert size == 2 * 32 * 2 * 16 * 2  # num_models x n_train x num_blocks x proj_dim x 2 bytes
    for bound, wanted in ((size, True), (size - 1, False)):
        monkeypatch.setattr(stored_features, "AUTO_BYTES", bound)
        assert stored_features.are_wanted(config, size // 2) is wanted
        for keep in ("yes", "no"):
            asked = toy_config(keep_features=keep)
            assert stored_features.are_wanted(asked, size // 2) is (keep == "yes")
