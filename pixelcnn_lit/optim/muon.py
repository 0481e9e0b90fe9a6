"""Muon: whatever is a matrix takes steps that go equally far in all of its directions."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT


class Muon(AdamW):
    """AdamW for vectors; matrices step along the orthogonal factor of their averaged gradients.

    A weight is the matrix of its first dimension by all others, [out, in kh kw] of a convolution. With the gradient G,
        M <- momentum M + (1 - momentum) G
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) U V^T,
    where U S V^T = momentum M + (1 - momentum) G. A gradient is mostly a few directions; U V^T gives the others the
    same weight. Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks
    (kellerjordan.github.io/posts/muon). The factor before U V^T, which makes a step as large as one of AdamW, so that
    both share lr and weight_decay: Liu et al. 2025, Muon is Scalable for LLM Training (arXiv 2502.16982), section 2.2.
    What differs: embeddings, the first and the last layer are matrices like all others, which made no difference on
    MNIST and needs no list of names.

    Args:
        params: ValueError where none of them is a matrix.
        lr, betas, weight_decay: as in AdamW.
        momentum: share of the past in M.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        momentum: Annotated[float, Interval(ge=0, le=0.9999)] = 0.95,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # `fused` sets it, but matrices need gradients that are unscaled before
        self.momentum = momentum
        if not any(p.ndim > 1 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon found no matrix (trainer=fsdp spreads them); type optimizer=adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient; what `closure` returns, which computes them anew."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        gradients = {}
        for group in self.param_groups:
            alike = defaultdict(list)  # by shape: what has the same is computed at once
            for p in group["params"]:
                if p.ndim > 1 and p.grad is not None:
                    alike[p.shape].append(p)
                    gradients[p], p.grad = p.grad, None  # out of AdamW's sight
            ahead = [self._ahead(matrices, [gradients[p] for p in matrices]) for matrices in alike.values()]
            for matrices, directions in zip(alike.values(), orthogonal_factors(ahead), strict=True):
                _move(matrices, directions, group["lr"], group["weight_decay"])
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient
        return loss

    def _ahead(self, matrices: list[Tensor], gradients: list[Tensor]) -> Tensor:
        """Update the averages of matrices of one shape; return what their steps are the orthogonal factors of.

        `_foreach`: on a GPU one kernel for many, where a loop would start each.
        """
        averages = [self._average(p) for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - self.momentum)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack(gradients).lerp(torch.stack(averages), self.momentum).flatten(2)

    def _average(self, p: Tensor) -> Tensor:
        """M, zero before the first step."""
        if not self.state[p]:  # named as by AdamW, whose `load_state_dict` wants a `step`
            self.state[p] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
        return self.state[p]["exp_avg"]


def _move(matrices: list[Tensor], directions: Tensor, lr: float, weight_decay: float) -> None:
    size = 0.2 * math.sqrt(max(directions.shape[1:]))
    torch._foreach_mul_(matrices, 1 - lr * weight_decay)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(matrices, directions.view(-1, *matrices[0].shape).unbind(), alpha=-lr * size)  # pyright: ignore[reportPrivateImportUsage]


def orthogonal_factors(shapes: Sequence[Tensor]) -> list[Tensor]:
    """About U V^T for each U S V^T of each [n,rows,columns]: singular vectors are kept, singular values become about 1.

    Five steps of a Newton-Schulz iteration with the coefficients of Jordan et al., which grow small singular values
    fast rather than let any come to rest at 1: those above 1/500 of the Frobenius norm become 0.68 to 1.2, smaller ones
    485 times as large as they were, and zeros, as of masked weights, stay zeros. The polynomials of the iteration are
    multiplied on the smaller side of the matrix, and meet the matrix once, at the end: a third of the time. Until then,
    all matrices with the same smaller side are multiplied at once: they are small, and each call takes its time.
    """
    scaled = [_scaled(matrices) for matrices in shapes]
    grams = [x @ x.mT for x in scaled]
    alike = defaultdict(list)
    for n, gram in enumerate(grams):
        alike[gram.shape[1], gram.dtype, gram.device].append(n)
    products: dict[int, Tensor] = {}
    for same in alike.values():
        product = _iterated(torch.cat([grams[n] for n in same]))
        products |= zip(same, product.split([len(grams[n]) for n in same]), strict=True)
    factors = [products[n] @ x for n, x in enumerate(scaled)]
    return [
        (x if x.shape == matrices.shape else x.mT).to(matrices.dtype)
        for x, matrices in zip(factors, shapes, strict=True)
    ]


def _scaled(matrices: Tensor) -> Tensor:
    """Matrices with no more rows than columns, in float32 or more, and no singular value above 1."""
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    x = x if x.shape[1] <= x.shape[2] else x.mT
    return x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)


def _iterated(gram: Tensor) -> Tensor:
    """Return the product of the five polynomials, of X X^T [n,side,side]."""
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product = polynomial = _polynomial(gram, identity)
    for _ in range(4):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram, identity)
        product = polynomial @ product
    return product


def _polynomial(gram: Tensor, identity: Tensor) -> Tensor:
    return torch.baddbmm(3.4445 * identity - 4.7750 * gram, gram, gram, alpha=2.0315)
