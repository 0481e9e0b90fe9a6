"""The parts that networks share: causal convolutions, a norm that cannot leak, the class embedding."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scale(x: Tensor, levels: int, like: Tensor) -> Tensor:
    """Levels 0..V-1 to [-1, 1] in the dtype of `like`, with a channel of ones: [B,C,H,W] -> [B,C+1,H,W].

    The ones tell the zeros of padding from mid-grey pixels. Never depends on the values in the batch.
    """
    scaled = x.to(like.dtype) * (2 / (levels - 1)) - 1
    return torch.cat([scaled, torch.ones_like(scaled[:, :1])], dim=1)


class CausalConv2d(nn.Module):
    """A masked k×k convolution (van den Oord et al. 2016, Pixel Recurrent Neural Networks, section 3.4).

    Mask A leaves the pixels before the current one in raster order, B also the current one. The kernel rows below the
    centre, dead under either mask, do not exist: the weight is [out, in, k//2+1, k]. The mask multiplies the weight
    in each forward, so masked weights get no gradient and stay the zeros they began as.
    """

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, mask_type: Literal["A", "B"]) -> None:
        super().__init__()
        self.rows, self.side = kernel_size // 2 + 1, kernel_size // 2
        mask = torch.ones(1, 1, self.rows, kernel_size)
        mask[..., -1, self.side + (mask_type == "B") :] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, self.rows, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        live_taps = (self.rows - 1) * kernel_size + self.side + (mask_type == "B")
        fan_in = in_channels * live_taps
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_in))
        with torch.no_grad():
            self.weight.mul_(mask)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,out,H,W]."""
        padded = F.conv2d(x, self.weight * self.mask, self.bias, padding=(self.rows - 1, self.side))
        return padded[:, :, : x.shape[2]]  # padding is symmetric; its rows below the image are cut off

    def reach(self, seen: Tensor) -> Tensor:
        """The inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        below = F.pad(seen.to(self.mask)[None, None], (0, 0, 0, self.rows - 1))
        return F.conv_transpose2d(below, self.mask, padding=(self.rows - 1, self.side))[0, 0] > 0


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel: [B,C,H,W] -> [B,C,H,W]. No pixel sees another one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


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
