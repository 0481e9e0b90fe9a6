"""Anybody's images as NumPy arrays in a folder, which stay on disk: they may be larger than memory."""

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from pixelcnn_lit.config.errors import UserError, first_line, printable
from pixelcnn_lit.config.schema import matches
from pixelcnn_lit.data.images import PART, Images, Split, Stored
from pixelcnn_lit.nn.levels import level_dtype
from pixelcnn_lit.runs.atomic import UNFINISHED
from pixelcnn_lit.runs.terminal import progress

FACTS = "dataset.json"
PREFIXES = {"train": "train", "validation": "val", "test": "test"}  # of the names of arrays
DARK = 64  # values below it alone are hardly those of 256 levels
MOST_LEVELS = 65_536
Levels = Annotated[int, Interval(ge=2, le=MOST_LEVELS)] | None


class Mapped:
    """The images of an .npy file, [N,H,W] or [N,H,W,C], mapped into memory: the pages of several processes are one.

    They are served in `dtype`, whatever integers the file holds.
    """

    in_memory = False

    def __init__(self, file: Path, dtype: torch.dtype = torch.uint8) -> None:
        self.file, self.dtype = file.absolute(), dtype
        self._array = np.load(file, mmap_mode="r", allow_pickle=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, height, width, *channels = self._array.shape
        return n, channels[0] if channels else 1, height, width

    def __getitem__(self, positions: Tensor) -> Tensor:
        x = torch.from_numpy(as_levels(np.asarray(self._array[positions.numpy()]), self.dtype))
        return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)

    def __reduce__(self) -> tuple[type["Mapped"], tuple[Path, torch.dtype]]:
        return Mapped, (self.file, self.dtype)  # a process that is spawned maps the file, too, and is sent no images


def arrays(path: str, source_levels: Levels = None) -> Images:
    """Images from a folder of arrays, as `python -m pixelcnn_lit.data out=FOLDER` writes it, or anybody.

    Files: train_images.npy and test_images.npy uint8 [N,H,W] or [N,H,W,C], train_labels.npy and test_labels.npy
    integers [N] from 0, and, if wanted, val_images.npy and val_labels.npy, and dataset.json, an object with class_names
    (a list), levels, name and changes (a list: what was changed in the images).

    Args:
        source_levels: of the images, where they are not 256; above 256, the codes of a tokenizer, integers of any type.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"dataset.path={path}: no such folder; type dataset.path=FOLDER, with train_images.npy in it")
    facts = {"name": path} | _facts(folder / FACTS)
    return labelled_images(
        f"dataset.path={path}",
        {file.stem for file in folder.glob("*.npy")},
        load=lambda key: _mapped(folder / f"{key}.npy"),
        store=lambda key, _, dtype: Mapped(folder / f"{key}.npy", dtype),
        facts=facts | ({"levels": source_levels} if source_levels else {}),
    )


def _mapped(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except PermissionError:
        raise
    except Exception as error:  # damaged headers lead to a dozen classes of errors
        raise UserError(f"{file}: a damaged .npy file, or none ({first_line(error)}); create it again") from error


def _facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    kinds = {"name": str, "levels": Annotated[int, Interval(ge=2, le=MOST_LEVELS)]}
    kinds |= {"class_names": list[str], "changes": list[str]}
    if not isinstance(facts, dict) or not all(matches(facts[key], kind) for key, kind in kinds.items() if key in facts):
        raise UserError(f"{file}: must hold an object of class_names, levels, name and changes; create it again")
    lists = {key: [printable(text) for text in facts.get(key, [])] for key in ("class_names", "changes")}
    texts = {key: printable(facts[key]) for key in ("name",) if key in facts}
    return {key: value for key, value in (facts | lists | texts).items() if key in facts}


def labelled_images(
    where: str,
    keys: Collection[str],
    load: Callable[[str], np.ndarray],
    store: Callable[[str, np.ndarray, torch.dtype], Tensor | Stored],
    facts: dict[str, Any],
) -> Images:
    """Return the images of several arrays, checked. Raises UserError, which begins with `where`.

    Args:
        keys: of the arrays that there are. load: returns one of them.
        store: how an array of images, which it is given with its key and the type to serve it in, is kept.
        facts: class_names, levels, name and changes, as far as they are known.
    """
    splits, levels = {}, facts.get("levels", 256)
    for name, part in PREFIXES.items():
        if name == "validation" and not {f"{part}_images", f"{part}_labels"} & set(keys):
            continue
        for key in (f"{part}_images", f"{part}_labels"):
            if key not in keys:
                raise UserError(f"{where}: there is no {key} in it; it has: {', '.join(sorted(keys)) or 'no arrays'}")
        y = _labels(where, f"{part}_labels", load(f"{part}_labels"))
        x = load(f"{part}_images")
        _require_images(where, f"{part}_images", x, facts.get("levels"))
        if len(x) != len(y):
            raise UserError(f"{where}: {len(x)} {part}_images and {len(y)} labels; give one label an image")
        splits[name] = Split(store(f"{part}_images", x, level_dtype(levels)), y)
    if "levels" not in facts:
        _require_256_levels(where, splits["train"])
    return Images(
        **splits,
        class_names=_class_names(where, splits["train"].y, facts.get("class_names")),
        levels=levels,
        name=facts.get("name"),
        changes=tuple(facts.get("changes", ())),
    )


def _labels(where: str, key: str, y: np.ndarray) -> Tensor:
    """int64 [N] of integers [N], or [N,1], as MedMNIST has them."""
    if y.dtype.kind not in "iu" or y.ndim not in (1, 2) or y.shape[1:] not in ((), (1,)):
        raise UserError(f"{where}: {key} is {y.dtype} {list(y.shape)}; give integers [N]")
    return torch.from_numpy(y.reshape(-1).astype(np.int64))


def as_levels(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Integers that were checked, as what torch has in that type; no copy where they are that."""
    return x.astype(np.uint8 if dtype == torch.uint8 else np.int32, copy=False)


