"""Causal attention over pixels in raster order.

Vaswani et al. 2017, Attention Is All You Need (arXiv 1706.03762), equation 1.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pixelcnn_lit.nn.wavefronts import At


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
