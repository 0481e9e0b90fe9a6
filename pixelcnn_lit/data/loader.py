"""Batches gathered whole from a split, in an order that is a function of (seed, epoch)."""

import atexit
import multiprocessing
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pixelcnn_lit.data.images import Split, taken
from pixelcnn_lit.runs.signals import outlive_signals

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Posing = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Batches(Sampler):
    """The batches of one rank: pairs (seed of the batch's augmentation, positions).

    Training shuffles and leaves out the ragged last batch, another one each epoch; where it is to `repeat`, each epoch
    is the first. Evaluation strides the split over the ranks unpadded, so that every image counts once. `batch_size` is
    a rank's own.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        shuffle: bool,
        repeat: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n, self.batch_size, self.shuffle, self.repeat = n, batch_size, shuffle, repeat
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = 0
        self.skipped = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next pass, and of no other: for a run that is resumed inside an epoch."""
        self.skipped = batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.repeat else epoch

    def __len__(self) -> int:
        if self.shuffle:
            return self.n // (self.batch_size * self.world)
        return len(range(0, len(range(self.rank, self.n, self.world)), self.batch_size))

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        if not self.shuffle:
            for positions in torch.arange(self.rank, self.n, self.world).split(self.batch_size):
                yield 0, positions
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        order = torch.from_numpy(rng.permutation(self.n)).split(self.batch_size * self.world)[: len(self)]
        seeds = rng.integers(2**31, size=len(order))
        skipped, self.skipped = self.skipped, 0
        for shared, seed in zip(order[skipped:], seeds[skipped:], strict=True):
            yield int(seed) + self.rank, shared[self.rank :: self.world]


def augmented(
    x: Tensor, y: Tensor, augmentations: Sequence[Augmentation], posing: Posing | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Apply the augmentations to images [B,C,H,W], in their order; a change of pose is told in the classes y [B]."""
    generator = torch.Generator().manual_seed(seed)
    for augmentation in augmentations:
        x = augmentation(x, generator)
    return posing(x, y, generator) if posing else (x, y)


class Gather(Dataset):
    """A split as whole batches: a few index operations a batch, then the augmentations, if any."""

    def __init__(self, split: Split, augmentations: Sequence[Augmentation] = (), posing: Posing | None = None) -> None:
        self.split, self.augmentations, self.posing = split, augmentations, posing

    def __getitems__(self, batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        seed, positions = batch
        x = taken(self.split.images, positions).contiguous()
        return augmented(x, self.split.y[positions], self.augmentations, self.posing, seed)


class LazyLoader(DataLoader):
    """A DataLoader that starts its workers, and asks for the order, at the first batch: after `set_epoch`."""

    def __iter__(self) -> Iterator:  # pyright: ignore[reportIncompatibleMethodOverride]
        _used.add(self)
        yield from super().__iter__()


_used: weakref.WeakSet[LazyLoader] = weakref.WeakSet()


@atexit.register  # after torch's own and Python's, and so before them: those would tell workers by a signal
def end_workers() -> None:
    """End the workers of all loaders, which outlive a signal."""
    for each in list(_used):
        iterator = each._iterator
        if iterator is not None:  # it lives as long as its workers
            iterator._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def loader(dataset: Gather, batches: Batches, num_workers: int) -> LazyLoader:
    """The loader of a split: pinned memory on CUDA, workers that live on between epochs."""
    return LazyLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=_whole,  # pyright: ignore[reportArgumentType]
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context=_start_method() if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_signals,
        generator=torch.Generator().manual_seed(0),  # else each epoch takes a number from the global stream
    )


def _start_method() -> str:
    """Return how workers are started: as Python would, but in joblib's processes, whose own method cannot."""
    here, usual = multiprocessing.get_start_method(), multiprocessing.get_all_start_methods()
    return here if here in usual else usual[0]


def _whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
