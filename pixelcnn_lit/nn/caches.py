"""Causal convolutions computed where their inputs are known, as one matrix product over the live taps.

`RowCache` goes pixel by pixel, `FrontCache` front by front (see `fronts`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pixelcnn_lit.nn.embeddings import LevelEmbedding
from pixelcnn_lit.nn.fronts import Front


class TapsCache:
    """A convolution's live taps as a matrix, with the norm and the ReLU before it. Subclasses decide where inputs lie.

    They have `place(at)`, where the inputs at a column or front go, `put(x, at)`, which copies x [n,C] there,
    `window(at)`, the inputs [n,taps*C] under the live taps there, and `room(at)`, biases and results [n,out].

    Args:
        weight: masked, [out,in,rows,k]. bias: [out]. mask: [1,1,rows,k].
        n_outputs: computed at a time, at most.
        before: a norm that stands, with a ReLU, before the convolution.
        after: a BatchNorm that stands behind it, which in eval mode is a multiplication and an addition.
    """

    place: Any
    put: Any
    window: Any
    room: Any

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        n_outputs: int,
        before: nn.LayerNorm | None,
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

    def put_relu(self, x: Tensor, at: Any) -> None:
        """relu(norm(x)), [n,C], as the inputs."""
        if self.norm:
            x = torch.native_layer_norm(x, *self.norm)[0]
        place = self.place(at)
        torch.clamp_min(x.expand_as(place), 0, out=place)

    def put_norm(self, x: Tensor, at: Any) -> None:
        """norm(x), [n,C], as the inputs."""
        self.put(torch.layer_norm(x, *self.norm) if self.norm else x, at)

    def output(self, at: Any) -> Tensor:
        """The convolution, [n,out], in a place that the next one overwrites."""
        bias, result = self.room(at)
        return torch.addmm(bias, self.window(at), self.matrix, out=result)

    def add_output(self, x: Tensor, at: Any) -> Tensor:
        """x [n,out] plus the convolution, in place."""
        return x.add_(self.room(at)[0]).addmm_(self.window(at), self.matrix)


class RowCache(TapsCache):
    """A causal convolution pixel by pixel.

    It keeps the inputs of the current row and of the `rows - 1` above it, [B,W+2*side,rows,C]. The rows of a column
    lie beside each other, so that the taps of a pixel are one stretch of memory that needs no gathering: columns
    j-side to j+side, up to the last tap that is alive. Padding is zero.

    A column is a number, which finds ready-made views, or for `put`, `put_norm` and `window` an int64 tensor [1] on the
    device, which a CUDA graph can replay with other values in it.

    Args:
        weight, bias, mask, before: see `TapsCache`.
        batch, width: of the images.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, mask: Tensor, batch: int, width: int, before: nn.LayerNorm | None = None
    ) -> None:
        super().__init__(weight, bias, mask, batch, before)
        self.inputs = weight.new_zeros(batch, width + 2 * self.side, self.rows, self.channels)
        self.offsets = torch.arange(weight.shape[3], device=weight.device)
        flat, alive = self.inputs.flatten(1), len(self.matrix)
        self.places = [self.inputs[:, j + self.side, -1] for j in range(width)]
        self.windows = [flat[:, j * self.rows * self.channels :][:, :alive] for j in range(width)]

    def reset(self) -> None:
        self.inputs.zero_()

    def new_row(self) -> None:
        """What was the current row becomes the one above."""
        for row in range(self.rows - 1):
            self.inputs[:, :, row].copy_(self.inputs[:, :, row + 1])

    def place(self, j: int) -> Tensor:
        return self.places[j]

    def window(self, j: int | Tensor) -> Tensor:
        if isinstance(j, int):
            return self.windows[j]
        return self.inputs.index_select(1, j + self.offsets).flatten(1)[:, : len(self.matrix)]

    def room(self, j: int) -> tuple[Tensor, Tensor]:
        return self.bias, self.result

    def put(self, x: Tensor, j: int | Tensor) -> None:
        """The input [B,C] at column j of the current row."""
        if isinstance(j, int):
            self.places[j].copy_(x)
        else:
            self.inputs[:, :, -1].index_copy_(1, j + self.side, x[:, None])


