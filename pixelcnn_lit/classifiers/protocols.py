"""The contract of the classifiers. Letters: B batch, C channels, H W size, F features."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Classifier(Protocol):
    """A module made of `image_shape`, `num_classes` and its own settings."""

    body: Callable[[Tensor], Tensor]  # scaled images [B,C,H,W] -> features [B,F]
    head: Callable[[Tensor], Tensor]  # features -> logits [B,num_classes]


@runtime_checkable
class OwnScale(Protocol):
    """A classifier whose images are not scaled by the statistics of those that it is trained on.

    mean, std: of each channel, or of all, as shares of the brightest level.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@runtime_checkable
class Pretrained(Protocol):
    """A classifier that starts from weights that were trained elsewhere."""

    def load_pretrained(self) -> None:
        """Take these weights. Raises UserError where they cannot be had."""
        ...
