"""The ridge solve against dense formulas in float64, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribution.errors import InputError
from attribution.scores.ridge import Ridge

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
SMALL = RNG.normal(size=(5, 20))  # n < k


def products(x: torch.Tensor, y: torch.Tensor, ridge: Ridge, rows: int = 4096) -> torch.Tensor:
    """x' A^-1 y of float32 features (n, k) and (m, k), with A from some rows of x at a time."""
    factors = ridge.factor(ridge.gram(x.split(rows)))
    return (ridge.whiten(x, factors) @ ridge.whiten(y, factors).T).float()


def tau(train: np.ndarray, targets: np.ndarray, lambda_reg: float) -> np.ndarray:
    """Scores (n, m) of features, as the project computes them."""
    x, y = (torch.from_numpy(np.asarray(each, np.float32)) for each in (train, targets))
    return products(x, y, Ridge(lambda_reg)).numpy()


def dual(train: np.ndarray, targets: np.ndarray, lambda_reg: float) -> np.ndarray:
    """The same through the n x n matrix: Phi (Phi'Phi + l I)^-1 = (Phi Phi' + l I)^-1 Phi."""
    kernel = train @ train.T
    ridge = lambda_reg * np.square(train).sum() / train.shape[1]
    return np.linalg.solve(kernel + ridge * np.eye(len(train)), train @ targets.T)


@pytest.mark.parametrize(
    ("features", "targets"),
    {
        "fewer examples than features": (SMALL, RNG.normal(size=(3, 20))),
        "one target": (RNG.normal(size=(30, 6)), RNG.normal(size=(1, 6))),
        "one example": (RNG.normal(size=(1, 4)), RNG.normal(size=(2, 4))),
        "every example twice": (np.repeat(SMALL, 2, axis=0), SMALL),
        "all the same": (np.tile(SMALL[:1], (7, 1)), SMALL),
        "large": (1e12 * SMALL, 1e12 * SMALL),
        "small": (1e-12 * SMALL, 1e-12 * SMALL),
    }.values(),
)
def test_with_a_ridge_scores_are_those_of_the_dual_form(features, targets) -> None:
    expected = dual(features, targets, 0.1)
    np.testing.assert_allclose(
        tau(features, targets, 0.1), expected, atol=1e-5 * abs(expected).max()
    )


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_share_the_score_of_one(copies: int) -> None:
    """The Gram matrix of unit vectors, each repeated, is a multiple of the identity."""
    found = tau(np.repeat(np.eye(4), copies, axis=0), np.eye(4), 0.5)
    expected = np.repeat(np.eye(4), copies, axis=0) / (copies * 1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_every_score_of_equal_features_has_a_closed_form() -> None:
    n, k, ridge = 7, 3, 0.25
    features = np.ones((n, k)) * [1, -2, 0.5]
    np.testing.assert_allclose(
        tau(features, features, ridge), np.full((n, n), 1 / (n * (1 + ridge / k))), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("features", "lambda_reg", "says"),
    {
        "n < k, no ridge": (SMALL, 0, "singular with lambda_reg 0 and proj_dim 20; use a larger"),
        "copies, no ridge": (np.tile(SMALL[:2, :4], (9, 1)), 0, "singular"),
        "a ridge below rounding": (np.tile(SMALL[:1, :4], (9, 1)), 1e-9, "singular"),
        "zero": (np.zeros((5, 2)), 0.1, "zero, or nearly so"),
        "squares that vanish": (1e-20 * SMALL, 0.1, "zero, or nearly so"),
        "squares that overflow": (1e25 * SMALL, 0.1, "not finite"),
        "NaN": (np.where(SMALL > 1, np.nan, SMALL), 0.1, "not finite"),
        "infinite": (np.where(SMALL > 1, np.inf, SMALL), 0.1, "not finite"),
    }.values(),
)
def test_a_gram_matrix_that_cannot_be_solved_is_refused(features, lambda_reg, says) -> None:
    with pytest.raises(InputError, match=says):
        tau(features, np.ones((1, features.shape[1])), lambda_reg)


@pytest.mark.parametrize("features", [torch.randn(5, 8), torch.zeros(20, 8), torch.ones(20, 8)])
def test_a_ridge_is_the_remedy_of_a_singular_gram_matrix(features) -> None:
    says = "singular with lambda_reg 0" if features.any() else "are zero"
    with pytest.raises(InputError, match=says):
        products(features, features, Ridge(0))
    if features.any():
        assert products(features, features, Ridge(0.1)).isfinite().all()


def test_one_singular_block_among_others_is_refused() -> None:
    x = torch.randn(20, 8)
    x[:, 5] = x[:, 4]
    with pytest.raises(InputError, match="singular with lambda_reg 0"):
        products(x, x, Ridge(0, num_blocks=2))


def test_a_factor_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="singular"):
        Ridge(0.1).factor(torch.full((1, 2, 2), np.nan, dtype=torch.float64))