class ImageRows:
    """What a network that goes pixel by pixel keeps of an image: the cache of its first convolution, and all others.

    `pixel` [B,channels] is the pixel before, as `read` makes it.

    Args:
        first: the cache. others: what else has a `reset` and a `new_row`.
        read: of the network.
    """

    pixel: Tensor

    def __init__(self, first: RowCache, others: Iterable[Any], read: LevelEmbedding) -> None:
        self.first, self.all = first, [first, *others]
        self.read = read.reader(like=first.inputs)

    def advance(self, previous: Tensor, i: int, j: int) -> None:
        """Take in `previous`, the pixel before (i, j), uint8 [B,C]. At (0, 0) there is none, and all is emptied."""
        if (i, j) == (0, 0):
            for cache in self.all:
                cache.reset()
        else:
            self.pixel = self.read(previous)
            self.first.put(self.pixel, (j - 1) % len(self.first.places))
        if j == 0 and i > 0:
            for cache in self.all:
                cache.new_row()


class FrontCache(TapsCache):
    """A causal convolution front by front.

    Memory is a line of columns, W and the padding, for each image and each of so many rows. A column holds the inputs
    of its own row and of the `rows - 1` above it, [rows,C], so that the taps of a pixel are one stretch of memory, as
    in a RowCache; for this an input is written into its own row and into each below that will read it.

    Column j of row i of image b begins at  row_stride * i + line_stride * b + column_stride * j. Between rows there is
    a gap of `skew` columns, row_stride = B line_stride + skew column_stride, and so at time t = j + skew i that is
    line_stride (B i + b) + column_stride t: the pixels of a front lie one line apart, as do the images of a batch, and
    all of them together are one matrix that nobody had to gather.

    Padding is zero, once the cache has been reset. Rows that no front will read again give way to others.

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
        self.batch, self.skew = batch, skew
        self.column_stride = self.rows * self.channels
        self.line_stride = (width + 2 * self.side) * self.column_stride
        self.row_stride = batch * self.line_stride + skew * self.column_stride
        in_use = highest + self.rows - 1  # rows that a front reads or writes
        self.top, self.n_rows = 0, min(2 * in_use, height + self.rows - 1)
        self.inputs = weight.new_empty(self.n_rows * self.row_stride)
        self.rooms = [(self.bias[: n * batch], self.result[: n * batch]) for n in range(highest + 1)]

    def reset(self) -> None:
        self.inputs.zero_()
        self.top = 0

    def make_room(self, front: Front) -> None:
        """Forget the rows above the front where those below it would not fit in."""
        last = front.row + front.n - 1
        if last + self.rows > self.top + self.n_rows:
            size = (last + self.rows - 1 - front.row) * self.row_stride
            self.inputs[:size].copy_(self.inputs[(front.row - self.top) * self.row_stride :][:size])
            self.top = front.row

    def place(self, front: Front) -> Tensor:
        """[rows,n*B,C]: of each row that will read them."""
        size, to_next_row = (self.rows, front.n * self.batch, self.channels), self.row_stride - self.channels
        own = self._start(front) + (self.side + 1) * self.column_stride - self.channels
        return self.inputs.as_strided(size, (to_next_row, self.line_stride, 1), own)

    def window(self, front: Front) -> Tensor:
        size = front.n * self.batch, len(self.matrix)
        return self.inputs.as_strided(size, (self.line_stride, 1), self._start(front))

    def room(self, front: Front) -> tuple[Tensor, Tensor]:
        return self.rooms[front.n]

    def put(self, x: Tensor, front: Front) -> None:
        """The inputs [n*B,C] at the front."""
        self.place(front).copy_(x)

    def _start(self, front: Front) -> int:
        """Of the window of the front's highest pixel in the first image."""
        row, time = front.row - self.top, front.time - self.skew * self.top
        return self.line_stride * self.batch * row + self.column_stride * time


class ImageFronts:
    """What a network that goes by fronts keeps of an image: the cache of its first convolution, and all the others.

    Args:
        first, others: the caches.
        read: of the network. width: of the image.
    """

    def __init__(self, first: FrontCache, others: Iterable[FrontCache], read: LevelEmbedding, width: int) -> None:
        self.first, self.all, self.width = first, [first, *others], width
        self.read = read.reader(like=first.inputs)
        self.front = Front(0, 0, 0)

    def advance(self, previous: Tensor, i: int, j: int) -> Front:
        """The front of (i, j), once `previous`, the pixels of the front before, uint8 [n*B,C], have been taken in.

        At (0, 0) there are none, and the caches are emptied.
        """
        if (i, j) == (0, 0):
            for cache in self.all:
                cache.reset()
        else:
            self.first.put(self.read(previous), self.front)
        self.front = Front.of(i, j, self.width, self.first.skew)
        if j == 0:
            for cache in self.all:
                cache.make_room(self.front)
        return self.front
