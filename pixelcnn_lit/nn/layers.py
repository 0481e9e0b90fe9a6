"""The parts that networks share: causal convolutions, norms that cannot leak, heads."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MakeCache = Callable[..., Any]  # (weight, bias, mask, and what stands before or after) -> a cache of `caches`


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
        padded = F.pad(x, (0, 0, self.rows - 1, 0))  # above alone: conv2d's own padding would add rows below, too
        return F.conv2d(padded, self.weight * self.mask, self.bias, padding=(0, self.side))

    def cache(self, make: MakeCache, **own: Any) -> Any:
        """What computes this convolution pixel by pixel or front by front: see `caches`."""
        return make(self.weight * self.mask, self.bias, self.mask, **own)

    def reach(self, seen: Tensor) -> Tensor:
        """The inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        mask = self.mask.cpu()
        below = F.pad(seen.to(mask)[None, None], (0, 0, 0, self.rows - 1))
        return F.conv_transpose2d(below, mask, padding=(self.rows - 1, self.side))[0, 0] > 0


def recompute_blocks(net: nn.Module) -> int:
    """Blocks keep their inputs alone for the backward pass, and compute anew what lies within. Returns their number."""
    blocks = [module for module in net.modules() if getattr(module, "recomputable", False)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel: [B,C,H,W] -> [B,C,H,W]. No pixel sees another one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class PreNormBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the identity at the start."""

    recomputable = True

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = CausalConv2d(channels, channels, 3, "B"), CausalConv2d(channels, channels, 3, "B")
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.relu(self.norm2(h))))

    def init_cache(self, make: MakeCache) -> list[Any]:
        return [self.conv1.cache(make, before=self.norm1), self.conv2.cache(make, before=self.norm2)]

    def step(self, cache: list[Any], x: Tensor, at: Any) -> Tensor:
        """`forward` at a column of the present row or a front, without dropout: x [n,C] -> [n,C], in place."""
        first, second = cache
        first.put_relu(x, at)
        second.put_relu(first.output(at), at)
        return second.add_output(x, at)


class OutputStack(nn.Sequential):
    """From the blocks to the features: two more masked convolutions and a 1×1, a ReLU before each."""

    def __init__(self, channels: int, out_channels: int, norm: nn.Module) -> None:
        super().__init__(
            norm,
            nn.ReLU(),
            CausalConv2d(channels, channels, 3, "B"),
            nn.ReLU(),
            CausalConv2d(channels, channels, 3, "B"),
            nn.ReLU(),
            nn.Conv2d(channels, out_channels, 1),
        )

    def init_cache(self, make: MakeCache) -> list[Any]:
        norm, _, conv1, _, conv2, *_ = self
        assert isinstance(conv1, CausalConv2d)
        assert isinstance(conv2, CausalConv2d)
        return [conv1.cache(make, before=norm if isinstance(norm, nn.LayerNorm) else None), conv2.cache(make)]

    def step(self, cache: list[Any], x: Tensor, at: Any) -> Tensor:
        """`forward` at a column of the present row or a front: x [n,C] -> features [n,D]."""
        for rows in cache:
            rows.put_relu(x, at)
            x = rows.output(at)
        out = self[-1]
        assert isinstance(out, nn.Conv2d)
        assert out.bias is not None
        return torch.addmm(out.bias, x.relu_(), out.weight[..., 0, 0].T)


class PointwiseStack(nn.Sequential):
    """From the layers to the features, within each pixel: two 1×1 convolutions, a ReLU before each."""

    def __init__(self, channels: int, out_channels: int) -> None:
        convs = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, out_channels, 1)
        super().__init__(ChannelNorm(channels), nn.ReLU(), convs[0], nn.ReLU(), convs[1])

    def init_cache(self) -> tuple[Any, ...]:
        parts: Any = list(self)
        norm, _, hidden, _, out = parts
        matrices = ((conv.bias, conv.weight[..., 0, 0].T.contiguous()) for conv in (hidden, out))
        return (norm.normalized_shape, norm.weight, norm.bias, norm.eps), *matrices

    def step(self, cache: tuple[Any, ...], x: Tensor) -> Tensor:
        """`forward` of pixels [n,C] -> features [n,D]."""
        norm, (bias1, matrix1), (bias2, matrix2) = cache
        x = torch.addmm(bias1, torch.layer_norm(x, *norm).relu_(), matrix1)
        return torch.addmm(bias2, x.relu_(), matrix2)


def lstm(gates: Tensor, c: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The new state and cell, from the gates o, f, i, g along `dim`, as wide as the states each, and the cell before.

    van den Oord et al. 2016, Pixel Recurrent Neural Networks, equation 3. Computed in the precision of the cell: in
    bf16, a long sum would stand still.
    """
    o, f, i, g = gates.to(c.dtype).chunk(4, dim=dim)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c.tanh()).to(gates.dtype), c
