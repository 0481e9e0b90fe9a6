"""Fronts: pixels that a network can compute at once.

Where a network sees fewer than `skew` columns to the right of a pixel for each row above it, the pixels (i, j),
(i-1, j+skew), (i-2, j+2 skew), ... see none of each other, and all that they see lies in earlier fronts. With skew 4,
and the time of a front for each of its pixels, `column + skew × row`:

     0  1  2  3  4  5  6  7  8  9
     4  5  6  7  8  9 10 11 12 13
     8  9 10 11 12 13 14 15 16 17

A network that sees the whole row above has skew = width, and its fronts are the pixels one by one. A front is named
by its lowest pixel.
"""

from collections.abc import Iterator
from typing import NamedTuple


def fronts(height: int, width: int, skew: int) -> Iterator[tuple[int, int]]:
    """The lowest pixels of the fronts of an image, in the order of time."""
    for i in range(height):
        for j in range(width if i == height - 1 else min(skew, width)):
            yield i, j


class Front(NamedTuple):
    """The pixels (row + r, time - skew (row + r)) for r in 0..n-1."""

    row: int
    n: int
    time: int

    @classmethod
    def of(cls, i: int, j: int, width: int, skew: int) -> "Front":
        """The front whose lowest pixel is (i, j)."""
        n = min(i, (width - 1 - j) // skew) + 1
        return cls(i - n + 1, n, j + skew * i)

    def as_slice(self, width: int, skew: int) -> slice:
        """Its pixels among all in raster order, the highest first."""
        first, stride = self.time + (width - skew) * self.row, max(1, width - skew)
        return slice(first, first + self.n * stride, stride)
