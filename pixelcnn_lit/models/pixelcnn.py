"""PixelCNN: a stack of masked convolutions.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.5.
What differs: the class enters as a bias after the first layer (conditioning as in arXiv 1606.05328, equation 4);
    colour is left to the likelihood; blocks are full-width; by default a norm over channels stands before each
    convolution and the second one starts at zero (`norm=layer`). `norm=batch` is the block of published code.
Receptive field: a triangle that widens by one pixel a row and layer; pixels to the upper right of it are never seen
    (the blind spot), as `receptive_field` tells.
Training-mode loss: a likelihood under `norm=layer`; not under `norm=batch`, whose statistics come from whole images,
    later pixels included.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import State, TapsCache, WavefrontState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, CausalHead, ChannelNorm, Layers, PreNormBlock
from pixelcnn_lit.nn.wavefronts import At


class PixelCNN(nn.Module):
    """A stack of masked convolutions: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width, and number of residual blocks of two 3×3 convolutions.
        norm: "layer" (over channels at each pixel) or "batch" (the published block).
        dropout: rate inside each block of `norm=layer`.

    Example:
        >>> net = PixelCNN((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
        >>> net(torch.randn(3, 2, 5, 4), torch.tensor([0, 9, 10])).shape
        torch.Size([3, 7, 5, 4])
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        in_channels: int,
        num_classes: int,
        out_channels: int,
        hidden_channels: Annotated[int, Ge(1)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        norm: Literal["layer", "batch"] = "layer",
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.train_is_likelihood = norm != "batch"
        self.first = CausalConv2d(in_channels, hidden_channels, 7, "A")
        self.embed = ClassEmbedding(num_classes, hidden_channels)
        self.blocks: Layers[PublishedBlock | PreNormBlock] = Layers(
            PublishedBlock(hidden_channels) if norm == "batch" else PreNormBlock(hidden_channels, dropout)
            for _ in range(n_residual)
        )
        last_norm = nn.Identity() if norm == "batch" else ChannelNorm(hidden_channels)
        self.head = CausalHead(hidden_channels, out_channels, last_norm)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        h = self.first(h)
        h = h + self.embed(y, h.dtype)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def stepper(self, y: Tensor) -> "PixelCNNStepper":
        return PixelCNNStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        seen = torch.zeros(self.image_size, dtype=torch.bool)
        seen[i, j] = True
        for layer in reversed([module for module in self.modules() if isinstance(module, CausalConv2d)]):
            seen = layer.receptive_field(seen)
        return seen


class PixelCNNStepper:
    """A `PixelCNN` in steps."""

    skew = 4  # the first row above is seen up to three columns to the right, further ones up to one more each
    replayable = False

    def __init__(self, net: PixelCNN, y: Tensor) -> None:
        self.state = WavefrontState(len(y), net.image_size, self.skew)
        self.first = net.first.cache(self.state)
        self.first.bias.unflatten(0, (-1, len(y))).add_(net.embed.rows(y))
        self.blocks = [block.stepper(self.state) for block in net.blocks]
        self.head = net.head.stepper(self.state)

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        h = self.first.output(at)
        for block in self.blocks:
            h = block.step(h, at)
        return self.head.step(h, at)


class PublishedBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))): two masked convolutions with BatchNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv1 = CausalConv2d(channels, channels, 3, "B")
        self.conv2 = CausalConv2d(channels, channels, 3, "B")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))

    def stepper(self, state: State[TapsCache]) -> "PublishedStepper":
        return PublishedStepper(self, state)


class PublishedStepper:
    """A `PublishedBlock` in steps, in eval mode."""

    def __init__(self, block: PublishedBlock, state: State[TapsCache]) -> None:
        self.conv1 = block.conv1.cache(state, after=block.norm1)
        self.conv2 = block.conv2.cache(state, after=block.norm2)

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [n,C] -> [n,C], in place."""
        self.conv1.write(x, at)
        self.conv2.write_relu(self.conv1.output(at), at)
        return self.conv2.add_output(x, at).relu_()
