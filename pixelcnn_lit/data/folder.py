"""Anybody's images as PNG files, a folder a class."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pixelcnn_lit.data.images import Images, Split
from pixelcnn_lit.errors import UserError

GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P")  # Pillow's modes of 8 bits and less


def folder(path: str) -> Images:
    """Images from path/train/<class>/*.png and path/test/<class>/*.png, all of one size; grey or colour as stored."""
    root = Path(path)
    classes = sorted(entry.name for entry in (root / "train").glob("*") if entry.is_dir())
    if not classes:
        raise UserError(f"dataset.path={path}: no folders in {root / 'train'}; it must hold train/<class>/*.png")
    strangers = {entry.name for entry in (root / "test").glob("*") if entry.is_dir()} - set(classes)
    if strangers:
        raise UserError(f"dataset.path={path}: test has classes that train lacks: {', '.join(sorted(strangers))}")
    return Images(_split(root / "train", classes), _split(root / "test", classes), classes)


def _split(directory: Path, classes: list[str]) -> Split:
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((directory / name).glob("*.png"))]
    if not files:
        raise UserError(f"{directory}: no images; it must hold <class>/*.png")
    images = [_read(file) for file, _ in files]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"{file}: (C, H, W) = {tuple(image.shape)}, but {tuple(images[0].shape)} in {files[0][0]}; "
                "make them one size"
            )
    return Split(torch.stack(images), torch.tensor([label for _, label in files]))


def _read(file: Path) -> Tensor:
    """uint8 [C,H,W]: grey files have one channel, with or without transparency, colour files three."""
    try:
        with Image.open(file) as image:
            if image.mode not in GREY + COLOUR:
                raise UserError(f"{file}: pixels of mode {image.mode}; save it with 8 bits a channel")
            pixels = np.asarray(image.convert("L" if image.mode in GREY else "RGB")).copy()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{file}: not a readable PNG; replace or delete it") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
