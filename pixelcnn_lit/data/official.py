"""MNIST, Fashion-MNIST and CIFAR-10 through torchvision, whose downloads are made to fail soon and clearly."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError

import torch
from torchvision import datasets

from pixelcnn_lit.data.images import Images, Split, channels_first
from pixelcnn_lit.errors import UserError

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte; a silent server otherwise hangs torchvision for ever
LENGTHS = {"MNIST": (60_000, 10_000), "FashionMNIST": (60_000, 10_000), "CIFAR10": (50_000, 10_000)}


def mnist(root: str = "data", download: bool = True) -> Images:
    """MNIST (LeCun et al. 1998): 28×28, 256 levels, 60,000 + 10,000 images; files in root/MNIST/raw."""
    return _fetch(datasets.MNIST, root, download, "copy the four official *.gz files to {root}/MNIST/raw")


def fashion_mnist(root: str = "data", download: bool = True) -> Images:
    """Fashion-MNIST (Xiao et al. 2017), in MNIST's format; files in root/FashionMNIST/raw."""
    return _fetch(datasets.FashionMNIST, root, download, "copy the four official *.gz files to {root}/FashionMNIST/raw")


def cifar10(root: str = "data", download: bool = True) -> Images:
    """CIFAR-10 (Krizhevsky 2009): 3×32×32, 256 levels, 50,000 + 10,000 images; root/cifar-10-batches-py."""
    return _fetch(datasets.CIFAR10, root, download, "copy cifar-10-python.tar.gz to {root}")


def _fetch(dataset: type, root: str, download: bool, by_hand: str) -> Images:
    name = dataset.__name__
    try:
        with _time_limit(DOWNLOAD_TIMEOUT):
            parts = [dataset(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, URLError, OSError, EOFError, AssertionError, ValueError) as error:
        cause = " ".join(str(error).split()) or "a damaged file"
        raise UserError(
            f"{name} could not be read from dataset.root={root} ({cause}): delete damaged files and check the network; "
            f"or {by_hand.format(root=root)}; or type dataset=digits, which needs no file"
        ) from error
    lengths = tuple(len(part) for part in parts)
    if lengths != LENGTHS[name]:
        raise UserError(
            f"{name} in dataset.root={root} has {lengths} images, not {LENGTHS[name]}; delete and reload it"
        )
    train, test = (
        Split(channels_first(torch.as_tensor(part.data)), torch.as_tensor(part.targets).long()) for part in parts
    )
    # torchvision names MNIST's classes "0 - zero"
    return Images(train, test, [str(c).split(" - ")[0] for c in parts[0].classes])


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
