"""The parts that networks share: causal convolutions, norms that cannot leak, heads."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixelcnn_lit.nn.caches import Convolution, State, TapsCache
from pixelcnn_lit.nn.wavefronts import At

Cache = TypeVar("Cache", bound=TapsCache)
Layer = TypeVar("Layer", bound=nn.Module)


class Layers(nn.ModuleList, Generic[Layer]):
    """A ModuleList that says what its modules are."""

    def __iter__(self) -> Iterator[Layer]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__iter__()  # pyright: ignore[reportReturnType]


class CausalConv2d(nn.Module):
    """A masked k×k convolution (van den Oord et al. 2016, Pixel Recurrent Neural Networks, section 3.4).

    Mask A leaves the pixels before the current one in raster order, B also the current one. The kernel rows below the
    centre, dead under either mask, do not exist: the weight is [out, in, k//2+1, k]. The mask multiplies the weight
    in each forward, so masked weights get no gradient and stay the zeros they began as.

    Example:
        >>> CausalConv2d(3, 8, kernel_size=5, mask_type="A").mask[0, 0]
        tensor([[1., 1., 1., 1., 1.],
                [1., 1., 1., 1., 1.],
                [1., 1., 0., 0., 0.]])
    """

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, mask_type: Literal["A", "B"]) -> None:
        super().__init__()
        self.rows = kernel_size // 2 + 1
        self.side = kernel_size // 2
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

    def cache(
        self, state: State[Cache], before: nn.LayerNorm | None = None, after: nn.BatchNorm2d | None = None
    ) -> Cache:
        """Return what computes this convolution step by step, with the norms `before` and `after` it."""
        return state.cache(Convolution(self.weight * self.mask, self.bias, self.mask, before, after))

    def receptive_field(self, seen: Tensor) -> Tensor:
        """Return the inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        mask = self.mask.cpu()
        below = F.pad(seen.to(mask)[None, None], (0, 0, 0, self.rows - 1))
        return F.conv_transpose2d(below, mask, padding=(self.rows - 1, self.side))[0, 0] > 0


def receptive_field(stack: nn.Module, image_size: tuple[int, int], i: int, j: int) -> Tensor:
    """Return what a stack of causal convolutions sees from row i, column j: bool [H,W].

    Its convolutions must lie in it in the order in which they are applied.
    """
    seen = torch.zeros(image_size, dtype=torch.bool)
    seen[i, j] = True
    for layer in reversed([module for module in stack.modules() if isinstance(module, CausalConv2d)]):
        seen = layer.receptive_field(seen)
    return seen


def every_earlier_pixel(image_size: tuple[int, int], i: int, j: int) -> Tensor:
    """Return the pixels before row i, column j in raster order, bool [H,W]."""
    height, width = image_size
    return (torch.arange(height * width) < i * width + j).view(height, width)


def pixel_before(x: Tensor) -> Tensor:
    """Move each pixel of [B,C,H,W] one place on in raster order, over the ends of rows; zeros come first."""
    return F.pad(x.flatten(2), (1, -1)).view_as(x)


@runtime_checkable
class Checkpointable(Protocol):
    """A block that may keep its inputs alone for the backward pass, which then computes its inside again."""

    checkpointable: bool


def checkpoint_blocks(net: nn.Module) -> int:
    """Let the blocks of a network that are `Checkpointable` trade time for memory. Returns their number."""
    blocks = [module for module in net.modules() if isinstance(module, Checkpointable) and module.checkpointable]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel: [B,C,H,W] -> [B,C,H,W]. No pixel sees another one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class PreNormBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the identity at the start.

    Example:
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.equal(PreNormBlock(8, dropout=0.0)(x), x)
        True
    """

    checkpointable = True

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.norm2 = ChannelNorm(channels)
        self.conv1 = CausalConv2d(channels, channels, 3, "B")
        self.conv2 = CausalConv2d(channels, channels, 3, "B")
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        h = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.relu(self.norm2(h))))

    def stepper(self, state: State[TapsCache]) -> "PreNormStepper":
        return PreNormStepper(self, state)


class PreNormStepper:
    """A `PreNormBlock` in steps, without dropout."""

    def __init__(self, block: PreNormBlock, state: State[TapsCache]) -> None:
        self.conv1 = block.conv1.cache(state, before=block.norm1)
        self.conv2 = block.conv2.cache(state, before=block.norm2)

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [n,C] -> [n,C], in place."""
        self.conv1.write_relu(x, at)
        self.conv2.write_relu(self.conv1.output(at), at)
        return self.conv2.add_output(x, at)


class CausalHead(nn.Sequential):
    """From the blocks to the features: a norm, two more masked convolutions and a 1×1, a ReLU before each."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            ChannelNorm(channels),
            nn.ReLU(),
            CausalConv2d(channels, channels, 3, "B"),
            nn.ReLU(),
            CausalConv2d(channels, channels, 3, "B"),
            nn.ReLU(),
            nn.Conv2d(channels, out_channels, 1),
        )

    def stepper(self, state: State[TapsCache]) -> "CausalHeadStepper":
        return CausalHeadStepper(self, state)


class CausalHeadStepper:
    """A `CausalHead` in steps."""

    def __init__(self, head: CausalHead, state: State[TapsCache]) -> None:
        norm, _, conv1, _, conv2, _, out = head
        assert isinstance(norm, ChannelNorm)
        assert isinstance(conv1, CausalConv2d)
        assert isinstance(conv2, CausalConv2d)
        assert isinstance(out, nn.Conv2d)
        self.convolutions = [conv1.cache(state, before=norm), conv2.cache(state)]
        self.bias = out.bias
        self.matrix = out.weight[..., 0, 0].T

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [n,C] -> features [n,D]."""
        for convolution in self.convolutions:
            convolution.write_relu(x, at)
            x = convolution.output(at)
        assert self.bias is not None
        return torch.addmm(self.bias, x.relu_(), self.matrix)


class PointwiseHead(nn.Sequential):
    """From the layers to the features, within each pixel: two 1×1 convolutions, a ReLU before each."""

    def __init__(self, channels: int, out_channels: int) -> None:
        convs = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, out_channels, 1)
        super().__init__(ChannelNorm(channels), nn.ReLU(), convs[0], nn.ReLU(), convs[1])

    def stepper(self) -> "PointwiseHeadStepper":
        return PointwiseHeadStepper(self)


