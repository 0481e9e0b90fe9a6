"""PixelCNN: a stack of masked convolutions.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.5.
What differs: the class enters as a bias after the first layer (conditioning as in arXiv 1606.05328, equation 4);
    colour is left to the likelihood; blocks are full-width; a norm over channels stands before each convolution, and
    the second one starts at zero. `pixelcnn_published` is the network of published code.
Receptive field: a triangle that widens by one pixel a row and layer; pixels to the upper right of it are never seen
    (the blind spot), as `receptive_field` tells.
Training-mode loss: a likelihood.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import WavefrontState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, CausalHead, Layers, PreNormBlock, receptive_field
from pixelcnn_lit.nn.wavefronts import At


class PixelCNN(nn.Module):
    """A stack of masked convolutions: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width, and number of residual blocks of two 3×3 convolutions.
        norm: read for files of release 0.1.0, which name it.
        dropout: rate inside each block.

    Example:
        >>> import torch
        >>> net = PixelCNN((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
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
        norm: Literal["layer"] = "layer",
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.first = CausalConv2d(in_channels, hidden_channels, 7, "A")
        self.embed = ClassEmbedding(num_classes, hidden_channels)
        self.blocks: Layers[PreNormBlock] = Layers(PreNormBlock(hidden_channels, dropout) for _ in range(n_residual))
        self.head = CausalHead(hidden_channels, out_channels)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        h = self.first(h)
        h = h + self.embed(y, h.dtype)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def stepper(self, y: Tensor) -> "PixelCNNStepper":
        return PixelCNNStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        return receptive_field(self, self.image_size, i, j)


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
