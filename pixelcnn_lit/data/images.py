"""The images that a source hands over, and checks of them."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelcnn_lit.config.errors import UserError


@dataclass
class Split:
    """Images uint8 [N,C,H,W] and their classes int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, positions: Tensor | slice) -> "Split":
        return Split(self.x[positions], self.y[positions])


@dataclass
class Images:
    """A labelled set of images as its source publishes it. Without `validation`, part of `train` becomes it."""

    train: Split
    test: Split
    class_names: list[str]
    levels: int = 256
    validation: Split | None = None

    def splits(self) -> dict[str, Split]:
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}


def fingerprint(split: Split) -> str:
    """Return how many images, and a checksum of these and of their classes, in their order."""
    checksum = hashlib.sha256(f"{list(split.x.shape)}".encode())
    for part in (split.x, split.y):
        checksum.update(part.reshape(-1).numpy().data)
    return f"{len(split)} images of checksum {checksum.hexdigest()[:16]}"


def channels_first(x: Tensor) -> Tensor:
    """Images as most files hold them, [N,H,W] or [N,H,W,C], to [N,C,H,W]."""
    return (x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)).contiguous()


def verify(images: Images, name: str) -> None:
    """Raise UserError unless shapes, values and classes are what the rest of the program relies on."""
    shapes = {tuple(split.x.shape[1:]) for split in images.splits().values()}
    if len(shapes) != 1:
        raise UserError(f"{name}: images of different sizes (C, H, W): {sorted(shapes)}; make them one size")
    for split_name, split in images.splits().items():
        where = f"{name}, {split_name} split"
        if split.x.ndim != 4 or not len(split) or len(split.x) != len(split):
            raise UserError(f"{where}: {list(split.x.shape)} images and {len(split)} labels; give one label an image")
        if split.x.shape[1] not in (1, 3) or split.x.dtype != torch.uint8:
            raise UserError(
                f"{where}: {split.x.shape[1]} channels of {split.x.dtype}; give 1 (grey) or 3 (RGB) of uint8"
            )
        if int(split.x.max()) >= images.levels:
            raise UserError(f"{where}: a value of {int(split.x.max())} in images of {images.levels} levels")
        if int(split.y.min()) < 0 or int(split.y.max()) >= len(images.class_names):
            raise UserError(
                f"{where}: labels {int(split.y.min())}..{int(split.y.max())} out of range; "
                f"{len(images.class_names)} classes take labels 0..{len(images.class_names) - 1}"
            )


def random_positions(total: int, n: int) -> Tensor:
    """Return `n` of `total` positions, always the same ones, of all classes: files often hold class after class."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]


def first_of_each_class(split: Split, num_classes: int, n: int) -> Tensor:
    """The first `n` images of each class, uint8 [num_classes,n,C,H,W]; black where a class has fewer."""
    rows = torch.zeros(num_classes, n, *split.x.shape[1:], dtype=torch.uint8)
    for label in range(num_classes):
        first = (split.y == label).nonzero()[:n, 0]
        rows[label, : len(first)] = split.x[first]
    return rows


def channel_statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, from the counts of the levels: exact."""
    mean, std = [], []
    for channel in split.x.transpose(0, 1):
        counts = torch.bincount(channel.flatten().int()).double()
        level, share = torch.arange(len(counts)), counts / counts.sum()
        mean.append(float((level * share).sum()))
        std.append(float(((level - mean[-1]) ** 2 * share).sum().sqrt()))
    return mean, std


def carve_validation(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Training and validation images from the official training set, by a permutation drawn from `seed`.

    A fraction of 0 leaves no validation images.
    """
    if fraction == 0:
        return train, train[:0]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    n_validation = round(fraction * len(train))
    if not 0 < n_validation < len(train):
        raise UserError(
            f"dataset.validation_fraction={fraction}: leaves an empty split of {len(train)} images; type another, or 0"
        )
    return train[order[n_validation:]], train[order[:n_validation]]
