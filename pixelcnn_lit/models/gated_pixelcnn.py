"""Gated PixelCNN: one stack of convolutions sees the rows above, another the pixels to the left.

Paper: van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu 2016, Conditional Image Generation with
    PixelCNN Decoders (arXiv 1606.05328), section 2: the gate of equation 2, the class in it as in equation 4, the
    layer of figure 2.
What differs: a residual connection also around the gate of the vertical stack, with which 15 layers learned faster;
    a norm over channels before each horizontal convolution but the first; the 1×1 convolution that ends a horizontal
    branch starts at zero; no skip connections; colour is left to the likelihood.
Receptive field: all earlier pixels up to 3 + n_residual * (kernel_size // 2) rows above and columns to either side,
    without a blind spot, as `receptive_field` tells: at n_residual=5 and kernel_size=5 that is 13.
Training-mode loss: a likelihood.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import Convolution, RasterState, RowCache
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import ChannelNorm, Layers, PointwiseHead
from pixelcnn_lit.nn.wavefronts import At


class GatedPixelCNN(nn.Module):
    """Two stacks of gated convolutions: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width of either stack, and number of layers after the first, which is 7×7.
        kernel_size: of these layers.
        dropout: rate inside the horizontal branch of these layers.

    Example:
        >>> net = GatedPixelCNN((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
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
        kernel_size: Literal[3, 5, 7] = 5,
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        first = GatedLayer(in_channels, hidden_channels, 7, "A", num_classes)
        others = (
            GatedLayer(hidden_channels, hidden_channels, kernel_size, "B", num_classes, dropout)
            for _ in range(n_residual)
        )
        self.layers: Layers[GatedLayer] = Layers([first, *others])
        self.head = PointwiseHead(hidden_channels, out_channels)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        v = h
        for layer in self.layers:
            v, h = layer(v, h, y)
        return self.head(h)

    def stepper(self, y: Tensor) -> "GatedStepper":
        return GatedStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        h = torch.zeros(self.image_size, dtype=torch.bool)
        h[i, j] = True
        v = torch.zeros_like(h)
        for layer in reversed(list(self.layers)):
            v, h = layer.vertical.receptive_field(v | h), layer.horizontal.receptive_field(h)
        return v | h


class GatedStepper:
    """A `GatedPixelCNN` in steps.

    Where a row begins, the vertical stack goes through all of it, since all that it sees is known; a step then goes
    through the horizontal stack alone, and depends on nothing but the column.
    """

    replayable = True

    def __init__(self, net: GatedPixelCNN, y: Tensor) -> None:
        self.skew = width = net.image_size[1]
        self.state = RasterState(len(y), width)
        self.layers = [GatedLayerStepper(layer, self.state, y) for layer in net.layers]
        self.state.others += self.layers
        self.head = net.head.stepper()
        image = self.state.caches[0]
        self.row = image.inputs[:, image.side :][:, :width].permute(0, 3, 2, 1)  # [B,E,1,W], of the row before

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        if at.column == 0:
            v = self.row
            for layer in self.layers:
                v = layer.step_row(v)
        h = self.row  # the first layer does not read it: its input, the image, is in its cache
        for layer in self.layers:
            h = layer.step(h, at)
        return self.head.step(h)


class GatedLayer(nn.Module):
    """One layer of both stacks: v' = v + gate(above + class), h' = h + conv1×1(gate(left + conv1×1(above) + class)).

    `above` is a k×k convolution of v, of which the rows above exist and the pixel's own, where v knows only the rows
    above; `left` a 1×k convolution of norm(h), of which the taps up to the pixel exist. The first layer has mask A:
    it leaves out the own row and the own pixel of the image, and has neither norm nor residual connections.
    """

    checkpointable = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        mask_type: Literal["A", "B"],
        num_classes: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.is_first = mask_type == "A"
        self.norm = nn.Identity() if self.is_first else ChannelNorm(in_channels)
        self.vertical = LiveConv2d(in_channels, 2 * channels, kernel_size, "above", mask_type)
        self.horizontal = LiveConv2d(in_channels, 2 * channels, kernel_size, "left", mask_type)
        self.down = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)
        self.embed = ClassEmbedding(num_classes, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        if not self.is_first:
            nn.init.zeros_(self.out.weight)

    def forward(self, v: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """v, h [B,in,H,W], y [B] -> v', h' [B,channels,H,W]."""
        above = self.vertical(v)  # [B,2*channels,H,W]
        class_v, class_h = self.embed(y, above.dtype).chunk(2, dim=1)
        left = self.horizontal(self.norm(h)) + self.down(above) + class_h
        dv, dh = gate(above + class_v), self.out(self.dropout(gate(left)))
        return (dv, dh) if self.is_first else (v + dv, h + dh)


class GatedLayerStepper:
    """A `GatedLayer` in steps, without dropout."""

    def __init__(self, layer: GatedLayer, state: RasterState, y: Tensor) -> None:
        self.layer = layer
        vertical, zeros = layer.vertical, layer.out.weight.new_zeros
        class_v, class_h = layer.embed.rows(y).chunk(2, dim=1)
        self.class_v = class_v[..., None, None]
        norm = layer.norm if isinstance(layer.norm, ChannelNorm) else None
        # The inputs of `left` need no emptying: taps are padding and what was written since the row began.
        self.left = layer.horizontal.cache(state, before=norm)
        self.left.bias = self.left.bias + class_h
        # What the vertical convolution sees from the present row, [B,in,rows,W], channels last.
        self.rows = zeros(len(y), vertical.kernel_size[0], state.width, vertical.in_channels).permute(0, 3, 1, 2)
        # What is added to `left` along the present row, bias and class with it.
        self.above = zeros(state.width, *self.left.bias.shape)  # [W,B,2*channels]
        self.columns = self.above.unbind()
        self.gates = zeros(self.left.bias.shape)  # memory for a pixel's, [B,2*channels]
        self.halves = self.gates.chunk(2, dim=1)
        self.out = layer.out.weight[..., 0, 0].T.contiguous()

    def reset(self) -> None:
        """Forget an image."""
        self.rows.zero_()

    def new_row(self) -> None:
        """Make room for a row: the others move up."""
        for row in range(self.rows.shape[2] - 1):
            self.rows[:, :, row].copy_(self.rows[:, :, row + 1])

    def step_row(self, v: Tensor) -> Tensor:
        """Return the vertical stack along a new row: v [B,in,1,W] -> [B,channels,1,W]."""
        self.rows[:, :, -1:].copy_(v)
        above = self.layer.vertical.along(self.rows)
        torch.add(self.layer.down(above)[:, :, 0].permute(2, 0, 1), self.left.bias, out=self.above)
        dv = gate(above + self.class_v)
        return dv if self.layer.is_first else v + dv

    def step(self, h: Tensor, at: At) -> Tensor:
        """Return the horizontal stack at a pixel of that row: h [B,in] -> [B,channels], in place."""
        if not self.layer.is_first:
            self.left.write_norm(h, at)
        column = at.column_on_device
        above = self.columns[at.column] if column is None else self.above.index_select(0, column)[0]
        torch.addmm(above, self.left.taps(at), self.left.matrix, out=self.gates)
        f, g = self.halves
        gated = f.tanh_().mul_(g.sigmoid_())
        return gated @ self.out if self.layer.is_first else h.addmm_(gated, self.out)


def gate(x: Tensor) -> Tensor:
    """tanh(f) * sigmoid(g) of the halves f, g of x [B,2*channels,H,W]: equation 2."""
    f, g = x.chunk(2, dim=1)
    return torch.tanh(f) * torch.sigmoid(g)


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

    def cache(self, state: RasterState, before: nn.LayerNorm | None) -> RowCache:
        """Return what computes the taps to the left pixel by pixel."""
        live, side = self.kernel_size[1], self.margins[0]
        dead = (0, 2 * side + 1 - live)  # a RowCache knows where the centre of a whole kernel is
        mask = F.pad(self.weight.new_ones(1, 1, 1, live), dead)
        assert self.bias is not None
        return state.cache(Convolution(F.pad(self.weight, dead), self.bias, mask, before))

    def receptive_field(self, seen: Tensor) -> Tensor:
        """Return the inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        ones = torch.ones(1, 1, *self.kernel_size)
        padded = F.conv_transpose2d(seen.to(ones)[None, None], ones, padding=self.sides)
        return F.pad(padded, [-margin for margin in self.margins])[0, 0] > 0
