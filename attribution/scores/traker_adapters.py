"""traker's extension points filled in: the margin, hook gradients, the sketch, and a ridge solve in float64."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from trak.gradient_computers import AbstractGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import AbstractProjector
from trak.score_computers import AbstractScoreComputer

from attribution.errors import InputError
from attribution.gradients import GradientError
from attribution.gradients.per_sample import margins
from attribution.gradients.sketch import Sketch

BLOCK = 4096  # training examples per product
PANEL = 1024  # columns of a Gram matrix that are made at a time

Batch = tuple[Tensor, Tensor]  # images (B, channels, Y, X) and labels (B,)


class MarginOutput(AbstractModelOutput):
    """The margin of the label, for models that return logits or an object with `.logits`."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(
        model: nn.Module, weights: dict, buffers: dict, image: Tensor, label: Tensor
    ) -> Tensor:
        """Margin () of one sample, image (channels, Y, X) and label (); may run under vmap."""
        output = torch.func.functional_call(model, (weights, buffers), image.unsqueeze(0))
        return margins(getattr(output, "logits", output), label.unsqueeze(0)).sum()

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: dict, buffers: dict, batch: Batch
    ) -> Tensor:
        """1 - p of the label, (B, 1): by how much a change of the margin changes the loss."""
        images, labels = batch
        with torch.no_grad():
            output = torch.func.functional_call(model, (weights, buffers), images)
            f = margins(getattr(output, "logits", output), labels)
        return (-f).sigmoid().unsqueeze(1)  # 1 - sigmoid(f) would cancel to zero


@dataclass
class Pending:
    """A batch whose gradients the projector will sketch while they arise."""

    model: nn.Module
    images: Tensor  # (B, channels, Y, X)
    labels: Tensor  # (B,)
    bfloat16: bool  # run the model under autocast
    margins: Tensor | None = None  # (B,), known when it is projected


class HookGradientComputer(AbstractGradientComputer):
    """Leaves the gradients of a batch to SketchProjector, which never forms them all."""

    bfloat16 = False

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        grad_wrt: object = None,
    ) -> None:
        if grad_wrt is not None:
            raise InputError("grad_wrt is not supported: the sketch takes all parameters")
        super().__init__(model, task, grad_dim, dtype, device)
        self.load_model_params(model)

    def load_model_params(self, model: nn.Module) -> None:
        self.model = model
        self._kept: Pending | None = None

    def compute_per_sample_grad(self, batch: Batch) -> Pending:
        images, labels = batch
        self._kept = Pending(self.model, images, labels, self.bfloat16)
        return self._kept

    def compute_loss_grad(self, batch: Batch) -> Tensor:
        """1 - p of the label, (B, 1), of the batch that was projected last."""
        kept = self._kept
        if kept is None or kept.margins is None or kept.labels is not batch[1]:
            raise RuntimeError("compute_loss_grad takes the batch that was just projected")
        return (-kept.margins).sigmoid().unsqueeze(1)


class BFloat16GradientComputer(HookGradientComputer):
    """The same with the model under bfloat16 autocast; what its layers add up to stays float32."""

    bfloat16 = True


class SketchProjector(AbstractProjector):
    """The sketch as traker's projector, an independent one for every model id.

    Args:
        proj_dim: length of the features, all blocks together.
        gpu_kernels: as Sketch's.
    """

    _model_id: int | None
    _sketch: Sketch | None

    def __init__(
        self,
        proj_dim: int,
        seed: int = 0,
        device: str = "cpu",
        num_blocks: int = 1,
        gpu_kernels: bool = True,
    ) -> None:
        super().__init__(0, proj_dim, seed, "sketch", device)
        self.num_blocks, self.gpu_kernels = num_blocks, gpu_kernels
        self.free_memory()

    def project(self, grads: Pending, model_id: int) -> Tensor:
        """Features (B, proj_dim) float32, new memory, which traker divides in place.

        Raises:
            InputError: the model's gradients would be wrong or incomplete.
        """
        if self._sketch is None or self._model_id != model_id:
            self._model_id = model_id
            size, seed = self.proj_dim // self.num_blocks, f"{self.seed}/{model_id}"
            self._sketch = Sketch(
                size, seed, num_blocks=self.num_blocks, gpu_kernels=self.gpu_kernels
            )
        with torch.autocast(grads.images.device.type, torch.bfloat16, enabled=grads.bfloat16):
            try:
                features, grads.margins = self._sketch.features(
                    grads.model, grads.images, grads.labels
                )
            except GradientError as error:
                raise InputError(f"model: {error}") from error
        return features

    def free_memory(self) -> None:
        self._model_id, self._sketch = None, None


def _lower(x: Tensor) -> Tensor:
    """x' x of features (n, k), in panels of columns that begin at the diagonal: nothing above them."""
    if x.shape[1] <= PANEL:
        return x.T @ x
    product = x.new_zeros(x.shape[1], x.shape[1])
    for i in range(0, x.shape[1], PANEL):
        torch.mm(x[:, i:].T, x[:, i : i + PANEL], out=product[i:, i : i + PANEL])
    return product


