"""The images that a source hands over, wherever they lie, and checks of them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pixelcnn_lit.config.errors import UserError, printable
from pixelcnn_lit.nn.levels import MOST_CHANNELS, level_dtype
from pixelcnn_lit.runs.terminal import progress

PART = 1024  # images at a time where all are read
LARGE_PART = 2**26  # bytes of a part of a split that is not to be in memory as a whole


class Stored(Protocol):
    """Images [N,C,H,W] that need not be in memory: those at some positions, int64 [B], are read when asked for."""

    dtype: torch.dtype
    in_memory: bool  # and need not be read from a disk each time

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def __getitem__(self, positions: Tensor) -> Tensor: ...


class Subset:
    """Some of the images of another store."""

    def __init__(self, whole: "Tensor | Stored", positions: Tensor) -> None:
        if isinstance(whole, Subset):
            whole, positions = whole.whole, whole.positions[positions]
        self.whole, self.positions, self.dtype = whole, positions, whole.dtype
        self.in_memory = is_in_memory(whole)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, channels, height, width = self.whole.shape
        return len(self.positions), channels, height, width

    def __getitem__(self, positions: Tensor) -> Tensor:
        return taken(self.whole, self.positions[positions])


class Changed:
    """The images of another store as `change` makes them of images [B,C,H,W] and of their positions in it [B]."""

    def __init__(self, before: "Tensor | Stored", change: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.before, self.change, self.dtype = before, change, before.dtype
        self.in_memory = is_in_memory(before)
        blank = torch.zeros(1, *before.shape[1:], dtype=before.dtype)
        _, *self.image_shape = change(blank, torch.zeros(1, dtype=torch.int64)).shape

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, height, width = self.image_shape
        return self.before.shape[0], channels, height, width

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.change(taken(self.before, positions), positions)


class ChannelsLast:
    """Images that lie in memory as most files hold them, [N,H,W,C], served as [N,C,H,W]."""

    in_memory = True

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype = x, x.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, height, width, channels = self.x.shape
        return n, channels, height, width

    def __getitem__(self, positions: Tensor) -> Tensor:
        return taken(self.x, positions).permute(0, 3, 1, 2)


def taken(images: Tensor | Stored, positions: Tensor) -> Tensor:
    """Return the images at some positions. Of tensors `index_select` copies whole images, and not value by value."""
    return images.index_select(0, positions) if isinstance(images, Tensor) else images[positions]


def is_in_memory(images: Tensor | Stored) -> bool:
    return isinstance(images, Tensor) or images.in_memory


class Split:
    """Images and their classes, int64 [N].

    The images are uint8 [N,C,H,W]; int32 where they have more than 256 levels. A part of a split, `split[positions]`,
    holds no images of its own.
    """

    def __init__(self, images: Tensor | Stored, y: Tensor) -> None:
        self.images, self.y = images, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, positions: Tensor | slice) -> "Split":
        if isinstance(positions, slice):
            positions = torch.arange(*positions.indices(len(self)))  # and no view of as many as there are
        return Split(Subset(self.images, positions), self.y[positions])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def x(self) -> Tensor:
        """All its images, in memory."""
        if isinstance(self.images, Tensor):
            return self.images
        if len(self) <= PART:
            return self.images[torch.arange(len(self))].contiguous()
        x = torch.empty(self.images.shape, dtype=self.images.dtype)
        for n, part in enumerate(progress(self.parts(PART), desc="reading images")):
            x[n * PART : n * PART + len(part)] = part.x
        return x

    def held(self) -> "Split":
        """Return the same split, its images in memory."""
        return Split(self.x, self.y)

    def parts(self, n: int) -> Sequence["Split"]:
        """Return the split as parts of `n` images, the last of what is left; each is read when its `x` is."""
        return [self[first : first + n] for first in range(0, len(self), n)]

    def as_stored(self) -> "Split":
        """Return it in the order in which a disk has its images, which is the quickest to read."""
        if not isinstance(self.images, Subset) or self.images.in_memory:
            return self
        order = self.images.positions.argsort()
        return Split(Subset(self.images, order), self.y[order])

    def large_parts(self) -> Sequence["Split"]:
        """Return it as few parts that need little memory: one, of most datasets."""
        channels, height, width = self.image_shape
        return self.parts(max(1, LARGE_PART // (channels * height * width * self.images.dtype.itemsize)))

    def changed(self, change: Callable[[Tensor, Tensor], Tensor]) -> "Split":
        """Return the same split with its images changed whenever they are read: see `Changed`."""
        return Split(Changed(self.images, change), self.y)


@dataclass
class Images:
    """A labelled set of images as its source publishes it. Without `validation`, part of `train` becomes it.

    Args:
        name: of the dataset, and its version, where the source knows it.
        changes: what was changed in the images, as the label of a result names it.
        hold: whether to hold the images in memory, since reading them takes long.
        tell: prints what was changed in single images, once all have been read.
    """

    train: Split
    test: Split
    class_names: list[str]
    levels: int = 256
    validation: Split | None = None
    name: str | None = None
    changes: tuple[str, ...] = ()
    hold: bool = False
    tell: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.class_names = [printable(name) for name in self.class_names]  # of a file that may be untrusted

    def held(self) -> "Images":
        """Return the same set, its images in memory."""
        held = {name: split.held() for name, split in self.splits().items()}
        return replace(self, train=held["train"], test=held["test"], validation=held.get("validation"))

    def splits(self) -> dict[str, Split]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}


def fingerprint(split: Split) -> str:
    """Return how many images, and a checksum of these and of their classes, in their order: see `as_stored`."""
    split = split.as_stored()
    checksum = hashlib.sha256(f"{[len(split), *split.image_shape]}".encode())
    for part in progress(split.parts(PART), desc="checksum"):
        checksum.update(part.x.contiguous().reshape(-1).numpy().data)
    checksum.update(split.y.numpy().data)
    return f"{len(split)} images of checksum {checksum.hexdigest()[:16]}"


def channels_first(x: Tensor) -> Tensor:
    """Images as most files hold them, [N,H,W] or [N,H,W,C], to [N,C,H,W]."""
    return (x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)).contiguous()


def verify(images: Images, name: str) -> None:
    """Raise UserError unless shapes, values and classes are what the rest of the program relies on."""
    shapes = {split.image_shape for split in images.splits().values()}
    if len(shapes) != 1:
        raise UserError(f"{name}: images of different sizes (C, H, W): {sorted(shapes)}; make them one size")
    for split_name, split in images.splits().items():
        where = f"{name}, {split_name} split"
        n = split.images.shape[0]
        if not len(split) or n != len(split):
            raise UserError(f"{where}: {n} images and {len(split)} labels; give one label an image")
        _verify_values(split, images.levels, where)
        if int(split.y.min()) < 0 or int(split.y.max()) >= len(images.class_names):
            raise UserError(
                f"{where}: labels {int(split.y.min())}..{int(split.y.max())} out of range; "
                f"{len(images.class_names)} classes take labels 0..{len(images.class_names) - 1}"
            )
    twice = [one for one, count in Counter(images.class_names).items() if count > 1]
    if twice:
        raise UserError(f"{name}: several classes are called {twice[0]}; give each its own name")
    empty = (torch.bincount(images.train.y, minlength=len(images.class_names)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"{name}: class {images.class_names[empty[0]]} has no training images; give it some, or leave it out"
        )


def _verify_values(split: Split, levels: int, where: str) -> None:
    dtype, channels = split.images.dtype, split.image_shape[0]
    if channels > MOST_CHANNELS or dtype != level_dtype(levels):
        wanted = f"give 1 (grey), 3 (RGB) or up to {MOST_CHANNELS} of {level_dtype(levels)}"
        raise UserError(f"{where}: {channels} channels of {dtype}; {wanted}")
    if levels == 256:
        return  # as many as its type has
    for part in progress(split.parts(PART), desc="looking at all values"):
        least, largest = (int(value) for value in part.x.aminmax())
        if least < 0 or largest >= levels:
            wrong = least if least < 0 else largest
            raise UserError(f"{where}: a value of {wrong} in images of {levels} levels")


def random_positions(total: int, n: int) -> Tensor:
    """Return `n` of `total` positions, in order, always the same ones: files often hold class after class."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n].sort().values


