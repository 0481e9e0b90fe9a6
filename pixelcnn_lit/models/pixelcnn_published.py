"""The baseline: a PixelCNN as it is found in published notebooks, with BatchNorm.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.5.
What differs: a BatchNorm behind each convolution but the last; blocks of two full-width 3×3 convolutions, and two more
    before the output; the class enters as a bias behind the first ReLU; levels are read as numbers in [0, 1]
    (`ScaledLevels`), and channels do not see each other (`likelihood=categorical_independent`). The weights begin as
    torch's own layers do. tests/test_published.py has it once more, in plain torch.
Receptive field: a triangle, as of `pixelcnn`, with a top as wide as the first kernel.
Training-mode loss: no likelihood, since the statistics of a BatchNorm come from whole images, later pixels included.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import State, TapsCache, WavefrontState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import Cache, CausalConv2d, Layers, receptive_field
from pixelcnn_lit.nn.wavefronts import At


class PublishedPixelCNN(nn.Module):
    """A stack of masked convolutions and BatchNorms: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width, and number of residual blocks of two 3×3 convolutions.
        kernel_size: of the first convolution, odd.

    Example:
        >>> net = PublishedPixelCNN((5, 4), 1, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
        >>> net(torch.rand(3, 1, 5, 4), torch.tensor([0, 9, 10])).shape
        torch.Size([3, 7, 5, 4])
    """

    train_is_likelihood = False

    def __init__(
        self,
        image_size: tuple[int, int],
        in_channels: int,
        num_classes: int,
        out_channels: int,
        hidden_channels: Annotated[int, Ge(1)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        kernel_size: Annotated[int, Interval(ge=3, le=99)] = 7,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        self.image_size = image_size
        self.first = NormedConv2d(in_channels, hidden_channels, kernel_size, "A")
        self.embed = ClassEmbedding(num_classes, hidden_channels)
        self.blocks: Layers[PublishedBlock] = Layers(PublishedBlock(hidden_channels) for _ in range(n_residual))
        self.last: Layers[NormedConv2d] = Layers(NormedConv2d(hidden_channels, hidden_channels, 3) for _ in range(2))
        self.out = CausalConv2d(hidden_channels, out_channels, 1, "B")
        self.apply(begin_as_torch)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.first(h))
        h = h + self.embed(y, h.dtype)
        for block in self.blocks:
            h = block(h)
        for layer in self.last:
            h = F.relu(layer(h))
        return self.out(h)

    def stepper(self, y: Tensor) -> "PublishedStepper":
        return PublishedStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        return receptive_field(self, self.image_size, i, j)


class PublishedStepper:
    """A `PublishedPixelCNN` in steps, in eval mode."""

    replayable = False

    def __init__(self, net: PublishedPixelCNN, y: Tensor) -> None:
        self.skew = net.first.conv.side + 1  # as of `pixelcnn`, but for the size of the first kernel
        self.state = WavefrontState(len(y), net.image_size, self.skew)
        self.first = net.first.cache(self.state)
        self.classes = net.embed.rows(y)
        self.blocks = [block.stepper(self.state) for block in net.blocks]
        self.last = [layer.cache(self.state) for layer in net.last]
        self.out = net.out.cache(self.state)

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        h = self.first.output(at).relu_()
        h.unflatten(0, (-1, len(self.classes))).add_(self.classes)
        for block in self.blocks:
            h = block.step(h, at)
        for layer in self.last:
            layer.write(h, at)
            h = layer.output(at).relu_()
        self.out.write(h, at)
        return self.out.output(at)


class NormedConv2d(nn.Module):
    """A masked convolution and the BatchNorm behind it."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, mask_type: Literal["A", "B"] = "B"
    ) -> None:
        super().__init__()
        self.conv = CausalConv2d(in_channels, out_channels, kernel_size, mask_type)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def cache(self, state: State[Cache]) -> Cache:
        """Return what computes this step by step, in eval mode."""
        return self.conv.cache(state, after=self.norm)


class PublishedBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = NormedConv2d(channels, channels, 3)
        self.conv2 = NormedConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))

    def stepper(self, state: State[TapsCache]) -> "PublishedBlockStepper":
        return PublishedBlockStepper(self, state)


class PublishedBlockStepper:
    """A `PublishedBlock` in steps."""

    def __init__(self, block: PublishedBlock, state: State[TapsCache]) -> None:
        self.conv1 = block.conv1.cache(state)
        self.conv2 = block.conv2.cache(state)

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [n,C] -> [n,C], in place."""
        self.conv1.write(x, at)
        self.conv2.write_relu(self.conv1.output(at), at)
        return self.conv2.add_output(x, at).relu_()


@torch.no_grad()
def begin_as_torch(module: nn.Module) -> None:
    """Draw the first weights as torch.nn.Conv2d and torch.nn.Embedding do, for which dead taps count, too."""
    if isinstance(module, CausalConv2d):
        bound = (module.weight.shape[1] * module.weight.shape[3] ** 2) ** -0.5
        module.weight.uniform_(-bound, bound).mul_(module.mask)
        module.bias.uniform_(-bound, bound)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_()