def _require_images(where: str, key: str, x: np.ndarray, levels: int | None) -> None:
    """Raise UserError unless an array is one of images. `levels` are those that are stated, if any are."""
    what = f"{where}: {key} is {x.dtype} {list(x.shape)}"
    if x.ndim not in (3, 4) or x.dtype.kind not in "iu" or 0 in x.shape:
        raise UserError(f"{what}; give uint8 [N,H,W] or [N,H,W,C]")
    channels, height, width = x.shape[1:] if x.ndim == 4 else (0, 0, 0)
    if x.ndim == 4 and width not in (1, 3) and (channels in (1, 3) or height == width != channels):
        raise UserError(f"{what}, which looks like [N,C,H,W]; give [N,H,W,C], as {key}.transpose(0, 2, 3, 1)")
    if levels is None and x.dtype != np.uint8:
        raise UserError(
            f"{what}; give uint8; of the codes of a tokenizer, type how many there are: dataset.source_levels=512"
        )
    if levels is None and x.ndim == 4 and width not in (1, 3):
        raise UserError(
            f"{what}; give 1 (grey) or 3 (RGB) channels; if these are right, type dataset.source_levels=256"
        )
    for first in range(0, len(x), PART) if x.dtype != np.uint8 else ():  # before they are cast
        part = x[first : first + PART]
        if part.min() < 0 or part.max() >= (levels or 256):
            raise UserError(f"{where}: {key} has values {part.min()} to {part.max()}, of {levels} levels")


def _require_256_levels(where: str, split: Split) -> None:
    largest = 0
    for part in progress(split.parts(PART), desc="looking at all values"):
        largest = max(largest, int(part.x.max()))
        if largest >= DARK:
            return
    raise UserError(
        f"{where}: no value is above {largest}, so that images of 256 levels would be nearly black; type "
        f"dataset.source_levels={max(2, largest + 1)}, or 256 if they are"
    )


def _class_names(where: str, y: Tensor, names: list[str] | None) -> list[str]:
    """Return the names of the classes, which without any are the labels of the training images, 0 to the last."""
    if names is not None:
        return names
    kinds = y.unique().tolist()
    if kinds != list(range(len(kinds))):
        first, last = (kinds[0], kinds[-1]) if kinds else (None, None)
        begin = "; they begin at 1: subtract 1" if kinds == list(range(1, len(kinds) + 1)) else ""
        raise UserError(
            f"{where}: class {next(n for n in range(len(kinds) + 1) if n not in kinds)} has no training images: "
            f"train_labels are {len(kinds)} kinds of numbers, {first} to {last}; give 0 to {len(kinds) - 1}{begin}"
        )
    return [str(n) for n in kinds]


def write_arrays(images: Images, folder: Path) -> None:
    """Write images as a folder that `arrays` reads, a part at a time, whole or not at all.

    Raises UserError where the folder is there already.
    """
    if folder.exists():
        raise UserError(f"out={folder}: is there already; type another name")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=folder.absolute().parent, prefix=UNFINISHED))
    try:
        for name, split in images.splits().items():
            _write_images(split, unfinished / f"{PREFIXES[name]}_images.npy", name)
            np.save(unfinished / f"{PREFIXES[name]}_labels.npy", split.y.numpy())
        facts = {"name": images.name, "levels": images.levels, "class_names": images.class_names}
        text = json.dumps(facts | {"changes": images.changes}, indent=2)
        (unfinished / FACTS).write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)  # as of any folder; a temporary one is its maker's alone
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_images(split: Split, file: Path, name: str) -> None:
    """Write images [N,C,H,W] as an array [N,H,W] or [N,H,W,C]. A full disk is an error here, not in a mapped page."""
    channels, height, width = split.image_shape
    shape = (len(split), height, width, channels)[: 3 if channels == 1 else 4]
    kind = np.dtype(np.uint8 if split.images.dtype == torch.uint8 else np.uint16)
    with file.open("wb") as content:
        np.lib.format.write_array_header_1_0(content, {"descr": kind.str, "fortran_order": False, "shape": shape})
        for part in progress(split.parts(PART), desc=f"writing {name}"):
            content.write(part.x.permute(0, 2, 3, 1).contiguous().numpy().astype(kind, copy=False).data)
        content.flush()
        os.fsync(content.fileno())  # it is whole before the folder has its name
