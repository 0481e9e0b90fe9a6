"""The parts that networks share: causal convolutions, a norm that cannot leak, the class embedding."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scale(x: Tensor, levels: int, like: Tensor) -> Tensor:
    """Levels 0..V-1 to [-1, 1] in the dtype of `like`, with a channel of ones: [B,C,H,W] -> [B,C+1,H,W].

    The ones tell the zeros of padding from mid-grey pixels. Never depends on the values in the batch.
    """
    scaled = x.to(like.dtype) * (2 / (levels - 1)) - 1
    return torch.cat([scaled, torch.ones_like(scaled[:, :1])], dim=1)


def scale_into(values: Tensor, pixel: Tensor, levels: int) -> None:
    """`scale` of one pixel, uint8 [B,C], without its ones, into `values` [B,C]."""
    values.copy_(pixel).mul_(2 / (levels - 1)).sub_(1)


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

    def cache(self, batch: int, width: int, **own: Any) -> "RowCache":
        """What computes this convolution pixel by pixel."""
        return RowCache(self.weight * self.mask, self.bias, self.mask, batch, width, **own)

    def reach(self, seen: Tensor) -> Tensor:
        """The inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        mask = self.mask.cpu()
        below = F.pad(seen.to(mask)[None, None], (0, 0, 0, self.rows - 1))
        return F.conv_transpose2d(below, mask, padding=(self.rows - 1, self.side))[0, 0] > 0