class PointwiseHeadStepper:
    """A `PointwiseHead` in steps."""

    def __init__(self, head: PointwiseHead) -> None:
        norm, _, hidden, _, out = head
        assert isinstance(norm, ChannelNorm)
        assert isinstance(hidden, nn.Conv2d)
        assert isinstance(out, nn.Conv2d)
        assert hidden.bias is not None
        assert out.bias is not None
        self.norm = norm.normalized_shape, norm.weight, norm.bias, norm.eps
        self.bias1, self.matrix1 = hidden.bias, hidden.weight[..., 0, 0].T.contiguous()
        self.bias2, self.matrix2 = out.bias, out.weight[..., 0, 0].T.contiguous()

    def step(self, x: Tensor) -> Tensor:
        """x [n,C] -> features [n,D]."""
        x = torch.addmm(self.bias1, torch.layer_norm(x, *self.norm).relu_(), self.matrix1)
        return torch.addmm(self.bias2, x.relu_(), self.matrix2)


def lstm_cell(gates: Tensor, c: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the new state and cell, from the gates o, f, i, g along `dim`, as wide as the states each, and the cell.

    van den Oord et al. 2016, Pixel Recurrent Neural Networks, equation 3. Computed in the precision of the cell: in
    bf16, a long sum would stand still.
    """
    o, f, i, g = gates.to(c.dtype).chunk(4, dim=dim)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c.tanh()).to(gates.dtype), c
