"""Gated PixelCNN: one stack of convolutions sees the rows above, another the pixels to the left.

Paper: van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu 2016, Conditional Image Generation with
    PixelCNN Decoders (arXiv 1606.05328), section 2: the gate of equation 2, the class in it as in equation 4, the
    layer of figure 2.
What differs: a residual connection also around the gate of the vertical stack, with which 15 layers learned faster;
    a norm over channels before each horizontal convolution but the first; the 1×1 convolution that ends a horizontal
    branch starts at zero; no skip connections; levels are read through a table, too; colour is left to the likelihood.
Receptive field: all earlier pixels up to 3 + n_residual * (kernel_size // 2) rows above and columns to either side,
    without a blind spot, as `context` tells: at n_residual=5 and kernel_size=5 that is 13.
Training-mode loss: a likelihood.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.nn.caches import RowCache
from pixelcnn_lit.nn.embeddings import ClassEmbedding, LevelEmbedding
from pixelcnn_lit.nn.layers import ChannelNorm, PointwiseStack


class GatedPixelCNN(nn.Module):
    """features = Net(x, y), [B,out_channels,H,W], at each pixel a function of the class and strictly earlier pixels.

    Args:
        image_shape, num_classes, levels: facts of the data.
        out_channels: features per pixel, which the likelihood asks for.
        hidden_channels, n_residual: width of either stack, and number of layers after the first, which is 7×7.
        kernel_size: of these layers.
        level_channels: width of the tables that levels are read through; 0 reads them as numbers alone, as published.
        conditional: false trains without the class.
        dropout: rate inside the horizontal branch of these layers.
    """

    train_is_likelihood = True
    no_blind_spot = True
    replayable = True  # as a CUDA graph: see `step`
    layers: Any

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        levels: int,
        out_channels: int,
        hidden_channels: Annotated[int, Range(1)],
        n_residual: Annotated[int, Range(1, 1000)],
        kernel_size: Literal[3, 5, 7] = 5,
        level_channels: Annotated[int, Range(0)] = 0,
        conditional: bool = True,
        dropout: Annotated[float, Range(0, 0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = tuple(image_shape[1:])
        self.read = LevelEmbedding(image_shape[0], levels, level_channels)
        classes = num_classes, conditional
        self.layers = nn.ModuleList([GatedLayer(self.read.out_channels, hidden_channels, 7, "A", *classes)])
        for _ in range(n_residual):
            self.layers.append(GatedLayer(hidden_channels, hidden_channels, kernel_size, "B", *classes, dropout))
        self.last = PointwiseStack(hidden_channels, out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x uint8 [B,C,H,W], y int64 [B] -> features [B,out_channels,H,W]."""
        v = h = self.read(x, like=self.layers[0].out.weight)
        for layer in self.layers:
            v, h = layer(v, h, y)
        return self.last(h)

    def init_cache(self, y: Tensor) -> dict[str, Any]:
        """All storage for stepping through images of the classes y [B]."""
        width = self.image_size[1]
        layers = [layer.init_cache(y, width) for layer in self.layers]
        image = layers[0].left
        return {
            "read": self.read.reader(like=image.inputs),
            "image": image,
            "row": image.inputs[:, image.side :][:, :width].permute(0, 3, 2, 1),  # [B,channels,1,W]
            "layers": layers,
            "last": self.last.init_cache(),
        }

    def step(self, cache: dict[str, Any], previous: Tensor, i: int, j: int) -> Tensor:
        """Features [B,D] at row i, column j, asked for in raster order; equal to `forward` there in eval mode.

        `previous` is the pixel before, uint8 [B,C]; it is ignored at (0, 0), where the cache is emptied. Where
        cache["column"], an int64 tensor [1], is given, it is the column, and j tells only whether a row begins: then
        the vertical stack goes through the whole row, since all that it sees is known.
        """
        image, column = cache["image"], cache.get("column", j)
        if (i, j) == (0, 0):
            image.reset()
            for held in cache["layers"]:
                held.rows.zero_()
        else:
            image.put(cache["read"](previous), (column - 1) % self.image_size[1])
        if j == 0:
            v = cache["row"]
            for layer, held in zip(self.layers, cache["layers"], strict=True):
                v = layer.step_row(held, v)
        h: Any = None  # the first layer reads the image
        for layer, held in zip(self.layers, cache["layers"], strict=True):
            h = layer.step(held, h, column)
        return self.last.step(cache["last"], h)

    def context(self, i: int, j: int) -> Tensor:
        """The earlier pixels, bool [H,W], that the features at row i, column j depend on."""
        h = torch.zeros(self.image_size, dtype=torch.bool)
        h[i, j] = True
        v = torch.zeros_like(h)
        for layer in reversed(self.layers):
            v, h = layer.vertical.reach(v | h), layer.horizontal.reach(h)
        return v | h


