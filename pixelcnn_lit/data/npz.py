"""Anybody's images as one NumPy archive."""

import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.arrays import Levels, as_levels, labelled_images
from pixelcnn_lit.data.images import ChannelsLast, Images


def npz(path: str, source_levels: Levels = None) -> Images:
    """Images from an .npz archive.

    Keys: train_images and test_images uint8 [N,H,W] or [N,H,W,C], train_labels and test_labels integers [N] from 0,
    and, if wanted, val_images and val_labels, and class_names [num_classes].

    Args:
        source_levels: of the images, where they are not 256; above 256, the codes of a tokenizer, integers of any type.
    """
    if not Path(path).is_file():
        raise UserError(f"dataset.path={path}: no such file; type dataset.path=FILE.npz")
    if _is_npy(Path(path)):
        raise UserError(
            f"dataset.path={path}: is an .npy file, which holds one array; write all with numpy.savez(FILE, "
            "train_images=..., train_labels=..., test_images=..., test_labels=...), or type dataset=arrays"
        )
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            facts: dict[str, Any] = {"levels": source_levels} if source_levels else {}
            if "class_names" in archive:
                facts["class_names"] = _names(path, archive["class_names"])
            return labelled_images(
                f"dataset.path={path}",
                set(archive),
                load=partial(_array, archive),
                store=lambda _, x, dtype: stored(x, dtype),
                facts=facts,
            )
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"dataset.path={path}: does not fit into memory; see dataset=arrays") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError) as error:
        cause = error if zipfile.is_zipfile(path) else "not a zip archive"
        raise UserError(f"dataset.path={path}: no npz file, or a damaged one ({cause}); create it again") from error


def _is_npy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _array(archive: Mapping[str, Any], name: str) -> np.ndarray:
    """Return a member of an archive, which numpy returns as bytes where it is no array."""
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")
    return array


def stored(x: np.ndarray, dtype: torch.dtype) -> Tensor | ChannelsLast:
    """Images [N,H,W] or [N,H,W,C] in memory, as they lie there."""
    levels = torch.from_numpy(as_levels(x, dtype))
    return levels.unsqueeze(1) if x.ndim == 3 else ChannelsLast(levels)


def _names(path: str, names: np.ndarray) -> list[str]:
    if names.ndim != 1:
        raise UserError(f"dataset.path={path}: class_names is {names.dtype} {list(names.shape)}; give one name a class")
    return [_text(name) for name in names.tolist()]


def _text(name: str | bytes | int) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
