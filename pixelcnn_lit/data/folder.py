"""Anybody's images as picture files, a folder a class."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Images, Split, carve
from pixelcnn_lit.data.pictures import (
    Background,
    Changes,
    Picture,
    first_few,
    in_channels,
    is_hidden,
    natural,
    picture_files,
    read_all,
    read_picture,
    sized,
)
from pixelcnn_lit.runs.run_dir import relative

Kind = Literal["grey", "rgb"]

# What people call the folders of the three splits, in any case.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def folder(
    path: str,
    test_fraction: Annotated[float, Interval(gt=0, lt=1)] | None = None,
    resize: Annotated[int, Ge(1)] | None = None,
    colour: Kind | None = None,
    background: Background | None = None,
) -> Images:
    """Images from path/train/CLASS/* and path/test/CLASS/*, and path/val/CLASS/* if there is one; or from path/CLASS/*.

    They are pictures in any format that Pillow reads, of one size, grey or in colour as stored. Classes are in the
    order of their names, 2 before 10.

    Args:
        test_fraction: of the images of each class, by a fixed random choice, where there is no folder of test images.
        resize: the shorter side, and the middle of the longer. colour: of all. background: of transparent ones.
    """
    if not Path(path).is_dir():
        raise UserError(f"dataset.path={path}: no such folder; type dataset.path=FOLDER")
    reader = Reader(resize, colour, background)
    parts = _parts(Path(path))
    training = parts.get("train", Path(path))
    classes = sorted((entry.name for entry in _folders(training)), key=natural)
    if not classes:
        raise UserError(
            f"dataset.path={path}: no folders in {training}; it must hold train/CLASS/*.png and test/CLASS/*.png, or "
            "CLASS/*.png; of pictures without classes make one"
        )
    if "test" in parts and test_fraction is not None:
        raise UserError(f"dataset.test_fraction={test_fraction}: {parts['test']} has the test images; leave it out")
    if "test" not in parts and test_fraction is None:
        raise UserError(
            f"dataset.path={path}: no folder of test images; type dataset.test_fraction=0.1 to split some off"
        )
    splits = {name: _split(directory, classes, reader) for name, directory in ({"train": training} | parts).items()}
    if test_fraction is not None:
        splits["train"], splits["test"] = carve(
            splits["train"], test_fraction, "dataset.test_fraction", of_each_class=True
        )
    asked = {
        f"resized to {resize} and cropped": resize,
        f"turned to {colour}": colour,
        f"on {background}": background,
        f"{test_fraction} split off for testing": test_fraction,
    }
    return Images(
        train=splits["train"],
        test=splits["test"],
        class_names=classes,
        validation=splits.get("validation"),
        changes=tuple(change for change, setting in asked.items() if setting),
        hold=True,
        tell=reader.changes.tell,
    )


class Reader:
    """Reads pictures as images of one kind, and keeps what was changed in them."""

    first: Picture | None = None

    def __init__(self, resize: int | None, colour: Kind | None, background: Background | None) -> None:
        self.resize, self.colour = resize, colour
        self.background: Background | None = background
        self.changes = Changes()

    def read(self, file: Path) -> Picture:
        picture = read_picture(file, self.background, settings="dataset.")
        if self.colour:
            picture = in_channels(picture, 1, "grey") if self.colour == "grey" else in_channels(picture, 3, None)
        return sized(picture, self.resize, self.resize, resize=True) if self.resize else picture

    def read_all(self, files: list[Path]) -> Tensor:
        """Return them as uint8 [N,C,H,W]. Raises UserError where one is not as the first that was read."""
        pictures = read_all(files, self.read)
        for picture in pictures:
            if self.first:
                self._require_alike(picture, self.first)
            self.changes.add(picture)
        return torch.stack([picture.pixels for picture in pictures])

    @staticmethod
    def _require_alike(picture: Picture, first: Picture) -> None:
        channels, *size = picture.pixels.shape
        first_channels, *first_size = first.pixels.shape
        if channels != first_channels:
            kind, first_kind = ("grey" if n == 1 else "in colour" for n in (channels, first_channels))
            raise UserError(
                f"{picture.file}: is {kind}, but {first.file} is {first_kind}; type dataset.colour=rgb or "
                "dataset.colour=grey"
            )
        if size != first_size:
            one, other = ("×".join(map(str, each)) for each in (size, first_size))
            raise UserError(
                f"{picture.file}: {one} pixels, but {first.file} has {other}; type dataset.resize={min(first_size)}"
            )


class Pictures:
    """Images in picture files, which are read when they are asked for."""

    dtype = torch.uint8
    in_memory = False

    def __init__(self, files: list[Path], reader: Reader) -> None:
        self.files, self.reader = files, reader
        first = reader.read(files[0])
        reader.first = reader.first or first  # with which all others are compared
        self.image_shape = tuple(first.pixels.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, height, width = self.image_shape
        return len(self.files), channels, height, width

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.reader.read_all([self.files[n] for n in positions.tolist()])


def _folders(directory: Path) -> list[Path]:
    entries = directory.iterdir() if directory.is_dir() else []
    return [entry for entry in entries if entry.is_dir() and not is_hidden(Path(entry.name))]


def _parts(root: Path) -> dict[str, Path]:
    """Return the folder of each split that has one; nothing where there is none of training images."""
    found: dict[str, list[Path]] = {name: [] for name in SPLITS}
    others = []
    for entry in sorted(_folders(root)):
        names = [name for name, words in SPLITS.items() if entry.name.lower() in words]
        (found[names[0]] if names else others).append(entry)
    if not found["train"]:
        named = [folder for folders in found.values() for folder in folders]
        if named:
            raise UserError(f"{named[0]}: no folder of training images beside it; call that {root / 'train'}")
        for within in (folder for entry in others for folder in _folders(entry)):
            if within.name.lower() in SPLITS["train"]:
                raise UserError(f"{within}: lies one folder further down; type dataset.path={within.parent}")
        return {}
    for name, folders in found.items():
        if len(folders) > 1:
            raise UserError(f"{folders[0]} and {folders[1]}: which holds the {name} images? leave one")
    if others:
        print(f"{relative(root)}: folders left out, which are none of a split: {len(others)} ({first_few(others)})")
    return {name: folders[0] for name, folders in found.items() if folders}


def _split(directory: Path, classes: list[str], reader: Reader) -> Split:
    label_of = {name: label for label, name in enumerate(classes)}
    files: list[tuple[int, Path]] = []
    loose: list[Path] = []
    deep: list[Path] = []
    for file in picture_files(directory):
        name, *inside = file.relative_to(directory).parts
        if not inside:
            loose.append(file)
        elif name in label_of:
            files.append((label_of[name], file))
            deep += [file] * (len(inside) > 1)
        else:
            raise UserError(f"{directory}: has a class that the training images lack: {name}; remove it, or add some")
    if loose:
        print(f"{relative(directory)}: pictures left out that are in no class: {len(loose)} ({first_few(loose)})")
    if deep:
        print(f"{relative(directory)}: pictures taken from folders within a class: {len(deep)} ({first_few(deep)})")
    if not files:
        raise UserError(f"{directory}: no pictures in folders; it must hold CLASS/*.png")
    files.sort()
    return Split(Pictures([file for _, file in files], reader), torch.tensor([label for label, _ in files]))
