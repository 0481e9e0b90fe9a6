"""Datasets with official files, through torchvision, whose downloads are made to fail soon and clearly."""

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
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Images, Split, channels_first
from pixelcnn_lit.runs.atomic import UNFINISHED

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte; a silent server otherwise hangs torchvision for ever
LENGTHS = {
    "MNIST": (60_000, 10_000),
    "FashionMNIST": (60_000, 10_000),
    "KMNIST": (60_000, 10_000),
    "CIFAR10": (50_000, 10_000),
    "CIFAR100": (50_000, 10_000),
    "SVHN": (73_257, 26_032),
}


def mnist(root: str = "data", download: bool = True) -> Images:
    """MNIST (LeCun et al. 1998): 28×28, 256 levels, 60,000 + 10,000 images; files in root/MNIST/raw."""
    return _fetch(datasets.MNIST, root, download, "copy the four official *.gz files to {root}/MNIST/raw")


def fashion_mnist(root: str = "data", download: bool = True) -> Images:
    """Fashion-MNIST (Xiao et al. 2017), in MNIST's format; files in root/FashionMNIST/raw."""
    return _fetch(datasets.FashionMNIST, root, download, "copy the four official *.gz files to {root}/FashionMNIST/raw")


def kmnist(root: str = "data", download: bool = True) -> Images:
    """Kuzushiji-MNIST (Clanuwat et al. 2018), in MNIST's format; files in root/KMNIST/raw."""
    return _fetch(datasets.KMNIST, root, download, "copy the four official *.gz files to {root}/KMNIST/raw")


def cifar10(root: str = "data", download: bool = True) -> Images:
    """CIFAR-10 (Krizhevsky 2009): 3×32×32, 256 levels, 50,000 + 10,000 images; root/cifar-10-batches-py."""
    return _fetch(datasets.CIFAR10, root, download, "copy cifar-10-python.tar.gz to {root}")


def cifar100(root: str = "data", download: bool = True) -> Images:
    """CIFAR-100 (Krizhevsky 2009), of its 100 fine classes: as CIFAR-10; root/cifar-100-python."""
    return _fetch(datasets.CIFAR100, root, download, "copy cifar-100-python.tar.gz to {root}")


def svhn(root: str = "data", download: bool = True) -> Images:
    """SVHN (Netzer et al. 2011), cropped: 3×32×32, 256 levels, 73,257 + 26,032 images; files in root."""
    return _fetch(datasets.SVHN, root, download, "copy train_32x32.mat and test_32x32.mat to {root}")


def _fetch(dataset: type, root: str, download: bool, by_hand: str) -> Images:
    if Path(root).name == dataset.__name__ and Path(root, "raw").is_dir():
        raise UserError(f"dataset.root={root}: is the dataset's own folder; type dataset.root={Path(root).parent}")
    try:
        return _read_or_renew(dataset, root, download)
    except Exception as error:  # torchvision and the formats name their troubles in a dozen classes
        with suppress(OSError):
            Path(root).rmdir()  # if it was made for nothing
        cause = " ".join(str(error).split()) or "a damaged file"
        raise UserError(
            f"{dataset.__name__} could not be read from dataset.root={root} ({cause}): delete damaged files and check "
            f"the network; or {by_hand.format(root=root)}; or train on dataset=digits, which needs no file"
        ) from error


def _read_or_renew(dataset: type, root: str, download: bool) -> Images:
    """The images from the files in `root`; these unpacked or downloaded anew if they are not all right.

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
        _download(dataset, fresh)
        for file in [path for path in Path(fresh).rglob("*") if path.is_file()]:
            target = Path(root, file.relative_to(fresh))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    return _read(dataset, root)


def _read(dataset: Any, root: str) -> Images:
    if hasattr(dataset, "resources"):
        raw = Path(root, dataset.__name__, "raw")
        splits, names = [_idx(raw, part) for part in ("train", "t10k")], dataset.classes
    elif hasattr(dataset, "split_list"):
        parts = [dataset(root, split=split) for split in ("train", "test")]
        splits = [Split(torch.from_numpy(part.data), torch.from_numpy(part.labels).long()) for part in parts]
        names = [str(digit) for digit in range(10)]
    else:
        parts = [dataset(root, train=train) for train in (True, False)]
        splits = [Split(channels_first(torch.from_numpy(part.data)), torch.tensor(part.targets)) for part in parts]
        names = parts[0].classes
    lengths = tuple(len(split) for split in splits)
    if lengths != LENGTHS[dataset.__name__]:
        raise ValueError(f"it has {lengths} images, not {LENGTHS[dataset.__name__]}")
    # torchvision names MNIST's classes "0 - zero"
    return Images(*splits, class_names=[str(name).split(" - ")[0] for name in names])


def _idx(raw: Path, part: str) -> Split:
    """A part of a dataset in MNIST's format. Whatever else lies in the folder is left alone."""
    x = read_image_file(str(_idx_file(raw, f"{part}-images-idx3-ubyte")))
    y = read_label_file(str(_idx_file(raw, f"{part}-labels-idx1-ubyte")))
    return Split(channels_first(x), y)


def _idx_file(raw: Path, name: str) -> Path:
    """Return a file by its official name, or as Kaggle has it: with a dot, or in a folder of its own name."""
    names = (name, name.replace("-idx", ".idx"))
    files = [path for one in names for path in (raw / one, raw / one / one) if path.is_file()]
    if not files:
        raise FileNotFoundError(f"{raw / name} is not there")
    archive = raw / f"{name}.gz"
    if archive.is_file():  # which holds the checksum; CIFAR-10's batches and SVHN's files are checked by torchvision
        *_, checksum, _ = struct.unpack("<2I", archive.read_bytes()[-8:])
        if zlib.crc32(files[0].read_bytes()) != checksum:
            raise ValueError(f"{files[0]} is not what its archive holds")
    return files[0]


def _download(dataset: Any, root: str) -> None:
    if hasattr(dataset, "split_list"):
        for split in ("train", "test"):
            dataset(root, split=split, download=True)
    else:
        dataset(root, download=True)


def _archives(dataset: Any) -> list[tuple[str, str]]:
    """Path below the root and MD5 of each file that is downloaded, as torchvision knows them."""
    if hasattr(dataset, "resources"):
        return [(f"{dataset.__name__}/raw/{name}", md5) for name, md5 in dataset.resources]
    if hasattr(dataset, "split_list"):
        return [(name, md5) for _, name, md5 in (dataset.split_list[split] for split in ("train", "test"))]
    return [(dataset.filename, dataset.tgz_md5)]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
