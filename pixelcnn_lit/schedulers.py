"""Learning rates over a run."""

import math
from typing import Annotated

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pixelcnn_lit.build import Range


class WarmupCosine(LambdaLR):
    """Up to the optimizer's learning rate in a straight line, then down to zero along half a cosine.

    `total_steps` is the present run's, not saved with it: a run that goes on for longer follows the longer cosine.
    (torch's OneCycleLR divides by zero at 20 steps and cannot be extended.)

    Args:
        total_steps: optimizer steps of the whole run.
        warmup: share of them, at least one step.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: Annotated[float, Range(0, 1)] = 0.05) -> None:
        warmup_steps = max(1, round(warmup * total_steps))

        def factor(step: int) -> float:
            rise = (step + 1) / warmup_steps
            progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return min(rise, 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, progress))))

        super().__init__(optimizer, factor)