class GatedLayer(nn.Module):
    """One layer of both stacks: v' = v + gate(above + class), h' = h + conv1×1(gate(left + conv1×1(above) + class)).

    `above` is a k×k convolution of v, of which the rows above exist and the pixel's own, where v knows only the rows
    above; `left` a 1×k convolution of norm(h), of which the taps up to the pixel exist. The first layer has mask A:
    it leaves out the own row and the own pixel of the image, and has neither norm nor residual connections.
    """

    recomputable = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        mask_type: Literal["A", "B"],
        num_classes: int,
        conditional: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.is_first = mask_type == "A"
        self.norm = nn.Identity() if self.is_first else ChannelNorm(in_channels)
        self.vertical = LiveConv2d(in_channels, 2 * channels, kernel_size, "above", mask_type)
        self.horizontal = LiveConv2d(in_channels, 2 * channels, kernel_size, "left", mask_type)
        self.down = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)
        self.embed = ClassEmbedding(num_classes, 4 * channels, conditional)
        self.dropout = nn.Dropout(dropout)
        if not self.is_first:
            nn.init.zeros_(self.out.weight)

    def forward(self, v: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """v, h [B,in,H,W], y [B] -> v', h' [B,channels,H,W]."""
        above = self.vertical(v)  # [B,2*channels,H,W]
        class_v, class_h = self.embed(y).to(above.dtype).chunk(2, dim=1)  # float32 would make all that follows float32
        left = self.horizontal(self.norm(h)) + self.down(above) + class_h
        dv, dh = gate(above + class_v), self.out(self.dropout(gate(left)))
        return (dv, dh) if self.is_first else (v + dv, h + dh)

    def init_cache(self, y: Tensor, width: int) -> "LayerCache":
        vertical, zeros = self.vertical, self.out.weight.new_zeros
        left = self.horizontal.cache(len(y), width, before=self.norm if isinstance(self.norm, ChannelNorm) else None)
        class_v, class_h = self.embed(y).chunk(2, dim=1)
        left.bias = left.bias + class_h[..., 0, 0]
        above, gates = zeros(width, *left.bias.shape), zeros(left.bias.shape)
        return LayerCache(
            rows=zeros(len(y), vertical.kernel_size[0], width, vertical.in_channels).permute(0, 3, 1, 2),
            class_v=class_v,
            left=left,
            above=above,
            columns=above.unbind(),
            gates=gates,
            halves=gates.chunk(2, dim=1),
            out=self.out.weight[..., 0, 0].T.contiguous(),
        )

    def step_row(self, cache: "LayerCache", v: Tensor) -> Tensor:
        """The vertical stack along a new row: v [B,in,1,W] -> [B,channels,1,W]."""
        rows = cache.rows
        for row in range(rows.shape[2] - 1):
            rows[:, :, row].copy_(rows[:, :, row + 1])
        rows[:, :, -1:].copy_(v)
        above = self.vertical.along(rows)
        torch.add(self.down(above)[:, :, 0].permute(2, 0, 1), cache.left.bias, out=cache.above)
        dv = gate(above + cache.class_v)
        return dv if self.is_first else v + dv

    def step(self, cache: "LayerCache", h: Tensor, j: int | Tensor) -> Tensor:
        """The horizontal stack at column j of that row, without dropout: h [B,in] -> [B,channels], in place.

        The first layer does not read h: its input, the image, is in the cache already.
        """
        left = cache.left
        if not self.is_first:
            left.put_norm(h, j)
        above = cache.columns[j] if isinstance(j, int) else cache.above.index_select(0, j)[0]
        torch.addmm(above, left.window(j), left.matrix, out=cache.gates)
        f, g = cache.halves
        gated = f.tanh_().mul_(g.sigmoid_())
        return gated @ cache.out if self.is_first else h.addmm_(gated, cache.out)


def gate(x: Tensor) -> Tensor:
    """tanh(f) * sigmoid(g) of the halves f, g of x [B,2*channels,H,W]: equation 2."""
    f, g = x.chunk(2, dim=1)
    return torch.tanh(f) * torch.sigmoid(g)


@dataclass
class LayerCache:
    """What a layer keeps between two pixels of images of B classes.

    rows: what the vertical convolution sees from the present row, [B,in,rows,W], channels last.
    class_v: the bias of the vertical gate.
    left: the horizontal convolution. Its inputs need no emptying: a window holds padding and what was put in since
    the row began.
    above: what is added to it along the present row, bias and class with it, [W,B,2*channels]; columns: views of it.
    gates: room for the two halves of a pixel's gate, [B,2*channels].
    out: the matrix that ends the horizontal branch.
    """

    rows: Tensor
    class_v: Tensor
    left: RowCache
    above: Tensor
    columns: tuple[Tensor, ...]
    gates: Tensor
    halves: tuple[Tensor, ...]
    out: Tensor


class LiveConv2d(nn.Conv2d):
    """The live taps of a causal k×k kernel, as two convolutions whose kernels hold nothing else.

    "above": the k//2 rows above the centre, [out,in,k//2,k]. "left": the k//2 taps left of the centre,
    [out,in,1,k//2]. Under mask B each also has the row or the tap of the centre.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        part: Literal["above", "left"],
        mask_type: Literal["A", "B"],
    ) -> None:
        side, live = kernel_size // 2, kernel_size // 2 + (mask_type == "B")
        after = live - 1 - side  # -1 under mask A: the last row or column of the image is seen by none
        if part == "above":
            shape, self.margins, self.sides = (live, kernel_size), (0, 0, side, after), (0, side)
        else:
            shape, self.margins, self.sides = (1, live), (side, after), (0, 0)
        super().__init__(in_channels, out_channels, shape, padding=self.sides)
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[B,in,H,W] -> [B,out,H,W]."""
        return super().forward(F.pad(input, self.margins))

    def along(self, rows: Tensor) -> Tensor:
        """One row of outputs from the rows under the kernel: [B,in,live,W] -> [B,out,1,W]."""
        return super().forward(rows)

    def cache(self, batch: int, width: int, before: nn.LayerNorm | None) -> RowCache:
        """What computes the taps to the left pixel by pixel."""
        live, side = self.kernel_size[1], self.margins[0]
        dead = (0, 2 * side + 1 - live)  # a RowCache knows where the centre of a whole kernel is
        mask = F.pad(self.weight.new_ones(1, 1, 1, live), dead)
        assert self.bias is not None
        return RowCache(F.pad(self.weight, dead), self.bias, mask, batch, width, before=before)

    def reach(self, seen: Tensor) -> Tensor:
        """The inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.conv_transpose2d(seen.to(ones)[None, None], ones, padding=self.sides)
        return F.pad(padded, [-margin for margin in self.margins])[0, 0] > 0
