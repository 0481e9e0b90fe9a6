"""Row LSTM: LSTMs that go down the rows of an image, all columns of a row at once.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.1
    and equation 3; the residual connection of section 3.3 and figure 5: states are half as wide as the stream.
What differs: the class enters the gates as a bias; colour is left to the likelihood; a norm over channels before each
    layer; the 1×1 convolution that ends a layer starts at zero. There are no connections from each layer to the output,
    the output layers are as wide as the stream (the paper's: 1,024), and the first states are zero, not learnt.
    experiment=cifar10/row_lstm has the paper's size.
Receptive field: a triangle that widens by one column a row, all the way up, from the first layer on, and a little more
    to the left with each layer, as `receptive_field` tells. Nothing beyond it is seen.
Training-mode loss: a likelihood.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from pixelcnn_lit.nn.caches import Convolution, WavefrontState
from pixelcnn_lit.nn.embeddings import ClassEmbedding
from pixelcnn_lit.nn.layers import CausalConv2d, ChannelNorm, Layers, PointwiseHead, lstm_cell
from pixelcnn_lit.nn.wavefronts import At


class RowLSTM(nn.Module):
    """A stack of LSTMs over rows: see `Network` for its arguments and what it returns.

    Args:
        hidden_channels, n_residual: width of the stream, and number of LSTM layers.
        dropout: rate of the states on their way into the stream.

    Example:
        >>> net = RowLSTM((5, 4), in_channels=2, num_classes=10, out_channels=7, hidden_channels=8, n_residual=1)
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
        hidden_channels: Annotated[int, Ge(2)],
        n_residual: Annotated[int, Interval(ge=1, le=1000)],
        dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.first = CausalConv2d(in_channels, hidden_channels, 7, "A")
        self.layers: Layers[RowLSTMLayer] = Layers(
            RowLSTMLayer(hidden_channels, num_classes, dropout) for _ in range(n_residual)
        )
        self.head = PointwiseHead(hidden_channels, out_channels)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        h = self.first(h)
        for layer in self.layers:
            h = layer(h, y)
        return self.head(h)

    def stepper(self, y: Tensor) -> "RowLSTMStepper":
        return RowLSTMStepper(self, y)

    def receptive_field(self, i: int, j: int) -> Tensor:
        seen = torch.zeros(self.image_size, dtype=torch.bool)
        seen[i, j] = True
        for layer in reversed(list(self.layers)):
            seen = layer.receptive_field(seen)
        return self.first.receptive_field(seen)


class RowLSTMStepper:
    """A `RowLSTM` in steps."""

    skew = 4  # the first row above is seen up to three columns to the right, further ones up to one more each
    replayable = False

    def __init__(self, net: RowLSTM, y: Tensor) -> None:
        self.state = WavefrontState(len(y), net.image_size, self.skew)
        self.first = net.first.cache(self.state)
        self.layers = [RowLSTMLayerStepper(layer, self.state, y) for layer in net.layers]
        self.head = net.head.stepper()

    def step(self, previous: Tensor, at: At) -> Tensor:
        self.state.advance(previous, at)
        h = self.first.output(at)
        for layer in self.layers:
            h = layer.step(h, at)
        return self.head.step(h)


class RowLSTMLayer(nn.Module):
    """x + conv1×1(h), h the states of an LSTM that reads the rows of norm(x) from top to bottom (equation 3).

    [o, f, i, g] = s2s * h_above + i2s * norm(x) + class;  c = σ(f) c_above + σ(i) tanh(g);  h = σ(o) tanh(c).
    i2s sees the pixel and its left neighbour (a 3×1 kernel under mask B), s2s three pixels of the row above.
    """

    checkpointable = True

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        states = channels // 2
        self.norm = ChannelNorm(channels)
        self.input_to_state = nn.Conv2d(channels, 4 * states, (1, 2))
        self.state_to_state = nn.Conv1d(states, 4 * states, 3, padding=1, bias=False)
        self.embed = ClassEmbedding(num_classes, 4 * states)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(states, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B,channels,H,W] -> [B,channels,H,W]."""
        inputs = self.input_to_state(F.pad(self.norm(x), (1, 0)))
        inputs = inputs + self.embed(y, inputs.dtype)
        h = torch.zeros_like(inputs[:, : self.out.in_channels, 0])  # [B,states,W]
        c, rows = h.to(torch.promote_types(h.dtype, torch.float32)), []
        for row in inputs.unbind(2):
            h, c = lstm_cell(row + self.state_to_state(h), c, dim=1)
            rows.append(h)
        return x + self.out(self.dropout(torch.stack(rows, dim=2)))

    def receptive_field(self, seen: Tensor) -> Tensor:
        """Return the inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        states = seen.clone()
        for i in range(len(seen) - 1, 0, -1):
            states[i - 1] |= F.max_pool1d(states[i][None].float(), 3, 1, 1)[0] > 0
        return states | F.pad(states, (-1, 1))


class RowLSTMLayerStepper:
    """A `RowLSTMLayer` in steps, without dropout."""

    def __init__(self, layer: RowLSTMLayer, state: WavefrontState, y: Tensor) -> None:
        left, above = layer.input_to_state, layer.state_to_state.weight[:, :, None]
        zeros, states = left.weight.new_zeros, layer.out.in_channels
        precise = torch.promote_types(left.weight.dtype, torch.float32)  # as in `forward`
        up_to_the_pixel = torch.tensor([[[[1, 1, 0]]]])  # of a kernel
        row_above = torch.tensor([[[[1], [0]]]])
        assert left.bias is not None
        self.inputs = state.cache(Convolution(F.pad(left.weight, (0, 1)), left.bias, up_to_the_pixel, layer.norm))
        self.inputs.bias.unflatten(0, (-1, len(y))).add_(layer.embed.rows(y))
        self.hidden = state.cache(
            Convolution(F.pad(above, (0, 0, 0, 1)), zeros(4 * states), row_above.expand(1, 1, 2, 3))
        )
        self.cells = state.cache(Convolution(zeros(1, states, 2, 1, dtype=precise), zeros(1, dtype=precise), row_above))
        self.out = layer.out.weight[..., 0, 0].T

    def step(self, x: Tensor, at: At) -> Tensor:
        """x [nB,channels] -> the same, in place."""
        self.inputs.write_norm(x, at)
        gates = self.hidden.add_output(self.inputs.output(at), at)
        h, c = lstm_cell(gates, self.cells.taps(at), dim=1)
        self.hidden.write(h, at)
        self.cells.write(c, at)
        return x.addmm_(h, self.out)