class RowCache:
    """A causal convolution computed one pixel at a time, as one matrix product over the live taps.

    It keeps the inputs of the current row and of the `rows - 1` above it, [B,W+2*side,rows,C]. The rows of a column
    lie beside each other, so that the taps of a pixel are one stretch of memory that needs no gathering: columns
    j-side to j+side, up to the last tap that is alive. Padding is zero.

    A column is a number, which finds ready-made views, or an int64 tensor [1] on the device, which a CUDA graph can
    replay with other values in it. All is made beforehand: between two pixels a small network has microseconds.

    Args:
        weight: masked, [out,in,rows,k]. bias: [out]. mask: [1,1,rows,k].
        before: a norm that stands, with a ReLU, before the convolution.
        after: a BatchNorm that stands behind it, which in eval mode is a multiplication and an addition.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        batch: int,
        width: int,
        before: nn.LayerNorm | None = None,
        after: nn.BatchNorm2d | None = None,
    ) -> None:
        _, channels, rows, k = weight.shape
        if after is not None:
            assert after.running_mean is not None
            assert after.running_var is not None
            scale = after.weight / (after.running_var + after.eps).sqrt()
            weight, bias = weight * scale[:, None, None, None], (bias - after.running_mean) * scale + after.bias
        taps = weight.permute(3, 2, 1, 0)  # [k,rows,in,out]
        alive = (int(mask[0, 0].T.flatten().nonzero().max()) + 1) * channels
        self.matrix, self.side = taps.flatten(0, 2)[:alive].contiguous(), k // 2
        self.bias = bias.repeat(batch, 1)
        self.result = torch.empty_like(self.bias)
        self.norm = before and (before.normalized_shape, before.weight, before.bias, before.eps)
        self.inputs = weight.new_zeros(batch, width + 2 * self.side, rows, channels)
        self.offsets = torch.arange(k, device=weight.device)
        flat = self.inputs.flatten(1)
        self.slots = [self.inputs[:, j + self.side, -1] for j in range(width)]
        self.windows = [flat[:, j * rows * channels :][:, :alive] for j in range(width)]

    def reset(self) -> None:
        self.inputs.zero_()

    def new_row(self) -> None:
        """What was the current row becomes the one above."""
        for row in range(self.inputs.shape[2] - 1):
            self.inputs[:, :, row].copy_(self.inputs[:, :, row + 1])

    def put(self, x: Tensor, j: int | Tensor) -> None:
        """The input [B,C] at column j of the current row."""
        if isinstance(j, int):
            self.slots[j].copy_(x)
        else:
            self.inputs[:, :, -1].index_copy_(1, j + self.side, x[:, None])

    def put_norm(self, x: Tensor, j: int | Tensor) -> None:
        """norm(x) as the input."""
        self.put(torch.layer_norm(x, *self.norm) if self.norm else x, j)

    def put_relu(self, x: Tensor, j: int | Tensor) -> None:
        """relu(norm(x)) as the input."""
        if self.norm:
            x = torch.native_layer_norm(x, *self.norm)[0]
        if isinstance(j, int):
            torch.clamp_min(x, 0, out=self.slots[j])
        else:
            self.put(x.relu(), j)

    def window(self, j: int | Tensor) -> Tensor:
        """The inputs [B,taps*C] under the live taps at column j."""
        if isinstance(j, int):
            return self.windows[j]
        return self.inputs.index_select(1, j + self.offsets).flatten(1)[:, : len(self.matrix)]

    def output(self, j: int | Tensor) -> Tensor:
        """The convolution at column j, [B,out], in a place that the next one overwrites."""
        return torch.addmm(self.bias, self.window(j), self.matrix, out=self.result)

    def add_output(self, x: Tensor, j: int | Tensor) -> Tensor:
        """x [B,out] plus the convolution, in place."""
        return x.add_(self.bias).addmm_(self.window(j), self.matrix)


class ImageRows(RowCache):
    """A RowCache of the first convolution, `layer`, with `scale` folded into its weights: it takes levels 0..V-1."""

    def __init__(self, layer: CausalConv2d, levels: int, batch: int, width: int) -> None:
        weight = layer.weight * layer.mask
        pixels, ones = weight[:, :-1], weight[:, -1:] - weight[:, :-1].sum(1, keepdim=True)
        weight = torch.cat([pixels * (2 / (levels - 1)), ones], dim=1)
        super().__init__(weight, layer.bias, layer.mask, batch, width)
        self.pixel = weight.new_ones(batch, weight.shape[1])
        self.values = self.pixel[:, :-1]

    def put_levels(self, pixel: Tensor, j: int | Tensor) -> None:
        """The pixel, uint8 [B,C], at column j of the current row."""
        self.values.copy_(pixel)
        self.put(self.pixel, j)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel: [B,C,H,W] -> [B,C,H,W]. No pixel sees another one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class PreNormBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the identity at the start."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = CausalConv2d(channels, channels, 3, "B"), CausalConv2d(channels, channels, 3, "B")
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.relu(self.norm2(h))))

    def init_cache(self, *size: int) -> list[RowCache]:
        return [self.conv1.cache(*size, before=self.norm1), self.conv2.cache(*size, before=self.norm2)]

    def step(self, cache: list[RowCache], x: Tensor, j: int | Tensor) -> Tensor:
        """`forward` at column j of the present row, without dropout: x [B,C] -> [B,C], in place."""
        first, second = cache
        first.put_relu(x, j)
        second.put_relu(first.output(j), j)
        return second.add_output(x, j)


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

    def init_cache(self, *size: int) -> list[RowCache]:
        norm, _, conv1, _, conv2, *_ = self
        assert isinstance(conv1, CausalConv2d)
        assert isinstance(conv2, CausalConv2d)
        return [conv1.cache(*size, before=norm if isinstance(norm, nn.LayerNorm) else None), conv2.cache(*size)]

    def step(self, cache: list[RowCache], x: Tensor, j: int | Tensor) -> Tensor:
        """`forward` at column j of the present row: x [B,C] -> features [B,D]."""
        for rows in cache:
            rows.put_relu(x, j)
            x = rows.output(j)
        out = self[-1]
        assert isinstance(out, nn.Conv2d)
        assert out.bias is not None
        return torch.addmm(out.bias, x.relu_(), out.weight[..., 0, 0].T)


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
