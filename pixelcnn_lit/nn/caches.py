"""Causal convolutions computed where their inputs are known, as one matrix product over the live taps.

A `RowCache` goes pixel by pixel, a `WavefrontCache` wavefront by wavefront (see `wavefronts`). `RasterState` and
`WavefrontState` hold all caches of a network, and lead them through an image.
"""

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pixelcnn_lit.nn.wavefronts import At


class Convolution(NamedTuple):
    """A causal convolution with the norms around it.

    weight: masked, [out,in,rows,k]. bias: [out]. mask: [1,1,rows,k].
    before: a norm that stands before the convolution, with a ReLU where inputs are written by `write_relu`.
    after: a BatchNorm that stands behind it, which in eval mode is a multiplication and an addition.
    """

    weight: Tensor
    bias: Tensor
    mask: Tensor
    before: nn.LayerNorm | None = None
    after: nn.BatchNorm2d | None = None


class TapsCache:
    """A convolution's live taps as a matrix, with the norm before it. Subclasses decide where inputs lie.

    Args:
        n_outputs: computed at a time, at most.
    """

    def __init__(self, convolution: Convolution, n_outputs: int) -> None:
        weight, bias, mask, before, after = convolution
        _, self.channels, self.rows, k = weight.shape
        if after is not None:
            assert after.running_mean is not None
            assert after.running_var is not None
            scale = after.weight / (after.running_var + after.eps).sqrt()
            weight, bias = weight * scale[:, None, None, None], (bias - after.running_mean) * scale + after.bias
        taps = weight.permute(3, 2, 1, 0)  # [k,rows,in,out]
        alive = (int(mask[0, 0].T.flatten().nonzero().max()) + 1) * self.channels
        self.matrix = taps.flatten(0, 2)[:alive].contiguous()
        self.side = k // 2
        self.bias = bias.repeat(n_outputs, 1)
        self.result = torch.empty_like(self.bias)
        self.norm = before and (before.normalized_shape, before.weight, before.bias, before.eps)

    def slot(self, at: At) -> Tensor:
        """Return where the inputs at a step go, [...,n,in]."""
        raise NotImplementedError

    def taps(self, at: At) -> Tensor:
        """The inputs under the live taps, [n,taps*in]."""
        raise NotImplementedError

    def buffers(self, at: At) -> tuple[Tensor, Tensor]:
        """Biases, and memory for results, [n,out] each."""
        raise NotImplementedError

    def write(self, x: Tensor, at: At) -> None:
        """Take x [n,in] as the inputs."""
        self.slot(at).copy_(x)

    def write_relu(self, x: Tensor, at: At) -> None:
        """Take relu(norm(x)), [n,in], as the inputs."""
        if self.norm:
            x = torch.native_layer_norm(x, *self.norm)[0]
        slot = self.slot(at)
        torch.clamp_min(x.expand_as(slot), 0, out=slot)

    def write_norm(self, x: Tensor, at: At) -> None:
        """Take norm(x), [n,in], as the inputs."""
        self.write(torch.layer_norm(x, *self.norm) if self.norm else x, at)

    def output(self, at: At) -> Tensor:
        """Return the convolution, [n,out], in memory that the next one overwrites."""
        bias, result = self.buffers(at)
        return torch.addmm(bias, self.taps(at), self.matrix, out=result)

    def add_output(self, x: Tensor, at: At) -> Tensor:
        """Add the convolution to x [n,out], in place."""
        return x.add_(self.buffers(at)[0]).addmm_(self.taps(at), self.matrix)


SomeCache = TypeVar("SomeCache", bound=TapsCache, covariant=True)


class State(Protocol[SomeCache]):
    """All caches of a network: `RasterState` or `WavefrontState`."""

    def cache(self, convolution: Convolution) -> SomeCache:
        """Make the cache of a convolution."""
        ...


