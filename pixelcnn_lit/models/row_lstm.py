"""Row LSTM: LSTMs that go down the rows of an image, all columns of a row at once.

Paper: van den Oord, Kalchbrenner, Kavukcuoglu 2016, Pixel Recurrent Neural Networks (arXiv 1601.06759), section 3.1
    and equation 3; the residual connection of section 3.3 and figure 5: states are half as wide as the stream.
What differs: the class enters the gates as a bias; colour is left to the likelihood; a norm over channels before each
    layer; the 1×1 convolution that ends a layer starts at zero; levels are read through a table, too.
Receptive field: a triangle that widens by one column a row, all the way up, from the first layer on, and a little more
    to the left with each layer, as `context` tells. Nothing beyond it is seen.
Training-mode loss: a likelihood.
"""

from functools import partial
from itertools import chain
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.nn.caches import FrontCache, ImageFronts
from pixelcnn_lit.nn.embeddings import ClassEmbedding, LevelEmbedding
from pixelcnn_lit.nn.fronts import Front
from pixelcnn_lit.nn.layers import CausalConv2d, ChannelNorm, MakeCache, PointwiseStack, lstm


class RowLSTM(nn.Module):
    """features = Net(x, y), [B,out_channels,H,W], at each pixel a function of the class and strictly earlier pixels.

    Args:
        image_shape, num_classes, levels: facts of the data.
        out_channels: features per pixel, which the likelihood asks for.
        hidden_channels, n_residual: width of the stream, and number of LSTM layers.
        level_channels: width of the tables that levels are read through; 0 reads them as numbers alone, as published.
        conditional: false trains without the class.
        dropout: rate of the states on their way into the stream.
    """

    train_is_likelihood = True
    skew = 4  # the first row above is seen up to three columns to the right, further ones up to one more each
    layers: Any

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        levels: int,
        out_channels: int,
        hidden_channels: Annotated[int, Range(2)],
        n_residual: Annotated[int, Range(1, 1000)],
        level_channels: Annotated[int, Range(0)] = 0,
        conditional: bool = True,
        dropout: Annotated[float, Range(0, 0.99)] = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = (image_shape[1], image_shape[2])
        self.read = LevelEmbedding(image_shape[0], levels, level_channels)
        self.first = CausalConv2d(self.read.out_channels, hidden_channels, 7, "A")
        self.layers = nn.ModuleList(
            RowLSTMLayer(hidden_channels, num_classes, conditional, dropout) for _ in range(n_residual)
        )
        self.last = PointwiseStack(hidden_channels, out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x uint8 [B,C,H,W], y int64 [B] -> features [B,out_channels,H,W]."""
        h = self.first(self.read(x, like=self.first.weight))
        for layer in self.layers:
            h = layer(h, y)
        return self.last(h)

    def init_cache(self, y: Tensor) -> dict[str, Any]:
        """All storage for stepping through images of the classes y [B]."""
        make = partial(FrontCache, batch=len(y), image_size=self.image_size, skew=self.skew)
        first, layers = self.first.cache(make), [layer.init_cache(make, y) for layer in self.layers]
        return {
            "image": ImageFronts(first, chain(*layers), self.read, self.image_size[1]),
            "layers": layers,
            "last": self.last.init_cache(),
        }

    def step(self, cache: dict[str, Any], previous: Tensor, i: int, j: int) -> Tensor:
        """Features [n*B,D] at the front of (i, j), asked for in the order of `fronts`; equal to `forward` there.

        `previous` holds the pixels of the front before, uint8 [n*B,C]; it is ignored at (0, 0), where the cache is
        emptied. In eval mode.
        """
        front = cache["image"].advance(previous, i, j)
        h = cache["image"].first.output(front)
        for layer, own in zip(self.layers, cache["layers"], strict=True):
            h = layer.step(own, h, front)
        return self.last.step(cache["last"], h)

    def context(self, i: int, j: int) -> Tensor:
        """The earlier pixels, bool [H,W], that the features at row i, column j depend on."""
        seen = torch.zeros(self.image_size, dtype=torch.bool)
        seen[i, j] = True
        for layer in reversed(self.layers):
            seen = layer.reach(seen)
        return self.first.reach(seen)


class RowLSTMLayer(nn.Module):
    """x + conv1×1(h), h the states of an LSTM that reads the rows of norm(x) from top to bottom (equation 3).

    [o, f, i, g] = s2s * h_above + i2s * norm(x) + class;  c = σ(f) c_above + σ(i) tanh(g);  h = σ(o) tanh(c).
    i2s sees the pixel and its left neighbour (a 3×1 kernel under mask B), s2s three pixels of the row above.
    """

    recomputable = True

    def __init__(self, channels: int, num_classes: int, conditional: bool, dropout: float) -> None:
        super().__init__()
        states = channels // 2
        self.norm = ChannelNorm(channels)
        self.input_to_state = nn.Conv2d(channels, 4 * states, (1, 2))
        self.state_to_state = nn.Conv1d(states, 4 * states, 3, padding=1, bias=False)
        self.embed = ClassEmbedding(num_classes, 4 * states, conditional)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(states, channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B,channels,H,W] -> [B,channels,H,W]."""
        inputs = self.input_to_state(F.pad(self.norm(x), (1, 0)))
        inputs = inputs + self.embed(y).to(inputs.dtype)
        h = torch.zeros_like(inputs[:, : self.out.in_channels, 0])  # [B,states,W]
        c, rows = h.to(torch.promote_types(h.dtype, torch.float32)), []
        for row in inputs.unbind(2):
            h, c = lstm(row + self.state_to_state(h), c, dim=1)
            rows.append(h)
        return x + self.out(self.dropout(torch.stack(rows, dim=2)))

    def init_cache(self, make: MakeCache, y: Tensor) -> tuple[FrontCache, FrontCache, FrontCache]:
        """For what i2s reads, for the states that s2s reads, and for the cells."""
        left, above = self.input_to_state, self.state_to_state.weight[:, :, None]
        zeros, states = left.weight.new_zeros, self.out.in_channels
        up_to_the_pixel, row_above = torch.tensor([[[[1, 1, 0]]]]), torch.tensor([[[[1], [0]]]])  # of kernels
        inputs = make(F.pad(left.weight, (0, 1)), left.bias, up_to_the_pixel, before=self.norm)
        inputs.bias.unflatten(0, (-1, len(y))).add_(self.embed(y)[..., 0, 0])
        hidden = make(F.pad(above, (0, 0, 0, 1)), zeros(4 * states), row_above.expand(1, 1, 2, 3))
        precise = torch.promote_types(left.weight.dtype, torch.float32)  # as in `forward`
        cells = make(zeros(1, states, 2, 1, dtype=precise), zeros(1, dtype=precise), row_above)
        return inputs, hidden, cells

    def step(self, cache: tuple[FrontCache, FrontCache, FrontCache], x: Tensor, front: Front) -> Tensor:
        """`forward` at a front, without dropout: x [n*B,channels] -> the same, in place."""
        inputs, hidden, cells = cache
        inputs.put_norm(x, front)
        h, c = lstm(hidden.add_output(inputs.output(front), front), cells.window(front), dim=1)
        hidden.put(h, front)
        cells.put(c, front)
        return x.addmm_(h, self.out.weight[..., 0, 0].T)

    def reach(self, seen: Tensor) -> Tensor:
        """The inputs, bool [H,W], that the outputs in `seen`, bool [H,W], are computed from."""
        states = seen.clone()
        for i in range(len(seen) - 1, 0, -1):
            states[i - 1] |= F.max_pool1d(states[i][None].float(), 3, 1, 1)[0] > 0
        return states | F.pad(states, (-1, 1))
