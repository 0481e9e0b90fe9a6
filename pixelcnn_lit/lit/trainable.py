"""The contract of the modules that a run trains."""

from typing import Any

import lightning as L
from torch import Tensor, nn


class Trainable(L.LightningModule):
    """The contract of the LightningModules here: declarations, and no behaviour.

    It is no `typing.Protocol`, since a Trainer takes a LightningModule, and no type says "both".

    Args:
        FIGURE: the figure that runs are compared by, after "val/" and "test/".
        LOSS: how the loss of training and validation is logged, after "train/" and "val/".
        MONITOR: the figure whose best checkpoint is kept, and whether "min" or "max" is best.
        IDENTITY: the settings that a resumed run must share with its checkpoint, beside the facts of the data.
        figures: of the last validation or test, as result.json holds them, "val/images" among them.
    """

    FIGURE: str
    LOSS: str
    MONITOR: tuple[str, str]
    IDENTITY: tuple[str, ...]
    figures: dict[str, Any]

    def stored(self) -> tuple[nn.Module, dict[str, Any]]:
        """Return what a checkpoint is to be loaded as, and the settings that make it."""
        raise NotImplementedError

    def training_figures(self, loss: Tensor) -> dict[str, Tensor]:
        """Return what is logged of a loss of training, after "train/"; the first of them is shown while it trains."""
        raise NotImplementedError

    def epoch_line(self, loss: float, figures: dict[str, Tensor]) -> str:
        """Return what an epoch has brought, from its mean loss and the last scores."""
        raise NotImplementedError
