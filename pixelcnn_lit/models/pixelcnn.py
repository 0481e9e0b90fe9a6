"""PixelCNN: a stack of masked convolutions.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.5.
What differs: the class enters as a bias after the first layer (conditioning as in arXiv 1606.05328, equation 4);
    colour is left to the likelihood; blocks are full-width; by default a norm over channels stands before each
    convolution and the second one starts at zero (`norm=layer`). `norm=batch` is the block of published code. Levels
    are read through a table, too (`level_channels`), here as in the other networks.
Receptive field: a triangle that widens by one pixel a row and layer; pixels to the upper right of it are never seen
    (the blind spot), as `context` tells.
Training-mode loss: a likelihood under `norm=layer`; not under `norm=batch`, whose statistics come from whole images,
    later pixels included.
"""

from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.nn.caches import FrontCache, ImageFronts
from pixelcnn_lit.nn.embeddings import ClassEmbedding, LevelEmbedding
from pixelcnn_lit.nn.fronts import Front
from pixelcnn_lit.nn.layers import CausalConv2d, ChannelNorm, MakeCache, OutputStack, PreNormBlock


class PixelCNN(nn.Module):
    """features = Net(x, y), [B,out_channels,H,W], at each pixel a function of the class and strictly earlier pixels.

    Args:
        image_shape, num_classes, levels: facts of the data.
        out_channels: features per pixel, which the likelihood asks for.
        hidden_channels, n_residual: width, and number of residual blocks of two 3×3 convolutions.
        norm: "layer" (over channels at each pixel) or "batch" (the published block).
        level_channels: width of the tables that levels are read through; 0 reads them as numbers alone, as published.
        conditional: false trains without the class.
        dropout: rate inside each block of `norm=layer`.
    """

    skew = 4  # the first row above is seen up to three columns to the right, further ones up to one more each
    blocks: Any

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        levels: int,
        out_channels: int,
        hidden_channels: Annotated[int, Range(1)],
        n_residual: Annotated[int, Range(1, 1000)],
        norm: Literal["layer", "batch"] = "layer",
        level_channels: Annotated[int, Range(0)] = 0,
        conditional: bool = True,
        dropout: Annotated[float, Range(0, 0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = (image_shape[1], image_shape[2])
        self.train_is_likelihood = norm != "batch"
        self.read = LevelEmbedding(image_shape[0], levels, level_channels)
        self.first = CausalConv2d(self.read.out_channels, hidden_channels, 7, "A")
        self.embed = ClassEmbedding(num_classes, hidden_channels, conditional)
        self.blocks = nn.Sequential(
            *(
                PublishedBlock(hidden_channels) if norm == "batch" else PreNormBlock(hidden_channels, dropout)
                for _ in range(n_residual)
            )
        )
        norm_last = nn.Identity() if norm == "batch" else ChannelNorm(hidden_channels)
        self.last = OutputStack(hidden_channels, out_channels, norm_last)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x uint8 [B,C,H,W], y int64 [B] -> features [B,out_channels,H,W]."""
        h = self.first(self.read(x, like=self.first.weight))
        h = h + self.embed(y).to(h.dtype)  # under bf16 autocast a float32 bias would make the whole stream float32
        return self.last(self.blocks(h))

    def init_cache(self, y: Tensor) -> dict[str, Any]:
        """All storage for stepping through images of the classes y [B]."""
        make = partial(FrontCache, batch=len(y), image_size=self.image_size, skew=self.skew)
        first = self.first.cache(make)
        first.bias.unflatten(0, (-1, len(y))).add_(self.embed(y)[..., 0, 0])
        blocks, last = [block.init_cache(make) for block in self.blocks], self.last.init_cache(make)
        image = ImageFronts(first, chain(*blocks, last), self.read, self.image_size[1])
        return {"image": image, "blocks": blocks, "last": last}

    def step(self, cache: dict[str, Any], previous: Tensor, i: int, j: int) -> Tensor:
        """Features [n*B,D] at the front of (i, j), asked for in the order of `fronts`; equal to `forward` there.

        `previous` holds the pixels of the front before, uint8 [n*B,C]; it is ignored at (0, 0), where the cache is
        emptied. In eval mode.
        """
        front = cache["image"].advance(previous, i, j)
        h = cache["image"].first.output(front)
        for block, own in zip(self.blocks, cache["blocks"], strict=True):
            h = block.step(own, h, front)
        return self.last.step(cache["last"], h, front)

    def context(self, i: int, j: int) -> Tensor:
        """The earlier pixels, bool [H,W], that the features at row i, column j depend on."""
        seen = torch.zeros(self.image_size, dtype=torch.bool)
        seen[i, j] = True
        for layer in reversed([m for m in self.modules() if isinstance(m, CausalConv2d)]):
            seen = layer.reach(seen)
        return seen


class PublishedBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))): two masked convolutions with BatchNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = CausalConv2d(channels, channels, 3, "B"), CausalConv2d(channels, channels, 3, "B")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))

    def init_cache(self, make: MakeCache) -> list[FrontCache]:
        return [self.conv1.cache(make, after=self.norm1), self.conv2.cache(make, after=self.norm2)]

    def step(self, cache: list[FrontCache], x: Tensor, front: Front) -> Tensor:
        """`forward` in eval mode at a front: x [n*B,C] -> [n*B,C], in place."""
        first, second = cache
        first.put(x, front)
        second.put_relu(first.output(front), front)
        return second.add_output(x, front).relu_()
