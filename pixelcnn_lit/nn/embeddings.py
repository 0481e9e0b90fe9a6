"""Embeddings of the levels of an image, and of its class."""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pixelcnn_lit.nn.layers import Layers
from pixelcnn_lit.nn.ordinal import OrdinalRows
from pixelcnn_lit.nn.wavefronts import At


class LevelEmbedding(nn.Module):
    """Read each level as a number and as a row of a table, and the image as one more channel, of ones.

    The number is the level scaled to [-1, 1], never by the values in the batch. From the number alone a network learns
    late what a level is beside being a little more than the one before: where MNIST is white, 253 is followed by 253,
    and 254 by 254. The tables are `OrdinalRows`, so that the levels of photographs remain neighbours. The ones tell the
    zeros of padding from mid-grey pixels.

    Args:
        channels, levels: of the images, whose values are 0 to levels - 1: what is beyond is read as something else.
        width: of the tables, one a channel; 0 is the number alone.
        ordered: false where levels are names, as the codes of a tokenizer are: a level is read as no number, and its
            row has nothing to do with that of the next.

    Example:
        >>> images = torch.zeros(2, 3, 5, 4, dtype=torch.uint8)
        >>> LevelEmbedding(channels=3, levels=256, width=16)(images, torch.float32).shape
        torch.Size([2, 52, 5, 4])
    """

    def __init__(self, channels: int, levels: int, width: Annotated[int, Ge(0)] = 16, ordered: bool = True) -> None:
        super().__init__()
        if not (ordered or width):
            raise ValueError("width=0 leaves nothing to read where ordered is false; type 16, for example")
        self.channels = channels
        self.levels = levels
        self.ordered = ordered
        self.out_channels = channels * (ordered + width) + 1
        tables = [nn.Embedding(levels, width) for _ in range(channels if width else 0)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.3)  # OrdinalRows keeps the size; with 1, equal steps came less far
            if ordered:
                parametrize.register_parametrization(table, "weight", OrdinalRows(levels))
        self.tables: Layers[nn.Embedding] = Layers(tables)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels uint8 [B,C,H,W] -> [B,out_channels,H,W] in `dtype`, in which rows are computed, too."""
        read = _look_up(*self._rows(dtype, x.device), x)
        return read.contiguous()  # it is the weights that decide how the network lies in memory

    def stepper(self, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, At], Tensor]:
        """Return `forward` with its rows at hand, for many small calls: levels [n,C] -> [n,out_channels]."""
        rows, first = self._rows(dtype, device)
        if self.channels > 1:
            return lambda previous, at: _look_up(rows, first, previous)
        rows = F.pad(rows, (0, 1), value=1.0)  # a row is then all that is read
        return lambda previous, at: F.embedding(previous[:, 0].long(), rows)

    def _rows(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return what each level is read as, [C*V,ordered+width], and where the rows of each channel begin, [C]."""
        numbers = torch.arange(self.levels, dtype=dtype, device=device)[:, None] * (2 / (self.levels - 1)) - 1
        numbers = numbers[:, : int(self.ordered)]
        with torch.autocast(device.type, enabled=False):  # training and scoring read the same rows
            rows = [torch.cat([numbers, table.weight.to(dtype)], dim=1) for table in self.tables]
        return torch.cat(rows or self.channels * [numbers]), self.levels * torch.arange(self.channels, device=device)


class ScaledLevels(nn.Module):
    """Read each level as a number in [0, 1], as published code does: black and the zeros of padding are the same.

    Args:
        channels, levels: of the images.

    Example:
        >>> ScaledLevels(channels=1, levels=256)(torch.tensor([[[[0, 51, 255]]]]), torch.float64)
        tensor([[[[0.0000, 0.2000, 1.0000]]]], dtype=torch.float64)
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.brightest = levels - 1

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels [B,C,H,W] -> [B,C,H,W] in `dtype`."""
        return x.to(dtype) / self.brightest

    def stepper(self, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, At], Tensor]:
        """Return `forward` for a step: levels [n,C] -> [n,C]."""
        return lambda previous, at: self(previous, dtype)


def _look_up(rows: Tensor, first: Tensor, x: Tensor) -> Tensor:
    read = F.embedding(x.movedim(1, -1) + first, rows).flatten(-2)
    return F.pad(read, (0, 1), value=1.0).movedim(-1, 1)


class ClassEmbedding(nn.Module):
    """A bias for each class and channel; row `num_classes` of the table is that of "no class"."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, channels)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [B] -> [B,channels,1,1] in `dtype`: under bf16 autocast, float32 would make a whole stream float32."""
        return self.table(y)[:, :, None, None].to(dtype)

    def rows(self, y: Tensor) -> Tensor:
        """int64 [B] -> [B,channels], for a network that steps."""
        return self.table(y)
