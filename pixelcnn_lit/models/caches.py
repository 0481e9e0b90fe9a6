"""Causal convolutions computed where their inputs are known, as one matrix product over the live taps.

`RowCache` goes pixel by pixel, `FrontCache` front by front.
"""

import torch
from torch import Tensor, nn

from pixelcnn_lit.fronts import Front


class TapsCache:
    """A convolution's live taps as a matrix, with the norm and the ReLU before it. Where inputs lie, subclasses know.

    All is made beforehand: between two pixels a small network has microseconds.

    Args:
        weight: masked, [out,in,rows,k]. bias: [out]. mask: [1,1,rows,k].
        n_outputs: computed at a time.
        before: a norm that stands, with a ReLU, before the convolution.
        after: a BatchNorm that stands behind it, which in eval mode is a multiplication and an addition.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        n_outputs: int,
        before: nn.LayerNorm | None = None,
        after: nn.BatchNorm2d | None = None,
    ) -> None:
        _, self.channels, self.rows, k = weight.shape
        if after is not None:
            assert after.running_mean is not None
            assert after.running_var is not None
            scale = after.weight / (after.running_var + after.eps).sqrt()
            weight, bias = weight * scale[:, None, None, None], (bias - after.running_mean) * scale + after.bias
        taps = weight.permute(3, 2, 1, 0)  # [k,rows,in,out]
        alive = (int(mask[0, 0].T.flatten().nonzero().max()) + 1) * self.channels
        self.matrix, self.side = taps.flatten(0, 2)[:alive].contiguous(), k // 2
        self.bias = bias.repeat(n_outputs, 1)
        self.result = torch.empty_like(self.bias)
        self.norm = before and (before.normalized_shape, before.weight, before.bias, before.eps)


class RowCache(TapsCache):
    """A causal convolution pixel by pixel.

    It keeps the inputs of the current row and of the `rows - 1` above it, [B,W+2*side,rows,C]. The rows of a column
    lie beside each other, so that the taps of a pixel are one stretch of memory that needs no gathering: columns
    j-side to j+side, up to the last tap that is alive. Padding is zero.

    A column is a number, which finds ready-made views, or an int64 tensor [1] on the device, which a CUDA graph can
    replay with other values in it.

    Args:
        weight, bias, mask, before, after: see `TapsCache`.
        batch, width: of the images.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        batch: int,
        width: int,
        before: nn.LayerNorm | None = None,
        after: nn.BatchNorm2d | None = None,
    ) -> None:
        super().__init__(weight, bias, mask, batch, before, after)
        self.inputs = weight.new_zeros(batch, width + 2 * self.side, self.rows, self.channels)
        self.offsets = torch.arange(weight.shape[3], device=weight.device)
        flat, alive = self.inputs.flatten(1), len(self.matrix)
        self.slots = [self.inputs[:, j + self.side, -1] for j in range(width)]
        self.windows = [flat[:, j * self.rows * self.channels :][:, :alive] for j in range(width)]

    def reset(self) -> None:
        self.inputs.zero_()

    def new_row(self) -> None:
        """What was the current row becomes the one above."""
        for row in range(self.rows - 1):
            self.inputs[:, :, row].copy_(self.inputs[:, :, row + 1])

    def put(self, x: Tensor, j: int | Tensor) -> None:
        """The input [B,C] at column j of the current row."""
        if isinstance(j, int):
            self.slots[j].copy_(x)
        else:
            self.inputs[:, :, -1].index_copy_(1, j + self.side, x[:, None])

    def put_norm(self, x: Tensor, j: int | Tensor) -> None:
        """norm(x) as the input."""
        self.put(torch.layer_norm(x, *self.norm) if self.norm else x, j)

    def put_relu(self, x: Tensor, j: int) -> None:
        """relu(norm(x)) as the input."""
        if self.norm:
            x = torch.native_layer_norm(x, *self.norm)[0]
        torch.clamp_min(x, 0, out=self.slots[j])

    def window(self, j: int | Tensor) -> Tensor:
        """The inputs [B,taps*C] under the live taps at column j."""
        if isinstance(j, int):
            return self.windows[j]
        return self.inputs.index_select(1, j + self.offsets).flatten(1)[:, : len(self.matrix)]

    def output(self, j: int | Tensor) -> Tensor:
        """The convolution at column j, [B,out], in a place that the next one overwrites."""
        return torch.addmm(self.bias, self.window(j), self.matrix, out=self.result)

    def add_output(self, x: Tensor, j: int | Tensor) -> Tensor:
        """x [B,out] plus the convolution, in place."""
        return x.add_(self.bias).addmm_(self.window(j), self.matrix)