class RowCache(TapsCache):
    """A causal convolution pixel by pixel.

    It keeps the inputs of the current row and of the `rows - 1` above it, [B,W+2*side,rows,C]. The rows of a column
    lie beside each other, so that the taps of a pixel are one stretch of memory that needs no gathering: columns
    j-side to j+side, up to the last tap that is alive. Padding is zero.

    Columns are found as ready-made views, or, where `at.column_on_device` is given, by index on the device, which a
    CUDA graph can replay with another column in it.

    Args:
        batch, width: of the images.
    """

    def __init__(self, convolution: Convolution, batch: int, width: int) -> None:
        super().__init__(convolution, batch)
        weight = convolution.weight
        self.width = width
        self.inputs = weight.new_zeros(batch, width + 2 * self.side, self.rows, self.channels)
        self.offsets = torch.arange(weight.shape[3], device=weight.device)
        flat, alive = self.inputs.flatten(1), len(self.matrix)
        self.slots = [self.inputs[:, j + self.side, -1] for j in range(width)]
        self.all_taps = [flat[:, j * self.rows * self.channels :][:, :alive] for j in range(width)]

    def reset(self) -> None:
        """Forget an image."""
        self.inputs.zero_()

    def new_row(self) -> None:
        """Take what was the current row as the one above."""
        for row in range(self.rows - 1):
            self.inputs[:, :, row].copy_(self.inputs[:, :, row + 1])

    def slot(self, at: At) -> Tensor:
        assert at.column_on_device is None, "a replayed step would write to the column of its recording: use `write`"
        return self.slots[at.column]

    def taps(self, at: At) -> Tensor:
        column = at.column_on_device
        if column is None:
            return self.all_taps[at.column]
        return self.inputs.index_select(1, column + self.offsets).flatten(1)[:, : len(self.matrix)]

    def buffers(self, at: At) -> tuple[Tensor, Tensor]:
        return self.bias, self.result

    def write(self, x: Tensor, at: At) -> None:
        column = at.column_on_device
        if column is None:
            self.slots[at.column].copy_(x)
        else:
            self._write_on_device(x, column)

    def write_previous(self, x: Tensor, at: At) -> None:
        """Take x [B,in] as the input at the pixel before: of the current row, or of the one above, not yet moved up."""
        column = at.column_on_device
        if column is None:
            self.slots[at.column - 1].copy_(x)
        else:
            self._write_on_device(x, (column - 1) % self.width)

    def _write_on_device(self, x: Tensor, column: Tensor) -> None:
        self.inputs[:, :, -1].index_copy_(1, column + self.side, x[:, None])


class Resettable(Protocol):
    """A cache that a `RasterState` leads through an image."""

    def reset(self) -> None: ...

    def new_row(self) -> None: ...


class RasterState:
    """The caches of a network that goes pixel by pixel, through images of B classes of a width.

    The first that is made reads the image.
    """

    def __init__(self, batch: int, width: int) -> None:
        self.batch = batch
        self.width = width
        self.caches: list[RowCache] = []
        self.others: list[Resettable] = []

    def cache(self, convolution: Convolution) -> RowCache:
        """Make the cache of a convolution."""
        made = RowCache(convolution, self.batch, self.width)
        self.caches.append(made)
        return made

    def advance(self, previous: Tensor, at: At) -> None:
        """Take in `previous`, the pixel before `at`, [B,E]. At position 0 there is none, and all is forgotten."""
        every: list[Resettable] = [*self.caches, *self.others]
        if at.position == 0:
            for cache in every:
                cache.reset()
            return
        self.caches[0].write_previous(previous, at)
        if at.column == 0:
            for cache in every:
                cache.new_row()