def first_of_each_class(split: Split, num_classes: int, n: int) -> Tensor:
    """The first `n` images of each class, uint8 [num_classes,n,C,H,W]; black where a class has fewer."""
    rows = torch.zeros(num_classes, n, *split.image_shape, dtype=split.images.dtype)
    for label in range(num_classes):
        first = (split.y == label).nonzero()[:n, 0]
        rows[label, : len(first)] = split[first].x
    return rows


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, from the counts of the levels: exact."""
    counts = level_counts(split, 256).double()
    shares, level = counts / counts.sum(1, keepdim=True), torch.arange(counts.shape[1])
    mean = (shares * level).sum(1)
    std = (shares * (level - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.tolist(), std.tolist()


def level_counts(split: Split, levels: int) -> Tensor:
    """How often each channel has each level: int64 [C,levels]."""
    counts = torch.zeros(split.image_shape[0], levels, dtype=torch.int64)
    for part in progress(split.parts(PART), desc="statistics"):
        for count, channel in zip(counts, part.x.transpose(0, 1), strict=True):
            count += torch.bincount(channel.flatten().int(), minlength=levels)
    return counts


def carve(split: Split, fraction: float, setting: str, of_each_class: bool = False) -> tuple[Split, Split]:
    """Return the rest and a fraction of a split, always the same ones; or of each class, of two images at least one.

    Raises UserError, which names the `setting` that the fraction is of, where one of them is empty.
    """
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    groups = [order[split.y[order] == label] for label in split.y.unique()] if of_each_class else [order]
    taken = [max(round(fraction * len(group)), int(of_each_class and len(group) > 1)) for group in groups]
    if not 0 < sum(taken) < len(split):
        raise UserError(f"{setting}={fraction}: leaves an empty split of {len(split)} images; type another")
    pairs = list(zip(groups, taken, strict=True))
    return split[torch.cat([group[n:] for group, n in pairs])], split[torch.cat([group[:n] for group, n in pairs])]
