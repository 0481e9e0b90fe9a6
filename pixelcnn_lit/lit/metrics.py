"""Figures over a split, exact for short batches and several processes."""

from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric


class Nats(NamedTuple):
    """Nats an image over a split.

    mean: []. standard_error: of the mean, [], NaN of one image. per_class: its mean, [num_classes], NaN where it is
    absent. images: their number, [].
    """

    mean: Tensor
    standard_error: Tensor
    per_class: Tensor
    images: Tensor


class MeanNats(Metric):
    """Mean nats an image, over all and per class: sums over counts, exact for short batches and several processes."""

    full_state_update = False
    nats: Tensor
    squares: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(num_classes), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_classes), dist_reduce_fx="sum")

    def update(self, nats: Tensor, y: Tensor) -> None:
        """Add nats [B] of images of classes y [B]."""
        self.nats.index_add_(0, y, nats.to(self.nats.dtype))
        self.squares += nats.to(self.squares.dtype).square().sum()
        self.images.index_add_(0, y, torch.ones_like(nats, dtype=self.images.dtype))

    def compute(self) -> Nats:
        images = self.images.sum()
        mean = self.nats.sum() / images
        variance = (self.squares / images - mean.square()).clamp_min(0) / (images - 1)  # of the mean
        return Nats(mean, variance.sqrt(), self.nats / self.images, images)


def per_class(counted: Tensor) -> list[float | None]:
    """Share on the diagonal in each row of a confusion matrix; None, as JSON knows no NaN, where a row is empty."""
    return [int(row[n]) / int(row.sum()) if row.sum() else None for n, row in enumerate(counted)]


def accuracy(counted: Tensor) -> float:
    """Share of images on the diagonal of a confusion matrix [num_classes,num_classes]."""
    return int(counted.diagonal().sum()) / int(counted.sum())


def share_buffers(trainer: L.Trainer, net: nn.Module) -> None:
    """BatchNorm's statistics are each process's own; let those be scored that are saved, which are the first one's."""
    if trainer.world_size > 1:
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, src=0)
