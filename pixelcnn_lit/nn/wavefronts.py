"""Wavefronts: pixels that a network can compute at once.

Where a network sees fewer than `skew` columns to the right of a pixel for each row above it, the pixels (i, j),
(i-1, j+skew), (i-2, j+2 skew), ... see none of each other, and all that they see lies in earlier wavefronts. With
skew 4, and the time of its wavefront, `column + skew × row`, for each pixel:

     0  1  2  3  4  5  6  7  8  9
     4  5  6  7  8  9 10 11 12 13
     8  9 10 11 12 13 14 15 16 17

A network that sees the whole row above has skew = width, and its wavefronts are the pixels one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Wavefront(NamedTuple):
    """The pixels (row + r, time - skew (row + r)) for r in 0..n-1."""

    row: int
    n: int
    time: int


@dataclass(frozen=True, slots=True)
class At:
    """The place of a step, with all that a layer may ask for: a pixel, and the wavefront whose lowest pixel it is.

    Args:
        row, column: of the pixel. width: of the image.
        wavefront: what is computed at once.
        pixels: the wavefront among all pixels in raster order, the highest first.
        column_on_device: the column once more, int64 [1] on the device, for a step that a CUDA graph replays with
            another number in it; None where a step is run as it is.
    """

    row: int
    column: int
    width: int
    wavefront: Wavefront
    pixels: slice
    column_on_device: Tensor | None = None

    @classmethod
    def pixel(cls, row: int, column: int, width: int) -> "At":
        """Return a pixel alone."""
        position = row * width + column
        return cls(row, column, width, Wavefront(row, 1, position), slice(position, position + 1))

    @property
    def position(self) -> int:
        """The place of the pixel in raster order."""
        return self.row * self.width + self.column

    def coarser(self) -> "At":
        """Return the pixel of half the resolution that this one, without its wavefront, lies in."""
        return At.pixel(self.row // 2, self.column // 2, (self.width + 1) // 2)


def steps(height: int, width: int, skew: int) -> Iterator[At]:
    """Go through the wavefronts of an image in the order of time.

    Example:
        >>> [(at.row, at.column, at.wavefront.n) for at in steps(height=2, width=3, skew=2)]
        [(0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 1), (1, 2, 1)]
    """
    for row in range(height):
        for column in range(width if row == height - 1 else min(skew, width)):
            n = min(row, (width - 1 - column) // skew) + 1
            wavefront = Wavefront(row - n + 1, n, column + skew * row)
            first = wavefront.row * width + column + skew * (n - 1)
            stride = max(1, width - skew)
            yield At(row, column, width, wavefront, slice(first, first + n * stride, stride))
