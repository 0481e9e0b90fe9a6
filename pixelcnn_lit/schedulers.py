"""Learning rates over a run."""

import math
from typing import Annotated

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pixelcnn_lit.build import Range


class WarmupCosine(LambdaLR):
    """From 1/25 of the optimizer's learning rate up to it along half a cosine, then down to zero along another.

    The course of torch's OneCycleLR, which however divides by zero at 20 steps and cannot be extended: here
    `total_steps` is the present run's, not saved with it, so that a run that goes on follows the longer course.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup: share of them on the way up.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: Annotated[float, Range(0, 1)] = 0.05) -> None:
        top = max(0.0, warmup * total_steps - 1)

        def factor(step: int) -> float:
            if step < top:
                return _half_cosine(1 / 25, 1, step / top)
            return _half_cosine(1, 0, min(1.0, (step - top) / max(1.0, total_steps - 1 - top)))

        super().__init__(optimizer, factor)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
