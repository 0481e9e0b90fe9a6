"""How a network reads the levels of an image, and its class."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pixelcnn_lit.nn.ordinal import OrdinalRows


class LevelEmbedding(nn.Module):
    """What a network reads of an image: each level as a number and as a row of a table, and a channel of ones.

    The number is the level scaled to [-1, 1], never by the values in the batch. From the number alone a network learns
    late what a level is beside being a little more than the one before: where MNIST is white, 253 is followed by 253,
    and 254 by 254. The tables are `OrdinalRows`, so that the levels of photographs remain neighbours. The ones tell the
    zeros of padding from mid-grey pixels.

    Args:
        channels, levels: of the images, whose values are 0 to levels - 1: what is beyond is read as something else.
        width: of the tables, one a channel, which is `model.level_channels`; 0 is the number alone, as published, and
            what checkpoints from before there were tables have.
    """

    def __init__(self, channels: int, levels: int, width: int) -> None:
        super().__init__()
        self.channels, self.levels, self.out_channels = channels, levels, channels * (1 + width) + 1
        tables = [nn.Embedding(levels, width) for _ in range(channels if width else 0)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.3)  # OrdinalRows keeps the size; with 1, equal steps came less far
            parametrize.register_parametrization(table, "weight", OrdinalRows(levels))
        self.tables: Any = nn.ModuleList(tables)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """uint8 [B,C,...] -> [B,out_channels,...] in the dtype of `like`."""
        return self.reader(like)(x).contiguous()  # it is the weights that decide how the network lies in memory

    def reader(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """`forward` with its rows at hand, for many small calls."""
        numbers = torch.arange(self.levels, dtype=like.dtype, device=like.device)[:, None] * (2 / (self.levels - 1)) - 1
        with torch.autocast(like.device.type, enabled=False):  # training and scoring read the same rows
            rows = [torch.cat([numbers, table.weight.to(like.dtype)], dim=1) for table in self.tables]
        first = self.levels * torch.arange(self.channels, device=like.device)  # of each channel's rows
        return partial(_look_up, torch.cat(rows or self.channels * [numbers]), first)


def _look_up(rows: Tensor, first: Tensor, x: Tensor) -> Tensor:
    read = F.embedding(x.movedim(1, -1) + first, rows).flatten(-2)
    return F.pad(read, (0, 1), value=1.0).movedim(-1, 1)


class ClassEmbedding(nn.Module):
    """A bias per class and channel. Row `num_classes` means "no class"; unconditional networks use only that row."""

    def __init__(self, num_classes: int, channels: int, conditional: bool) -> None:
        super().__init__()
        self.no_class, self.conditional = num_classes, conditional
        self.table = nn.Embedding(num_classes + 1, channels)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, y: Tensor) -> Tensor:
        """int64 [B] -> [B,channels,1,1]."""
        row = y if self.conditional else torch.full_like(y, self.no_class)
        return self.table(row)[:, :, None, None]
