"""The ridge solve of TRAK: Gram matrices and Cholesky factors in float64, by blocks of layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.errors import InputError

PANEL = 1024  # columns of a Gram matrix per product


@dataclass(frozen=True)
class Ridge:
    """The inverse of A = Phi'Phi + lambda I for features Phi, through its Cholesky factors.

    lambda is lambda_reg tr(Phi'Phi) / k. Features of several blocks lie side by side. Each block has
    its own A and lambda, as if Phi'Phi were zero between blocks (as K-FAC assumes between layers).

    traker's own score computer divides the inverse by its mean absolute entry. That removes the
    unit of the scores and gives every checkpoint an arbitrary weight, so it is not used here.

    Raises:
        InputError: lambda_reg is negative or not finite.
    """

    lambda_reg: float
    num_blocks: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_reg < float("inf"):
            raise InputError(f"lambda_reg={self.lambda_reg}: must be finite and not negative")

    def gram(self, parts: Iterable[np.ndarray | Tensor]) -> Tensor:
        """Gram matrices Phi'Phi of the blocks, (blocks, k, k) float64.

        Args:
            parts: consecutive rows of Phi, each (rows, blocks k).

        Raises:
            InputError: a feature or its square is not finite, or all squares of a block vanish.
        """
        products = (
            torch.stack([_lower(x) for x in part.chunk(self.num_blocks, 1)])
            for part in (torch.as_tensor(x).to(self.device, torch.float32) for x in parts)
        )
        gram = next(products).double()
        for product in products:
            gram.add_(product)
        gram = gram.tril() + gram.tril(-1).mT
        if not gram.isfinite().all():
            raise InputError("the training features are not finite; has a checkpoint diverged?")
        # Squares below this lose digits in float32. No ridge helps a matrix of zeros.
        float32 = torch.finfo(torch.float32)
        if (gram.diagonal(dim1=1, dim2=2).amax(1) < float32.tiny / float32.eps).any():
            raise InputError(
                "the training features of a block are zero, or nearly so; has a checkpoint "
                "diverged, or does a part of the model have no effect on its output?"
            )
        return gram

    def factor(self, gram: Tensor) -> Tensor:
        """Lower Cholesky factors L of A = L L', (blocks, k, k) float64, from Gram matrices.

        Raises:
            InputError: A is singular, or so close to it that L would be rounding noise.
        """
        return torch.stack([self._factor(block) for block in gram])

    def _factor(self, gram: Tensor) -> Tensor:
        diagonal, regularised = gram.diagonal(), gram.clone()
        regularised.diagonal().add_(self.lambda_reg * diagonal.mean())
        factor, info = torch.linalg.cholesky_ex(regularised)
        # The Gram matrix has float32 rounding: a smaller pivot is no better than zero.
        noise = torch.finfo(torch.float32).eps * diagonal.max()
        if info > 0 or not factor.diagonal().square().min() > noise:
            raise InputError(
                f"Phi'Phi + lambda I is singular with lambda_reg {self.lambda_reg} and proj_dim "
                f"{len(gram)}; use a larger lambda_reg, e.g. 0.1"
            )
        return factor

    def whiten(self, rows: np.ndarray | Tensor, factors: np.ndarray | Tensor) -> Tensor:
        """Whitened features X L^-T, (n, blocks k), in the precision of the factors.

        The product of two whitened rows is x' A^-1 y. In float32 its error is about 1e-7 times the
        square root of A's condition number (1e-6 at lambda_reg 0.1). That is as good as solving one
        side in float64 and rounding it, and as fast as a product of matrices.

        Args:
            rows: X, (n, blocks k).
            factors: L of each block, (blocks, k, k) or one below the other, (blocks k, k).
        """
        factors = torch.as_tensor(factors).to(self.device)
        factors = factors.view(self.num_blocks, -1, factors.shape[-1])
        parts = torch.as_tensor(rows).to(self.device, factors.dtype).chunk(self.num_blocks, 1)
        each = [
            torch.linalg.solve_triangular(f.T, x, upper=True, left=False)
            for x, f in zip(parts, factors, strict=True)
        ]
        return each[0] if len(each) == 1 else torch.cat(each, 1)


def _lower(x: Tensor) -> Tensor:
    """x' x for x (n, k), by panels of columns. Entries above the panels' diagonal stay zero."""
    if x.shape[1] <= PANEL:
        return x.T @ x
    product = x.new_zeros(x.shape[1], x.shape[1])
    for i in range(0, x.shape[1], PANEL):
        torch.mm(x[:, i:].T, x[:, i : i + PANEL], out=product[i:, i : i + PANEL])
    return product
