"""Diagonal BiLSTM: two LSTMs that go along the diagonals of an image, one from its left corner and one from its right.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.2
    and equation 3; the residual connection of section 3.3 and figure 5: states are half as wide as the stream.
What differs: the pixel before in raster order enters directly: with the paper's masks alone, the last pixel of the row
    above reaches no pixel but the last ones of a row. The class enters the gates as a bias; colour is left to the
    likelihood; a norm over channels before each layer; the 1×1 convolution that ends a layer starts at zero. There are
    no connections from each layer to the output, the output layers are as wide as the stream (the paper's: 1,024 for
    CIFAR-10, 32 for MNIST), and the first states are zero, not learnt. experiment=cifar10/diagonal_bilstm and
    mnist/diagonal_bilstm have the paper's sizes.
Receptive field: every earlier pixel, from the first layer on.
Training-mode loss: a likelihood.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import RasterState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import (
    CausalConv2d,
    ChannelNorm,
    Layers,
    PointwiseHead,
    every_earlier_pixel,
    lstm_cell,
    pixel_before,
)
from pixelcnn_lit.nn.wavefronts import At


class DiagonalBiLSTM(nn.Module):
    """A stack of LSTMs over diagonals: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width of the stream, and number of BiLSTM layers.
        dropout: rate of the states on their way into the stream.

    Example:
        >>> net = DiagonalBiLSTM((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
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
        hidden_channels: Annotated[int, Ge(2)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.first = CausalConv2d(in_channels, hidden_channels, 7, "A")
        self.previous = nn.Conv2d(in_channels, hidden_channels, 1, bias=False)
        self.layers: Layers[DiagonalLayer] = Layers(
            DiagonalLayer(hidden_channels, num_classes, dropout) for _ in range(n_residual)
        )
        self.head = PointwiseHead(hidden_channels, out_channels)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        h = self.first(h) + self.previous(pixel_before(h))
        for layer in self.layers:
            h = layer(h, y)
        return self.head(h)

    def stepper(self, y: Tensor) -> "DiagonalStepper":
        return DiagonalStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        return every_earlier_pixel(self.image_size, i, j)


class DiagonalStepper:
    """A `DiagonalBiLSTM` in steps. The LSTM from the right goes through a row when the row below it begins."""

    replayable = False

    def __init__(self, net: DiagonalBiLSTM, y: Tensor) -> None:
        self.skew = net.image_size[1]
        self.state = RasterState(len(y), self.skew)
        self.first = net.first.cache(self.state)
        self.previous = net.previous.weight[..., 0, 0].T.contiguous()
        self.layers = LayerStates(list(net.layers), y, self.skew)
        self.state.others.append(self.layers)
        self.head = net.head.stepper()

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        h = self.first.output(at)
        if at.position:
            h.addmm_(previous, self.previous)
        for layer in range(len(self.layers)):
            h = self.layers.step(layer, h, at)
        return self.head.step(h)


class DiagonalLayer(nn.Module):
    """x + conv1×1(left + the row above of right), the states of two LSTMs over norm(x) (equation 3).

    `left` at (i, j) has seen (i, j-1) and (i-1, j), and so all that is not below it or to the right of it; `right`
    has seen (i, j+1) and (i-1, j). Moved down by a row, `right` sees no later pixel.

    [o, f, i, g] = s2s (h_beside, h_above) + i2s norm(x) + class;  c = σ(f) c_beside + σ(i) tanh(g);  h = σ(o) tanh(c).
    """

    checkpointable = True

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        states = channels // 2
        self.norm = ChannelNorm(channels)
        self.input_to_state = nn.Conv2d(channels, 8 * states, 1)  # of the left LSTM, then of the right one
        taps = (nn.Conv1d(states, 4 * states, 2, bias=False) for _ in range(2))  # above and beside, of each LSTM
        self.state_to_state: Layers[nn.Conv1d] = Layers(taps)
        self.embed = ClassEmbedding(num_classes, 8 * states)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(states, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B,channels,H,W] -> [B,channels,H,W]."""
        inputs = self.input_to_state(self.norm(x))
        left, right = (inputs + self.embed(y, inputs.dtype)).movedim(1, -1).chunk(2, dim=-1)  # [B,H,W,4*states]
        left, right = straight(self.scan(skewed(torch.stack([left, right.flip(2)]))))
        h = left + F.pad(right.flip(2), (0, 0, 0, 0, 1, -1))
        return x + self.out(self.dropout(h.movedim(-1, 1)))

    def scan(self, gates: Tensor) -> Tensor:
        """Both LSTMs from diagonal to diagonal: [2,B,H,diagonals,4*states] -> states [2,B,H,diagonals,states].

        Beside the image inputs are zero, and with them the states before its first column.
        """
        matrix, size = self.matrix().to(gates.dtype), gates.shape[:3]
        h = gates.new_zeros(*size, self.out.in_channels)
        c, done = h.flatten(1, 2).to(torch.promote_types(h.dtype, torch.float32)), []
        for column in gates.unbind(3):
            seen = torch.cat([h, F.pad(h, (0, 0, 1, -1))], dim=-1)
            new, c = lstm_cell(torch.baddbmm(column.flatten(1, 2), seen.flatten(1, 2), matrix), c, dim=-1)
            h = new.unflatten(1, size[1:])
            done.append(h)
        return torch.stack(done, dim=3)

    def matrix(self) -> Tensor:
        """State-to-state, of the left and the right LSTM: states beside and above -> gates, [2,2*states,4*states]."""
        by_side = torch.stack([conv.weight for conv in self.state_to_state])  # [2,4*states,states,2]
        return by_side.flip(-1).permute(0, 3, 2, 1).flatten(1, 2)


def skewed(x: Tensor) -> Tensor:
    """[...,H,W,C] -> [...,H,H+W-1,C]: row i moved i columns to the right, zeros beside. A diagonal is now a column."""
    height, width = x.shape[-3:-1]
    return F.pad(x, (0, 0, 0, height)).flatten(-3, -2)[..., :-height, :].unflatten(-2, (height, height + width - 1))


def straight(x: Tensor) -> Tensor:
    """The inverse of `skewed`: [...,H,H+W-1,C] -> [...,H,W,C]."""
    height, diagonals = x.shape[-3:-1]
    rows = F.pad(x.flatten(-3, -2), (0, 0, 0, height)).unflatten(-2, (height, diagonals + 1))
    return rows[..., : diagonals + 1 - height, :]


class LayerStates:
    """The layers in steps, without dropout, and what they keep between two pixels of images of the classes y [B].

    normed [L,B,W,channels]: the inputs of the present row, which the LSTM from the right reads once it is complete.
    left [L,B,1+W,states]: at column 1+j the left state of the present row, or of the one above where that has not come
    yet; so what a pixel sees, beside and above it, lies together. cells [L,B,states]: of the pixel before.
    right [L,B,W,states]: of the row above.
    """

    def __init__(self, layers: "Sequence[DiagonalLayer]", y: Tensor, width: int) -> None:
        n_states, channels = layers[0].out.in_channels, layers[0].out.out_channels
        zeros, size = layers[0].out.weight.new_zeros, (len(layers), len(y))
        self.norms = [
            (norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in (own.norm for own in layers)
        ]
        biases = [own.embed.rows(y) + own.input_to_state.bias for own in layers]  # pyright: ignore[reportOperatorIssue]
        bias = torch.stack(biases)  # [L,B,8*states]
        inputs = torch.stack([own.input_to_state.weight[..., 0, 0].T for own in layers])  # [L,channels,8*states]
        left, right = torch.stack([own.matrix() for own in layers], dim=1)  # [L,2*states,4*states] each
        self.bias, self.bias_right = (half.contiguous() for half in bias.chunk(2, dim=-1))
        self.inputs, self.inputs_right = (half.contiguous() for half in inputs.chunk(2, dim=-1))
        self.seen, self.beside_right, self.above_right = left, *right.chunk(2, dim=1)
        self.out = torch.stack([own.out.weight[..., 0, 0].T for own in layers])
        self.normed, self.right = zeros(*size, width, channels), zeros(*size, width, n_states)
        self.left = zeros(*size, 1 + width, n_states)
        precise = torch.promote_types(self.left.dtype, torch.float32)  # as in `forward`
        self.cells = zeros(*size, n_states, dtype=precise)
        flat = self.left.flatten(2)
        self.windows = [flat[..., j * n_states : (j + 2) * n_states] for j in range(width)]

    def __len__(self) -> int:
        return len(self.norms)

    def reset(self) -> None:
        """Forget an image."""
        for kept in (self.left, self.right, self.cells):
            kept.zero_()

    def new_row(self) -> None:
        """Let the LSTM from the right go through the row that is complete, all layers side by side."""
        gates = self.normed.flatten(1, 2) @ self.inputs_right + self.right.flatten(1, 2) @ self.above_right
        columns = (gates.view(*self.right.shape[:3], -1) + self.bias_right[:, :, None]).unbind(2)
        h, c = torch.zeros_like(self.right[:, :, 0]), torch.zeros_like(self.cells)
        for j in reversed(range(len(columns))):
            h, c = lstm_cell(torch.baddbmm(columns[j], h, self.beside_right), c, dim=-1)
            self.right[:, :, j] = h
        self.cells.zero_()

    def step(self, layer: int, x: Tensor, at: At) -> Tensor:
        """Go through a layer at a pixel: x [B,channels] -> the same, in place."""
        j = at.column
        normed = torch.layer_norm(x, *self.norms[layer])
        self.normed[layer, :, j] = normed
        gates = torch.addmm(self.bias[layer], normed, self.inputs[layer])
        gates.addmm_(self.windows[j][layer], self.seen[layer])
        h, c = lstm_cell(gates, self.cells[layer], dim=-1)
        self.left[layer, :, j + 1], self.cells[layer] = h, c
        return x.addmm_(h + self.right[layer, :, j], self.out[layer])
