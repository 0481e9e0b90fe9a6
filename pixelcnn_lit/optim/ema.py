"""The average of the weights that is validated, tested and saved as the model."""

from typing import Annotated

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.config.errors import UserError


class EMA(WeightAveraging):
    """An exponential moving average that never looks back further than about a tenth of the run.

    After n steps the weights that were are kept by  min(decay, n / (n + 9)).  An average of a fixed length would still
    hold the weights of the start, when a run ends before it. Where the learning rate has fallen to zero at the end, the
    weights themselves are better: callbacks=no_ema.

    Where the weights are coarser than float32 (trainer.precision=bf16-true), the average is not: rounding would swallow
    its small steps.

    Args:
        decay: at most. 0.999 looks back a thousand steps, once ten thousand have been made.
    """

    def __init__(self, decay: Annotated[float, Range(0, 1)] = 0.999) -> None:
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
        """Keep the average where the model will be. It is still on the CPU, where Lightning would leave the average."""
        if trainer.precision == "16-true":
            raise UserError(
                "trainer.precision=16-true: torch averages no such weights; type callbacks=no_ema, or "
                "trainer.precision=16-mixed"
            )
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights. Lightning would exchange them, and so round the average."""
        if self._average_model is not None:
            self._weights = [tensor.detach().clone() for tensor in (*pl_module.parameters(), *pl_module.buffers())]
            self._copy_average_to_current(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average_model is not None:
            for tensor, kept in zip((*pl_module.parameters(), *pl_module.buffers()), self._weights, strict=True):
                tensor.data.copy_(kept)
            del self._weights
