"""Anybody's images as one NumPy archive."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.images import Images, Split, channels_first


def npz(path: str) -> Images:
    """Images from an .npz archive.

    Keys: train_images and test_images uint8 [N,H,W] or [N,H,W,C], train_labels and test_labels integers [N] from 0,
    and, if wanted, class_names [num_classes].
    """
    if not Path(path).is_file():
        raise UserError(f"dataset.path={path}: no such file; type dataset.path=FILE.npz")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            train, test = (_split(path, archive, part) for part in ("train", "test"))
            names = archive["class_names"].tolist() if "class_names" in archive else None
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, MemoryError) as error:
        cause = error if zipfile.is_zipfile(path) else "not a zip archive"
        raise UserError(f"dataset.path={path}: no npz file, or a damaged one ({cause}); create it again") from error
    # Without names the training labels tell how many classes there are.
    return Images(train, test, [str(n) for n in names or range(int(train.y.max()) + 1)])


def _split(path: str, archive, part: str) -> Split:
    keys = f"{part}_images", f"{part}_labels"
    for key in keys:
        if key not in archive:
            raise UserError(f"dataset.path={path}: there is no {key} in it; it has: {', '.join(archive)}")
    x, y = (archive[key] for key in keys)
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.ndim != 1 or y.dtype.kind not in "iu":
        raise UserError(
            f"dataset.path={path}: {keys[0]} is {x.dtype} {list(x.shape)} and {keys[1]} {y.dtype} {list(y.shape)}; "
            "give uint8 [N,H,W] or [N,H,W,C] and integers [N]"
        )
    return Split(channels_first(torch.from_numpy(x)), torch.from_numpy(y.astype(np.int64)))
