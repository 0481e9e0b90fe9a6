"""Pixel attention: causal convolutions for what is near, causal attention over pixels for all that is further away.

Papers: Chen, Mishra, Rohaninejad, Abbeel 2018, PixelSNAIL (arXiv 1712.09763), section 3, for the idea; Vaswani et al.
    2017, Attention Is All You Need (arXiv 1706.03762), equation 1, for the attention.
What differs: one token a pixel, in raster order, and a few attention layers between the residual blocks of `pixelcnn`
    in place of one in each; a position is known exactly, by an embedding a row and one a column; the pixel before in
    raster order enters directly, since at the beginning of a row no convolution sees the end of the row above; queries,
    keys and values are half as wide as the network; after the last block, no pixel looks at another one.
Receptive field: every earlier pixel, without a blind spot.
Training-mode loss: a likelihood.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import RasterState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, Layers, PointwiseHead, PreNormBlock, every_earlier_pixel, pixel_before
from pixelcnn_lit.nn.wavefronts import At


class PixelAttention(nn.Module):
    """Residual blocks with a few attention layers between them: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width, and number of residual blocks of two 3×3 convolutions.
        n_attention: attention layers, evenly spaced between the blocks.
        n_heads: of each layer; divides its width, half of hidden_channels (rounded up).
        dropout: rate inside each block.

    Example:
        >>> net = PixelAttention((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
        >>> net(torch.randn(3, 2, 5, 4), torch.tensor([0, 9, 10])).shape
        torch.Size([3, 7, 5, 4])
    """

    train_is_likelihood = True
    no_blind_spot = True

    def __init__(
        self,
        image_size: tuple[int, int],
        in_channels: int,
        num_classes: int,
        out_channels: int,
        hidden_channels: Annotated[int, Ge(1)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        n_attention: Annotated[int, Interval(ge=1, le=1000)] = 1,
        n_heads: Annotated[int, Ge(1)] = 1,
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        width = (hidden_channels + 1) // 2
        if width % n_heads:
            raise ValueError(f"n_heads={n_heads}: must divide {width}, half of hidden_channels={hidden_channels}")
        self.image_size = image_size
        self.first = CausalConv2d(in_channels, hidden_channels, 7, "A")
        self.previous = nn.Conv2d(in_channels, hidden_channels, 1, bias=False)
        self.row = nn.Parameter(0.1 * torch.randn(hidden_channels, image_size[0]))
        self.column = nn.Parameter(0.1 * torch.randn(hidden_channels, image_size[1]))
        self.embed = ClassEmbedding(num_classes, hidden_channels)
        self.blocks: Layers[PreNormBlock] = Layers(PreNormBlock(hidden_channels, dropout) for _ in range(n_residual))
        self.attention: Layers[PixelSelfAttention] = Layers(
            PixelSelfAttention(hidden_channels, width, n_heads) for _ in range(n_attention)
        )
        # The numbers of the blocks before which they stand.
        self.attention_before = [n_residual * (a + 1) // (n_attention + 1) for a in range(n_attention)]
        self.head = PointwiseHead(hidden_channels, out_channels)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        h = self.first(h) + self.previous(pixel_before(h))
        h = h + (self.embed(y, self.row.dtype) + self.positions()).to(h.dtype)
        for layer in self.layers():
            h = layer(h)
        return self.head(h)

    def positions(self) -> Tensor:
        """Return the embedding of each position, [channels,H,W]."""
        return self.row[:, :, None] + self.column[:, None]

    def layers(self) -> "list[PreNormBlock | PixelSelfAttention]":
        """Return blocks, and before some of them attention, in the order of `forward`."""
        ordered: list[PreNormBlock | PixelSelfAttention] = []
        for number, block in enumerate(self.blocks):
            places = zip(self.attention_before, self.attention, strict=True)
            ordered += [attention for place, attention in places if place == number]
            ordered.append(block)
        return ordered

    def stepper(self, y: Tensor) -> "PixelAttentionStepper":
        return PixelAttentionStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        return every_earlier_pixel(self.image_size, i, j)


class PixelAttentionStepper:
    """A `PixelAttention` in steps."""

    replayable = False

    def __init__(self, net: PixelAttention, y: Tensor) -> None:
        self.skew = net.image_size[1]
        self.state = RasterState(len(y), self.skew)
        self.first = net.first.cache(self.state)
        self.layers = [
            SelfAttentionStepper(layer, len(y), net.image_size)
            if isinstance(layer, PixelSelfAttention)
            else layer.stepper(self.state)
            for layer in net.layers()
        ]
        start = net.embed(y, net.row.dtype) + net.positions()
        self.start = start.flatten(2).permute(2, 0, 1).contiguous()  # [HW,B,channels]
        self.previous = net.previous.weight[..., 0, 0].T.contiguous()
        self.head = net.head.stepper()

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        h = self.first.output(at).add_(self.start[at.position])
        if at.position:
            h.addmm_(previous, self.previous)
        for layer in self.layers:
            h = layer.step(h, at)
        return self.head.step(h)


class PixelSelfAttention(nn.Module):
    """x + proj(softmax(q k^T / sqrt(d)) v) over the pixels up to and with its own; the identity at the start.

    A pixel may attend to itself: its features know strictly earlier pixels alone. q, k and v have `width` channels.
    """

    checkpointable = True

    def __init__(self, channels: int, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.proj = nn.Linear(width, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,C,H,W]."""
        tokens = x.flatten(2).mT  # [B,HW,C], which channels-last memory has at hand
        q, k, v = self.heads(self.qkv(self.norm(tokens)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.proj(attended.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Split queries, keys and values: [B,n,3*width] -> three of [B,heads,n,d]."""
        return qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class SelfAttentionStepper:
    """A `PixelSelfAttention` in steps."""

    def __init__(self, layer: PixelSelfAttention, batch: int, image_size: tuple[int, int]) -> None:
        self.layer = layer
        width = layer.proj.in_features // layer.n_heads
        shape = batch, layer.n_heads, image_size[0] * image_size[1], width
        self.keys = layer.proj.weight.new_zeros(shape)
        self.values = layer.proj.weight.new_zeros(shape)

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [B,C] -> [B,C], in place."""
        p, layer = at.position, self.layer
        q, k, v = layer.heads(layer.qkv(layer.norm(x))[:, None])
        self.keys[:, :, p] = k[:, :, 0]
        self.values[:, :, p] = v[:, :, 0]
        attended = F.scaled_dot_product_attention(q, self.keys[:, :, : p + 1], self.values[:, :, : p + 1])
        return x.add_(layer.proj(attended.flatten(1)))
