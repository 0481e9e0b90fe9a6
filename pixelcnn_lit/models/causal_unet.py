"""A causal U-Net: one stream of masked convolutions at three resolutions.

Papers: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.4,
    for the masks; Salimans, Karpathy, Chen, Kingma 2017, PixelCNN++ (arXiv 1701.05517), section 2.3, for resolutions
    that halve.
What differs: PixelCNN++ has a stream of the rows above beside that of all earlier pixels; here a pixel of a coarse
    resolution stands for the first of the four that it covers, and so one stream is enough, which costs half. A block
    is a convolution and a 1×1 between a norm and a ReLU: on a CPU other elementwise work takes longer than the
    products. A position is known exactly, by a table a resolution.
Receptive field: every earlier pixel of images up to 4 columns wide. Of wider ones the far ends are missed of the rows
    just above, which no coarser pixel covers yet: with n_residual=6 at most 136 pixels of 783 on 28×28, and 160 of 1023
    on 32×32. `receptive_field` tells.
Training-mode loss: a likelihood.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.attention import PixelSelfAttention, SelfAttentionStepper
from pixelcnn_lit.nn.caches import RasterState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, ChannelNorm, Layers
from pixelcnn_lit.nn.resolutions import RESOLUTIONS, Upsampling, dealt
from pixelcnn_lit.nn.wavefronts import At


class CausalUNet(nn.Module):
    """One stream of causal convolutions at three resolutions: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width, and number of residual blocks, dealt to the way down and up at full, half
            and quarter resolution in turn: 6 is one block everywhere.
        dropout: rate inside each block.

    Example:
        >>> net = CausalUNet((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=6)
        >>> net(torch.randn(3, 2, 5, 4), torch.tensor([0, 9, 10])).shape
        torch.Size([3, 7, 5, 4])
    """

    train_is_likelihood = True

    def __init__(
        self,
        image_size: tuple[int, int],
        in_channels: int,
        num_classes: int,
        out_channels: int,
        hidden_channels: Annotated[int, Ge(1)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.first = CausalConv2d(in_channels, hidden_channels, 7, "A")
        sizes = [image_size]
        for _ in range(1, RESOLUTIONS):
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        body = None
        for r, size in reversed(list(enumerate(sizes))):
            body = Resolution(size, *dealt(n_residual, r), body, hidden_channels, num_classes, dropout)
        assert body is not None
        self.body = body
        self.norm = ChannelNorm(hidden_channels)
        self.out = nn.Conv2d(hidden_channels, out_channels, 1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.body(self.first(h), y))))

    def stepper(self, y: Tensor) -> "CausalUNetStepper":
        return CausalUNetStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        seen = torch.zeros(self.image_size, dtype=torch.bool)
        seen[i, j] = True
        return self.first.receptive_field(self.body.receptive_field(seen))


class CausalUNetStepper:
    """A `CausalUNet` in steps. Coarser resolutions work where one of their pixels begins."""

    replayable = False

    def __init__(self, net: CausalUNet, y: Tensor) -> None:
        self.skew = net.image_size[1]
        self.state = RasterState(len(y), self.skew)
        self.first = net.first.cache(self.state)
        self.body = ResolutionStepper(net.body, y, self.state)
        self.norm = net.norm.normalized_shape, net.norm.weight, net.norm.bias, net.norm.eps
        self.bias = net.out.bias
        self.matrix = net.out.weight[..., 0, 0].T.contiguous()

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        x = self.body.step(self.first.output(at), at)
        assert self.bias is not None
        return torch.addmm(self.bias, torch.layer_norm(x, *self.norm).relu_(), self.matrix)


class Resolution(nn.Module):
    """The blocks at one resolution, and between those on the way down and up the coarser resolutions.

    Why no feature sees too much. Let a pixel (I, J) here stand at (sI, sJ) of the image: its features see only pixels
    before that in raster order. The first convolution begins so, with s = 1, and so it stays:
      * A convolution reads rows above, and of its own row columns <= J: all of them stand before (sI, sJ) or there.
      * `shrink` reads, for (I, J) of the next coarser resolution, the same at (2I, 2J) here, which stands at
        (2sI, 2sJ), as (I, J) does there.
      * `grow` reads, for (i, j) here, (i//2, j//2) there, which stands at (2s (i//2), 2s (j//2)): in row si no further
        than column sj, if i is even, and above it if i is odd.
    """

    def __init__(
        self,
        size: tuple[int, int],
        n_down: int,
        n_up: int,
        coarser: "Resolution | None",
        channels: int,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.size = size
        self.position = nn.Parameter(0.05 * torch.randn(channels, *size))
        self.embed = ClassEmbedding(num_classes, channels)
        self.down: Layers[Block] = Layers(Block(channels, dropout) for _ in range(n_down))
        self.up: Layers[Block] = Layers(Block(channels, dropout) for _ in range(n_up))
        self.coarser = coarser
        if coarser is None:
            self.attention = PixelSelfAttention(channels, (channels + 1) // 2, n_heads=1)
        else:
            self.shrink = CausalConv2d(channels, channels, 3, "B", stride=2)
            self.grow = Upsampling(channels, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B,channels,H,W] -> the same."""
        x = x + self.position.to(x.dtype) + self.embed(y, x.dtype)  # one by one: a sum of both is as large as x
        for block in self.down:
            x = block(x)
        if self.coarser is None:
            x = self.attention(x)
        else:
            x = x + self.grow(self.coarser(self.shrink(x), y))[:, :, : x.shape[2], : x.shape[3]]
        for block in self.up:
            x = block(x)
        return x

    def receptive_field(self, seen: Tensor) -> Tensor:
        """Return the inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        for block in self.up:
            seen = block.conv.receptive_field(seen)
        if self.coarser is None:
            last = int(seen.flatten().nonzero().max())
            seen = (torch.arange(seen.numel()) <= last).view_as(seen)
        else:
            coarse = self.coarser.receptive_field(self.grow.receptive_field(seen))
            seen = seen | self.shrink.receptive_field(coarse, seen.shape)
        for block in self.down:
            seen = block.conv.receptive_field(seen)
        return seen


class ResolutionStepper:
    """A `Resolution`, and the coarser ones, in steps; `state` is that of its caches."""

    def __init__(self, resolution: Resolution, y: Tensor, state: RasterState) -> None:
        self.state = state
        self.label = resolution.embed.rows(y)
        self.positions = resolution.position.flatten(1).T.contiguous()  # [HW,channels]
        self.down = [BlockStepper(block, state) for block in resolution.down]
        self.up = [BlockStepper(block, state) for block in resolution.up]
        self.coarser = None
        if resolution.coarser is None:
            self.attention = SelfAttentionStepper(resolution.attention, len(y), resolution.size)
        else:
            self.shrink = resolution.shrink.cache(state)
            assert resolution.grow.bias is not None
            self.grow = resolution.grow.matrix()
            self.grow_bias = resolution.grow.bias.repeat(4)
            coarse_width = (state.width + 1) // 2
            self.coarser = ResolutionStepper(resolution.coarser, y, RasterState(len(y), coarse_width))
            # What the four pixels of each coarse column read.
            self.grown = self.grow.new_empty(coarse_width, len(y), 2, 2, len(self.grow))

    def step(self, x: Tensor, at: At) -> Tensor:
        """[B,channels] -> the same, in place."""
        x.add_(self.label).add_(self.positions[at.position])
        for block in self.down:
            x = block.step(x, at)
        if self.coarser is None:
            x = self.attention.step(x, at)
        else:
            self.shrink.write(x, at)
            if (at.row % 2, at.column % 2) == (0, 0):
                self.coarser.state.begin(at.coarser())
                coarse = self.coarser.step(self.shrink.output(at), at.coarser())
                torch.addmm(self.grow_bias, coarse, self.grow, out=self.grown[at.column // 2].flatten(1))
            x.add_(self.grown[at.column // 2, :, at.row % 2, at.column % 2])
        for block in self.up:
            x = block.step(x, at)
        return x


class Block(nn.Module):
    """x + conv1×1(relu(conv(norm(x)))), the identity at the start.

    Example:
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.equal(Block(8, dropout=0.0)(x), x)
        True
    """

    checkpointable = True

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = CausalConv2d(channels, channels, 3, "B")
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        return x + self.out(self.dropout(F.relu(self.conv(self.norm(x)))))


class BlockStepper:
    """A `Block` in steps, without dropout."""

    def __init__(self, block: Block, state: RasterState) -> None:
        self.conv = block.conv.cache(state, before=block.norm)
        self.matrix = block.out.weight[..., 0, 0].T.contiguous()

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [B,C] -> [B,C], in place."""
        self.conv.write_norm(x, at)
        return x.addmm_(self.conv.output(at).relu_(), self.matrix)
