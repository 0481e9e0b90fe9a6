"""MNIST, Fashion-MNIST and CIFAR-10 through torchvision, whose downloads are made to fail soon and clearly."""

import os
import shutil
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Images, Split, channels_first
from pixelcnn_lit.runs.atomic import UNFINISHED

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
    try:
        train, test = _read_or_renew(dataset, root, download)
    except Exception as error:  # torchvision and the formats name their troubles in a dozen classes
        with suppress(OSError):
            Path(root).rmdir()  # if it was made for nothing
        cause = " ".join(str(error).split()) or "a damaged file"
        raise UserError(
            f"{dataset.__name__} could not be read from dataset.root={root} ({cause}): delete damaged files and check "
            f"the network; or {by_hand.format(root=root)}; or type dataset=digits, which needs no file"
        ) from error
    splits = (Split(channels_first(torch.as_tensor(x.data)), torch.as_tensor(x.targets).long()) for x in (train, test))
    # torchvision names MNIST's classes "0 - zero"
    return Images(*splits, class_names=[str(c).split(" - ")[0] for c in train.classes])


def _read_or_renew(dataset: type, root: str, download: bool) -> list[Any]:
    """The training and the test part from the files in `root`; unpacked or downloaded anew if they are not all right.

    New files are made beside their place and renamed when all are whole: a full disk or a kill leaves none behind.
    """
    try:
        return _read(dataset, root)
    except Exception:
        archives = [Path(root, name) for name, md5 in _archives(dataset) if check_integrity(str(Path(root, name)), md5)]
        if not download and len(archives) < len(_archives(dataset)):
            raise
    Path(root).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=UNFINISHED) as fresh, _time_limit(DOWNLOAD_TIMEOUT):
        for archive in archives:
            copy = Path(fresh, archive.relative_to(root))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(archive, copy)
        dataset(fresh, download=True)
        for file in [path for path in Path(fresh).rglob("*") if path.is_file()]:
            target = Path(root, file.relative_to(fresh))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    return _read(dataset, root)


def _read(dataset: type, root: str) -> list[Any]:
    parts: list[Any] = [dataset(root, train=train, download=False) for train in (True, False)]
    lengths = tuple(len(part) for part in parts)
    if lengths != LENGTHS[dataset.__name__]:
        raise ValueError(f"it has {lengths} images, not {LENGTHS[dataset.__name__]}")
    for archive in Path(root, dataset.__name__, "raw").glob("*.gz"):
        # CIFAR-10's batches are checked by torchvision; of MNIST's unpacked files the archives hold the checksums.
        *_, checksum, _ = struct.unpack("<2I", archive.read_bytes()[-8:])
        if zlib.crc32(archive.with_suffix("").read_bytes()) != checksum:
            raise ValueError(f"{archive.with_suffix('')} is not what its archive holds")
    return parts


def _archives(dataset: Any) -> list[tuple[str, str]]:
    """Path below the root and MD5 of each archive, as torchvision knows them."""
    if hasattr(dataset, "resources"):
        return [(f"{dataset.__name__}/raw/{name}", md5) for name, md5 in dataset.resources]
    return [(dataset.filename, dataset.tgz_md5)]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
