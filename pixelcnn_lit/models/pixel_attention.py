"""Pixel attention: causal convolutions for what is near, causal attention over pixels for all that is further away.

Papers: Chen, Mishra, Rohaninejad, Abbeel 2018, PixelSNAIL (arXiv 1712.09763), section 3, for the idea; Vaswani et al.
    2017, Attention Is All You Need (arXiv 1706.03762), equation 1, for the attention.
What differs: one token a pixel, in raster order, and a few attention layers between the residual blocks of `pixelcnn`
    in place of one in each; a position is known exactly, by an embedding a row and one a column; the pixel before in
    raster order enters directly, since at the beginning of a row no convolution sees the end of the row above; queries,
    keys and values are half as wide as the network; after the last block, no pixel looks at another one; levels are
    read through a table, too.
Receptive field: every earlier pixel, without a blind spot.
Training-mode loss: a likelihood.
"""

from functools import partial
from itertools import chain
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.nn.caches import ImageRows, RowCache
from pixelcnn_lit.nn.embeddings import ClassEmbedding, LevelEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, PointwiseStack, PreNormBlock


class PixelAttention(nn.Module):
    """features = Net(x, y), [B,out_channels,H,W], at each pixel a function of the class and all earlier pixels.

    Args:
        image_shape, num_classes, levels: facts of the data.
        out_channels: features per pixel, which the likelihood asks for.
        hidden_channels, n_residual: width, and number of residual blocks of two 3×3 convolutions.
        n_attention: attention layers, evenly spaced between the blocks.
        n_heads: of each layer; divides its width, half of hidden_channels (rounded up).
        level_channels: width of the tables that levels are read through; 0 reads them as numbers alone, as published.
        conditional: false trains without the class.
        dropout: rate inside each block.
    """

    train_is_likelihood = True
    no_blind_spot = True
    blocks: Any
    attention: Any

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        levels: int,
        out_channels: int,
        hidden_channels: Annotated[int, Range(1)],
        n_residual: Annotated[int, Range(1, 1000)],
        n_attention: Annotated[int, Range(1, 1000)] = 1,
        n_heads: Annotated[int, Range(1)] = 1,
        level_channels: Annotated[int, Range(0)] = 0,
        conditional: bool = True,
        dropout: Annotated[float, Range(0, 0.99)] = 0.0,
    ) -> None:
        super().__init__()
        width = (hidden_channels + 1) // 2
        if width % n_heads:
            raise ValueError(f"n_heads={n_heads}: must divide {width}, half of hidden_channels={hidden_channels}")
        self.image_size = tuple(image_shape[1:])
        self.read = LevelEmbedding(image_shape[0], levels, level_channels)
        self.first = CausalConv2d(self.read.out_channels, hidden_channels, 7, "A")
        self.before = nn.Conv2d(self.read.out_channels, hidden_channels, 1, bias=False)
        self.row, self.column = (nn.Parameter(0.1 * torch.randn(hidden_channels, side)) for side in self.image_size)
        self.embed = ClassEmbedding(num_classes, hidden_channels, conditional)
        self.blocks = nn.ModuleList(PreNormBlock(hidden_channels, dropout) for _ in range(n_residual))
        self.attention = nn.ModuleList(PixelSelfAttention(hidden_channels, width, n_heads) for _ in range(n_attention))
        self.attend_before = [n_residual * (a + 1) // (n_attention + 1) for a in range(n_attention)]
        self.last = PointwiseStack(hidden_channels, out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x uint8 [B,C,H,W], y int64 [B] -> features [B,out_channels,H,W]."""
        pixels = self.read(x, like=self.row)
        before = F.pad(pixels.flatten(2), (1, -1)).view_as(pixels)  # in raster order, over the ends of rows
        h = self.first(pixels) + self.before(before)
        h = h + (self.embed(y) + self.positions()).to(h.dtype)
        for layer in self.layers():
            h = layer(h)
        return self.last(h)

    def positions(self) -> Tensor:
        """[channels,H,W]."""
        return self.row[:, :, None] + self.column[:, None]

    def layers(self) -> list[Any]:
        """Blocks, and before some of them attention, in the order of `forward`."""
        attention = [(place, 0, layer) for place, layer in zip(self.attend_before, self.attention, strict=True)]
        blocks = [(k, 1, layer) for k, layer in enumerate(self.blocks)]
        return [layer for *_, layer in sorted([*attention, *blocks], key=lambda entry: entry[:2])]

    def init_cache(self, y: Tensor) -> dict[str, Any]:
        """All storage for stepping through images of the classes y [B]."""
        make = partial(RowCache, batch=len(y), width=self.image_size[1])
        first = self.first.cache(make)
        tokens = self.image_size[0] * self.image_size[1]
        blocks = {block: block.init_cache(make) for block in self.blocks}
        attention = {layer: layer.init_cache(len(y), tokens) for layer in self.attention}
        return {
            "image": ImageRows(first, chain(*blocks.values()), self.read),
            "layers": [(layer, (attention | blocks)[layer], layer in attention) for layer in self.layers()],
            "last": self.last.init_cache(),
            "start": (self.embed(y) + self.positions()).flatten(2).permute(2, 0, 1).contiguous(),  # [HW,B,channels]
            "before": self.before.weight[..., 0, 0].T.contiguous(),
        }

    def step(self, cache: dict[str, Any], previous: Tensor, i: int, j: int) -> Tensor:
        """Features [B,D] at row i, column j, asked for in raster order; equal to `forward` there in eval mode.

        `previous` is the pixel before, uint8 [B,C]; it is ignored at (0, 0), where the cache is emptied.
        """
        image, p = cache["image"], i * self.image_size[1] + j
        image.advance(previous, i, j)
        h = image.first.output(j).add_(cache["start"][p])
        if p:
            h.addmm_(image.pixel, cache["before"])
        for layer, own, attends in cache["layers"]:
            h = layer.step(own, h, p if attends else j)
        return self.last.step(cache["last"], h)

    def context(self, i: int, j: int) -> Tensor:
        """The earlier pixels, bool [H,W], that the features at row i, column j depend on: all."""
        height, width = self.image_size
        return (torch.arange(height * width) < i * width + j).view(height, width)


class PixelSelfAttention(nn.Module):
    """x + proj(softmax(q k^T / sqrt(d)) v) over the pixels up to and with its own; the identity at the start.

    A pixel may attend to itself: its features know strictly earlier pixels alone. q, k and v have `width` channels.
    """

    recomputable = True

    def __init__(self, channels: int, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * width, bias=False), nn.Linear(width, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        tokens = x.flatten(2).mT  # [B,HW,C], which channels-last memory has at hand
        q, k, v = self._heads(self.qkv(self.norm(tokens)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(attended.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])

    def init_cache(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all pixels, [B,heads,HW,d]."""
        shape = batch, self.n_heads, tokens, self.proj.in_features // self.n_heads
        return self.proj.weight.new_zeros(shape), self.proj.weight.new_zeros(shape)

    def step(self, cache: tuple[Tensor, Tensor], x: Tensor, p: int) -> Tensor:
        """`forward` at pixel p: x [B,C] -> [B,C], in place."""
        keys, values = cache
        q, k, v = self._heads(self.qkv(self.norm(x))[:, None])
        keys[:, :, p], values[:, :, p] = k[:, :, 0], v[:, :, 0]
        attended = F.scaled_dot_product_attention(q, keys[:, :, : p + 1], values[:, :, : p + 1])
        return x.add_(self.proj(attended.flatten(1)))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B,n,3*width] -> three of [B,heads,n,d]."""
        return qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
