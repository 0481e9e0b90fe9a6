"""Anybody's images as PNG files, a folder a class."""

from pathlib import Path

import torch

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Images, Split
from pixelcnn_lit.data.pictures import read_picture, tell
from pixelcnn_lit.runs.terminal import progress


def folder(path: str) -> Images:
    """Images from path/train/<class>/*.png and path/test/<class>/*.png, all of one size; grey or colour as stored."""
    root = Path(path)
    classes = sorted(entry.name for entry in (root / "train").glob("*") if entry.is_dir())
    if not classes:
        raise UserError(f"dataset.path={path}: no folders in {root / 'train'}; it must hold train/<class>/*.png")
    unknown = {entry.name for entry in (root / "test").glob("*") if entry.is_dir()} - set(classes)
    if unknown:
        raise UserError(f"dataset.path={path}: test has classes that train lacks: {', '.join(sorted(unknown))}")
    return Images(_split(root / "train", classes), _split(root / "test", classes), classes)


def _split(directory: Path, classes: list[str]) -> Split:
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((directory / name).glob("*.png"))]
    if not files:
        raise UserError(f"{directory}: no images; it must hold <class>/*.png")
    pictures = [read_picture(file) for file, _ in progress(files, desc=f"reading {directory.name}")]
    tell(pictures)
    images = [picture.pixels for picture in pictures]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"{file}: (C, H, W) = {tuple(image.shape)}, but {tuple(images[0].shape)} in {files[0][0]}; "
                "make them one size"
            )
    return Split(torch.stack(images), torch.tensor([label for _, label in files]))
