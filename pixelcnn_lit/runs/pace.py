"""The pace of several processes together."""

from collections import defaultdict


class Pace:
    """The pace at which images are drawn, by this process and perhaps others beside it.

    Each is timed while it draws, and their rates are added: how long it takes another to start is not in them.
    """

    def __init__(self) -> None:
        self._images, self._seconds = defaultdict[int, int](int), defaultdict[int, float](float)  # by process

    def add(self, process: int, images: int, seconds: float) -> None:
        self._images[process] += images
        self._seconds[process] += seconds

    @property
    def images_per_second(self) -> float:
        return sum(images / self._seconds[process] for process, images in self._images.items())

    def __str__(self) -> str:
        """The end of a phrase; empty where nobody was timed, as by a sampler that does not."""
        if not self._images:
            return ""
        together = f" in {len(self._images)} processes" if len(self._images) > 1 else ""
        return f", {self.images_per_second:.3g} images/s{together}"