class FrontCache(TapsCache):
    """A causal convolution front by front.

    Memory is a line of (W + 2 side) columns for each image and each of so many rows, and in each column the inputs of
    that row and of the `rows - 1` above it: an input is written once into its own row and once into each below that
    will read it. So the taps of a pixel are one stretch of memory. Between rows lies a gap of `skew` columns: then the
    pixels of a front lie a line apart, as do the images of a batch, and all are one matrix without gathering anything.
    Padding is zero, once the cache has been reset.

    Args:
        weight, bias, mask, before, after: see `TapsCache`.
        batch, image_size: of the images. skew: of the fronts.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        batch: int,
        image_size: tuple[int, int],
        skew: int,
        before: nn.LayerNorm | None = None,
        after: nn.BatchNorm2d | None = None,
    ) -> None:
        (height, width), highest = image_size, -(-image_size[1] // skew)
        super().__init__(weight, bias, mask, highest * batch, before, after)
        self.batch, self.skew, self.held = batch, skew, highest + self.rows - 1  # rows that a front reads or writes
        self.column = self.rows * self.channels
        self.line = (width + 2 * self.side) * self.column
        self.row = batch * self.line + skew * self.column
        self.top, self.n_rows = 0, min(2 * self.held, height + self.rows - 1)
        self.inputs = weight.new_empty(self.n_rows * self.row)
        self.rooms = [(self.bias[: n * batch], self.result[: n * batch]) for n in range(highest + 1)]

    def reset(self) -> None:
        self.inputs.zero_()
        self.top = 0

    def make_room(self, front: Front) -> None:
        """Forget rows above the front where those below it would not fit in."""
        last = front.row + front.n - 1
        if last + self.rows > self.top + self.n_rows:
            size = (last + self.rows - 1 - front.row) * self.row
            self.inputs[:size].copy_(self.inputs[(front.row - self.top) * self.row :][:size])
            self.top = front.row

    def place(self, front: Front) -> Tensor:
        """Where the inputs of the front go: [rows,n*B,C], in each row that reads them."""
        size, to_next_row = (self.rows, front.n * self.batch, self.channels), self.row - self.channels
        own = self._start(front) + (self.side + 1) * self.column - self.channels
        return self.inputs.as_strided(size, (to_next_row, self.line, 1), own)

    def window(self, front: Front) -> Tensor:
        """The inputs [n*B,taps*C] under the live taps at the front."""
        size = front.n * self.batch, len(self.matrix)
        return self.inputs.as_strided(size, (self.line, 1), self._start(front))

    def _start(self, front: Front) -> int:
        return (front.row - self.top) * self.batch * self.line + (front.time - self.skew * self.top) * self.column

    def put(self, x: Tensor, front: Front) -> None:
        """The inputs [n*B,C] at the front."""
        self.place(front).copy_(x)

    def put_relu(self, x: Tensor, front: Front) -> None:
        """relu(norm(x)) as the inputs."""
        if self.norm:
            x = torch.native_layer_norm(x, *self.norm)[0]
        place = self.place(front)
        torch.clamp_min(x.expand_as(place), 0, out=place)

    def output(self, front: Front) -> Tensor:
        """The convolution at the front, [n*B,out], in a place that the next one overwrites."""
        bias, result = self.rooms[front.n]
        return torch.addmm(bias, self.window(front), self.matrix, out=result)

    def add_output(self, x: Tensor, front: Front) -> Tensor:
        """x [n*B,out] plus the convolution, in place."""
        return x.add_(self.rooms[front.n][0]).addmm_(self.window(front), self.matrix)
