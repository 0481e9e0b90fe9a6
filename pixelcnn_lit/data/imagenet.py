"""ImageNet, downsampled to 32×32 and 64×64: its official batches, which become arrays once."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.data.arrays import arrays, write_arrays
from pixelcnn_lit.data.images import Images, Split
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.terminal import progress

BATCHES = 10  # of training images
# What pickled arrays are made of, by the names of NumPy 1 and 2.
PICKLED = {
    *((f"{core}.multiarray", name) for core in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def imagenet32(root: str = "data") -> Images:
    """ImageNet at 32×32 (Chrabaszcz et al. 2017, arXiv 1707.08819): 256 levels, 1,281,167 + 50,000 images.

    Reads train_data_batch_1 to 10 and val_data, pickled or as npz, in root or a folder in it. They become arrays in
    root/imagenet32-arrays once, 4.1 GB, which are mapped from then on. The test set are the 50,000 official validation
    images.
    A bpd on the images of van den Oord et al. 2016, which are not antialiased, is of another dataset.
    """
    return _imagenet(Path(root), 32)


def imagenet64(root: str = "data") -> Images:
    """ImageNet at 64×64, otherwise as `imagenet32`: 16.4 GB."""
    return _imagenet(Path(root), 64)


def _imagenet(root: Path, size: int) -> Images:
    converted = root / f"imagenet{size}-arrays"
    if not converted.is_dir():
        training, test = _files(root, size, r"train_data_batch_(\d+)"), _files(root, size, r"val_data")
        if not training or not test:
            raise UserError(
                f"dataset.root={root}: no {'val_data' if training else 'train_data_batch_1'} of ImageNet at "
                f"{size}×{size} in it; download the batches of the downsampled ImageNet, and unpack them there"
            )
        with FileLock(root / f".imagenet{size}.lock"):  # of several processes one converts
            if not converted.is_dir():
                _convert(training, test, size, converted)
    return arrays(str(converted))


def _convert(training: list[Path], test: list[Path], size: int, folder: Path) -> None:
    batches = [BatchFiles(files, size) for files in (training, test)]
    splits = [Split(each, each.y) for each in batches]
    labels = splits[0].y.unique()
    if labels.tolist() != list(range(len(labels))) or int(splits[1].y.max()) >= len(labels):
        last = 1 + max(int(split.y.max()) for split in splits)
        raise UserError(f"{training[0]}: no training images of some of the labels 1 to {last}; get all batches")
    some = (f"{len(training)} of {BATCHES} batches",) if len(training) != BATCHES else ()
    names = [str(label + 1) for label in labels.tolist()]
    name = f"imagenet{size} (Chrabaszcz et al. 2017)"
    print(f"{name}: {len(splits[0])} training and {len(splits[1])} test images become arrays once: {relative(folder)}")
    if some:
        print(f"{some[0]}: once you have all, delete {relative(folder)}")
    write_arrays(Images(*splits, class_names=names, name=name, changes=some), folder)


def _files(root: Path, size: int, name: str) -> list[Path]:
    """Return the batches of a name, in their order, in `root` or a folder in it that is not named by the other size."""
    found: dict[int, Path] = {}
    other = "64" if size == 32 else "32"
    folders = [path for path in sorted(root.glob("*")) if path.is_dir() and other not in path.name]
    for path in (path for directory in (root, *folders) for path in sorted(directory.glob("*"))):
        matched = re.fullmatch(rf"{name}(\.npz)?", path.name)
        if matched and path.is_file():
            number = int(matched[1]) if "(" in name else 0
            if number in found:
                raise UserError(f"{path} and {found[number]}: are one batch twice; leave one")
            found[number] = path
    return [found[number] for number in sorted(found)]


class BatchFiles:
    """The images of several files, one of which is in memory at a time."""

    dtype = torch.uint8
    in_memory = False

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size
        labels = [_read(file, size)[1] for file in progress(files, desc="reading labels")]
        self.y = torch.cat(labels)
        self.ends = torch.tensor([len(y) for y in labels]).cumsum(0)
        self._open: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.y), 3, self.size, self.size

    def __getitem__(self, positions: Tensor) -> Tensor:
        x = torch.empty(len(positions), *self.shape[1:], dtype=torch.uint8)
        holder = torch.bucketize(positions, self.ends, right=True)
        for number in holder.unique().tolist():
            if self._open[0] != number:
                self._open = (-1, torch.empty(0))  # before the next needs its memory
                self._open = (number, _read(self.files[number], self.size)[0])
            first = int(self.ends[number - 1]) if number else 0
            x[holder == number] = self._open[1][positions[holder == number] - first]
        return x


def _read(file: Path, size: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,3,size,size] and classes int64 [N], from 0, of one batch."""
    try:
        content = _archive(file) if file.suffix == ".npz" else _unpickled(file)
        x, y = np.asarray(content["data"]), np.asarray(content["labels"])
    except MemoryError as error:
        raise UserError(f"{file}: does not fit into memory") from error
    except Exception as error:  # pickle, zip and numpy name their troubles in a dozen classes
        raise UserError(f"{file}: a damaged batch, or none of ImageNet ({first_line(error)}); get it again") from error
    integers = y.ndim == 1 and len(y) > 0 and y.dtype.kind in "iu"
    if not integers or x.dtype != np.uint8 or x.shape != (len(y), 3 * size * size) or y.min() < 1:
        raise UserError(
            f"{file}: data is {x.dtype} {list(x.shape)} and labels {y.dtype} {list(y.shape)}; must be uint8 "
            f"[N,{3 * size * size}] and integers from 1 [N]"
        )
    return torch.from_numpy(x).view(-1, 3, size, size), torch.from_numpy(y.astype(np.int64)) - 1


def _archive(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as content:
        return {key: content[key] for key in ("data", "labels")}


class _Unpickler(pickle.Unpickler):
    """Makes arrays, lists and dicts, and calls nothing else: the files are other people's."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def _unpickled(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return _Unpickler(content, encoding="latin1").load()