@pytest.mark.parametrize("lambda_reg", [-1.0, np.nan, np.inf])
def test_a_ridge_that_is_no_ridge_is_refused(lambda_reg: float) -> None:
    with pytest.raises(InputError, match=f"^lambda_reg={lambda_reg}: must be finite"):
        Ridge(lambda_reg)


def test_the_ridge_is_relative_and_the_inverse_is_not_rescaled() -> None:
    x, y = torch.randn(30, 8), torch.randn(5, 8)
    gram = x.double().T @ x.double()
    inverse = torch.linalg.inv(gram + 0.5 * gram.trace() / 8 * torch.eye(8))
    truth = (x.double() @ inverse @ y.double().T).float()
    found = products(x, y, Ridge(0.5), rows=7)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(products(x * 1e3, y, Ridge(0.5)), found / 1e3, rtol=1e-4, atol=1e-8)


def by_blocks(x: torch.Tensor, ridge: float, blocks: int) -> torch.Tensor:
    """A = F'F with zeros outside blocks along the diagonal, and a ridge for each block."""
    width = x.shape[1] // blocks
    a = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[1], width):
        rows = slice(start, start + width)
        gram = x[:, rows].double().T @ x[:, rows].double()
        a[rows, rows] = gram + ridge * gram.trace() / width * torch.eye(width)
    return a


@pytest.mark.parametrize("panel", [3, 8, 1024])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("lambda_reg", [0.0, 0.1, 2.0])
def test_each_block_has_its_own_gram_matrix_and_ridge(monkeypatch, blocks, lambda_reg, panel):
    monkeypatch.setattr("attribution.scores.ridge.PANEL", panel)
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 8.0, 0.5, 3.0]).repeat_interleave(4)
    x = torch.randn(50, 16, generator=g) * scales
    x += 0.3 * x.flip(1)  # so that blocks are correlated
    y = torch.randn(9, 16, generator=g) * scales
    ridge = Ridge(lambda_reg, num_blocks=blocks)
    gram = ridge.gram(x.split(7))
    assert gram.shape == (blocks, 16 // blocks, 16 // blocks) and gram.dtype == torch.float64
    torch.testing.assert_close(
        torch.block_diag(*gram), by_blocks(x, 0, blocks), rtol=1e-5, atol=1e-4
    )
    inverse = torch.linalg.inv(by_blocks(x, lambda_reg, blocks))
    truth = (x.double() @ inverse @ y.double().T).float()
    factors = ridge.factor(gram)
    for given in (factors, factors.flatten(0, 1)):
        left, right = (ridge.whiten(rows, given).float() for rows in (x, y))
        torch.testing.assert_close(
            left @ right.T, truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max())
        )


@pytest.mark.parametrize(("lambda_reg", "close"), [(0.01, 2e-5), (0.1, 1e-5), (1, 1e-5)])
def test_products_of_rows_whitened_in_float32_are_those_of_float64(lambda_reg, close) -> None:
    torch.manual_seed(0)
    scales = torch.arange(1, 129) ** -2.0  # eigenvalues of the Gram matrix fall by 1e8
    x = torch.randn(500, 128) * scales @ torch.linalg.qr(torch.randn(128, 128))[0]
    ridge = Ridge(lambda_reg)
    factor = ridge.factor(ridge.gram([x]))
    assert factor.shape == (1, 128, 128)
    solved = torch.cholesky_solve(x.double().T, factor[0])
    truth = x.double() @ solved
    left, right = ridge.whiten(x, factor.float()), ridge.whiten(x, factor).float()
    found = left @ right.T
    torch.testing.assert_close(found, truth.float(), rtol=0, atol=close * float(truth.std()))
    # As good, apart from the luck of rounding, as one side solved in float64 and rounded.
    whitened, rounded = ((each - truth).abs().max() for each in (found, x @ solved.float()))
    assert whitened < 3 * rounded
    norms = left.square().sum(1)
    torch.testing.assert_close(norms, truth.diagonal().float(), rtol=2e-5, atol=0)
