"""Fronts: pixels that a network can compute at once.

Where a network sees fewer than `skew` columns to the right of a pixel for each row above it, the pixels (i, j),
(i-1, j+skew), (i-2, j+2 skew), ... see none of each other, and all that they see lies in earlier fronts. 28×28 pixels
are 136 fronts of skew 4: a CPU that is kept busy by calls, or a GPU by launches, has five times fewer to make. A
network that sees the whole row above has skew = width, and its fronts are the pixels in raster order.

A front is named by its lowest pixel.
"""

from collections.abc import Iterator
from typing import NamedTuple


def fronts(height: int, width: int, skew: int) -> Iterator[tuple[int, int]]:
    """The lowest pixels of the fronts of an image, in the order in which they can be computed."""
    for i in range(height):
        for j in range(width if i == height - 1 else min(skew, width)):
            yield i, j


class Front(NamedTuple):
    """The pixels (row + r, time - skew (row + r)) for r in 0..n-1."""

    row: int
    n: int
    time: int

    @classmethod
    def at(cls, i: int, j: int, width: int, skew: int) -> "Front":
        """The front whose lowest pixel is (i, j)."""
        n = min(i, (width - 1 - j) // skew) + 1
        return cls(i - n + 1, n, j + skew * i)

    def among(self, width: int, skew: int) -> slice:
        """These pixels among all, in raster order."""
        first, stride = self.time + (width - skew) * self.row, max(1, width - skew)
        return slice(first, first + self.n * stride, stride)
