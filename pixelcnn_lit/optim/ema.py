"""The average of the weights that is validated, tested and saved as the model."""

from typing import Annotated

import lightning as L
import torch
from annotated_types import Interval
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.runs.lightning_internals import FloatAveraging


class EMA(FloatAveraging):
    """An exponential moving average that never looks back further than about a tenth of the run.

    After n steps the weights that were are kept by  min(decay, n / (n + 9)).  An average of a fixed length would still
    hold the weights of the start, when a run ends before it. Where the learning rate has fallen to zero at the end, the
    weights themselves are better: callbacks=samples.

    Where the weights are coarser than float32 (trainer.precision=bf16-true), the average is not: rounding would swallow
    its small steps.

    Args:
        decay: at most. 0.999 looks back a thousand steps, once ten thousand have been made.
    """

    def __init__(self, decay: Annotated[float, Interval(ge=0, le=1)] = 0.999) -> None:
        @torch.no_grad()
        def average(averages: list[Tensor], weights: list[Tensor], n: Tensor) -> None:
            new = (9 / (n + 9)).clamp_min(1 - decay)
            for kept, current in zip(averages, weights, strict=True):
                if kept.is_floating_point():
                    kept.lerp_(current.to(kept.dtype), new.to(kept.dtype))
                else:
                    kept.copy_(current)  # a BatchNorm's count of batches

        super().__init__(multi_avg_fn=average)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.precision == "16-true":
            raise UserError(
                "trainer.precision=16-true: torch averages no such weights; type callbacks=samples, or "
                "trainer.precision=16-mixed"
            )
        super().setup(trainer, pl_module, stage)