class WavefrontCache(TapsCache):
    """A causal convolution wavefront by wavefront.

    Memory is a line of columns for each row of each image: W columns, and `side` of padding at either end. A column
    holds the inputs of its own row and of the `rows - 1` above it, [rows,C], so that the taps of a pixel are one
    stretch of memory, as in a RowCache; for this an input is written into its own row and into each below that will
    read it. Between the lines of one row and those of the next there is a gap of `skew` columns. Two images a and b of
    width 4, skew 2, side 1, where · is padding and _ the gap:

        row 0   a ·0123·  b ·0123·  _ _
        row 1   a ·0123·  b ·0123·  _ _

    So the address of a column is  row (B line + skew column) + image line + column. At time t = column + skew row, that
    is  (B row + image) line + t column:  the pixels of a wavefront lie one line apart, as do the images of a batch, and
    all of them together are one matrix that nobody had to gather.

    Padding is zero, once the cache has been reset. Rows that no wavefront will read again give way to others.

    Args:
        batch, image_size: of the images. skew: of the wavefronts.
    """

    def __init__(self, convolution: Convolution, batch: int, image_size: tuple[int, int], skew: int) -> None:
        height, width = image_size
        longest = -(-width // skew)  # pixels of a wavefront, at most
        super().__init__(convolution, longest * batch)
        self.batch = batch
        self.skew = skew
        self.column = self.rows * self.channels
        self.line = (width + 2 * self.side) * self.column
        self.row = batch * self.line + skew * self.column  # from the lines of a row to those of the next
        in_use = longest + self.rows - 1  # rows that a wavefront reads or writes
        self.n_rows = min(2 * in_use, height + self.rows - 1)
        self.top = 0  # the row of the image that lies first in memory
        self.inputs = convolution.weight.new_empty(self.n_rows * self.row)
        self.all_buffers = [(self.bias[: n * batch], self.result[: n * batch]) for n in range(longest + 1)]

    def address(self, at: At) -> int:
        """Return where the taps of the wavefront's highest pixel begin, in the first image."""
        row, time = at.wavefront.row - self.top, at.wavefront.time - self.skew * self.top
        return self.batch * row * self.line + time * self.column

    def reset(self) -> None:
        """Forget an image."""
        self.inputs.zero_()
        self.top = 0

    def make_room(self, at: At) -> None:
        """Forget the rows above the wavefront where those below it would not fit in."""
        first, n, _ = at.wavefront
        kept = n - 1 + self.rows - 1  # rows that are read again
        if first + kept >= self.top + self.n_rows:
            self.inputs[: kept * self.row].copy_(self.inputs[(first - self.top) * self.row :][: kept * self.row])
            self.top = first

    def slot(self, at: At) -> Tensor:
        """[rows,n*B,C]: in each row that will read them."""
        own = self.address(at) + self.side * self.column + (self.rows - 1) * self.channels
        size = self.rows, at.wavefront.n * self.batch, self.channels
        return self.inputs.as_strided(size, (self.row - self.channels, self.line, 1), own)

    def taps(self, at: At) -> Tensor:
        size = at.wavefront.n * self.batch, len(self.matrix)
        return self.inputs.as_strided(size, (self.line, 1), self.address(at))

    def buffers(self, at: At) -> tuple[Tensor, Tensor]:
        return self.all_buffers[at.wavefront.n]


class WavefrontState:
    """The caches of a network that goes by wavefronts of a skew, through images of B classes.

    The first that is made reads the image.
    """

    def __init__(self, batch: int, image_size: tuple[int, int], skew: int) -> None:
        self.batch = batch
        self.image_size = image_size
        self.skew = skew
        self.caches: list[WavefrontCache] = []

    def cache(self, convolution: Convolution) -> WavefrontCache:
        """Make the cache of a convolution."""
        made = WavefrontCache(convolution, self.batch, self.image_size, self.skew)
        self.caches.append(made)
        return made

    def advance(self, previous: Tensor, at: At) -> None:
        """Take in `previous`, the wavefront before `at`, [nB,E]. At position 0 there is none, and all is forgotten."""
        if at.position == 0:
            for cache in self.caches:
                cache.reset()
        else:
            self.caches[0].write(previous, self.before)
        if at.column == 0:
            for cache in self.caches:
                cache.make_room(at)
        self.before = at