class RidgeScoreComputer(AbstractScoreComputer):
    """F (F^T F + l I)^-1 by Cholesky in float64, with l = lambda_reg tr(F^T F)/k and no rescaling.

    Of features that are blocks side by side, each block has its own Gram matrix and l: between
    blocks the Gram matrix is taken to be zero, as K-FAC takes it between layers.

    traker's own divides the inverse by its mean absolute entry, which takes the scores' unit
    away and gives each checkpoint an arbitrary weight. traker's engine has all features solved,
    and scores them against the targets; trak.py whitens both sides, block by block, so that neither
    features nor scores have to be in memory.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        logging_level: int = logging.INFO,
        lambda_reg: float = 0.0,
        num_blocks: int = 1,
    ) -> None:
        super().__init__(dtype, device)
        if not 0 <= lambda_reg < float("inf"):
            raise InputError(f"lambda_reg is {lambda_reg}; it must be finite and not negative")
        self.lambda_reg, self.num_blocks = lambda_reg, num_blocks

    def get_xtx(self, grads: Tensor) -> Tensor:
        """Gram matrices (blocks, k, k) in float64 of features (n, blocks k), from float32 rows."""
        return self.gram(grads.split(BLOCK))

    def gram(self, rows: Iterable[Tensor]) -> Tensor:
        """Gram matrices (blocks, k, k) in float64 of features that come some rows at a time.

        Raises:
            InputError: a feature is not finite, or so large that its square overflows; or all of
                a block are so small that their squares vanish.
        """
        products = (
            torch.stack([_lower(x) for x in some.chunk(self.num_blocks, 1)])
            for some in (part.to(self.device, torch.float32) for part in rows)
        )
        gram = next(products).double()
        for product in products:
            gram.add_(product)
        gram = gram.tril() + gram.tril(-1).mT
        if not gram.isfinite().all():
            raise InputError("the training features are not finite; is the checkpoint diverged?")
        # Below that, squares lose digits in float32; of zeros no ridge could make a Gram matrix.
        float32 = torch.finfo(torch.float32)
        if (gram.diagonal(dim1=1, dim2=2).amax(1) < float32.tiny / float32.eps).any():
            raise InputError(
                "the training features of a block are zero, or nearly so; is the checkpoint "
                "diverged, or does a part of the model not take part?"
            )
        return gram

    def factor(self, xtx: Tensor) -> Tensor:
        """Lower Cholesky factors (blocks, k, k) in float64 of F^T F + l I, given F^T F.

        Raises:
            InputError: one is singular, or so nearly that its factor would be rounding noise.
        """
        return torch.stack([self._factor(block) for block in xtx])

    def _factor(self, xtx: Tensor) -> Tensor:
        diagonal = xtx.diagonal()
        regularised = xtx.clone()
        regularised.diagonal().add_(self.lambda_reg * diagonal.mean())
        factor, info = torch.linalg.cholesky_ex(regularised)
        # The Gram matrix carries float32 rounding, so a pivot below that is no better than zero.
        noise = torch.finfo(torch.float32).eps * diagonal.max()
        if info > 0 or not factor.diagonal().square().min() > noise:
            raise InputError(
                f"F^T F + l I is singular with lambda_reg {self.lambda_reg} and proj_dim "
                f"{len(xtx)}; raise lambda_reg, e.g. to 0.1"
            )
        return factor

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """F (F^T F + l I)^-1, as long as F in float32, for features F and their Gram matrices."""
        factors = self.factor(xtx)
        solved = torch.empty(grads.shape, dtype=torch.float32, device=self.device)
        for rows, out in zip(grads.split(BLOCK), solved.split(BLOCK)):
            parts = rows.to(self.device, torch.float64).chunk(self.num_blocks, 1)
            each = [torch.cholesky_solve(x.T, f).T for x, f in zip(parts, factors, strict=True)]
            out.copy_(torch.cat(each, 1))
        return solved

    def whiten(self, rows: Tensor, factors: Tensor) -> Tensor:
        """X L^-T by block, (n, blocks k), for rows X and factors of A = L L', in their precision.

        The product of two whitened rows is x' A^-1 y. In float32, where this is as fast as a
        product of matrices, it is then as good as where one side is solved for in float64 and
        rounded: about 1e-7 times the square root of A's condition number, 1e-6 at lambda_reg 0.1.
        """
        parts = rows.to(self.device, factors.dtype).chunk(self.num_blocks, 1)
        each = [
            torch.linalg.solve_triangular(f.T, x, upper=True, left=False)
            for x, f in zip(parts, factors, strict=True)
        ]
        return each[0] if len(each) == 1 else torch.cat(each, 1)

    def get_scores(self, features: Tensor, target_grads: Tensor, accumulator: Tensor) -> None:
        """Add features (n, k) times target features (m, k) to accumulator (n, m), in place.

        One side has to be solved, or both whitened. Positive = helpful = the training example's
        presence raises the target's margin.
        """
        features, targets = features.float(), target_grads.float()
        if accumulator.device == features.device:
            accumulator.addmm_(features, targets.T)
        else:  # traker keeps the accumulator of a GPU on the CPU
            accumulator += (features @ targets.T).to(accumulator.device)
