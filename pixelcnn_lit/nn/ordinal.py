"""Weights with a row for each level, where level 100 lies beside 101."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class OrdinalRows(nn.Module):
    """A weight [V,width] with a row for each level, as free rows plus rows that are smooth functions of the level.

    weight = free + cosines @ smooth, cosines[v,k] = 8/k cos(pi k (v + 1/2) / V), k = 1 to 32 at most. At the start the
    free rows are zero. The steps of Adam and Muon have a size that does not depend on the gradient's, so a step along a
    slow cosine moves all levels, and neighbours alike, by more than a step of their own rows; the free rows leave
    nothing out of reach. A parametrisation, as torch calls it: `parametrize.cached()` computes the sum only once.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        k = torch.arange(1, min(32, levels - 1) + 1)
        angles = math.pi / levels * (torch.arange(levels)[:, None] + 0.5) * k
        self.cosines = 8 / k * angles.cos()

    def forward(self, free: Tensor, smooth: Tensor) -> Tensor:
        return free + self.cosines.to(smooth) @ smooth  # FSDP casts parameters, and moves nothing else

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return where training starts: no free rows, and smooth ones as large as those of `weight`."""
        gain = self.cosines.square().sum(1).mean().sqrt()
        smooth = torch.randn(self.cosines.shape[1], weight.shape[1], device=weight.device)
        return torch.zeros_like(weight), smooth * weight.std() / gain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts the cosines with the rest. As a buffer they would be averaged by an EMA, and so rounded."""
        self.cosines = fn(self.cosines)
        return super()._apply(fn, recurse)
