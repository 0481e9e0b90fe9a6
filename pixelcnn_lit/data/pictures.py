"""People's pictures as levels, and back."""

import contextlib
import dataclasses
import functools
import graphlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pixelcnn_lit.config.errors import UserError, first_line, printable
from pixelcnn_lit.data.transforms import requantize_levels
from pixelcnn_lit.runs.machine import cores
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.terminal import progress

Background = Literal["white", "black"]
Colour = Literal["grey"]

# What Pillow says of odd files, it says in the error too, or it is of no consequence for the pixels. Not where they are
# read: those are threads, which all share the filters.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow recognizes these, but leaves the reading to other programs.
UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
GREY = ("1", "L", "LA")  # Pillow's modes of one colour channel
# More than 8 bits a channel in the header of a file whose mode does not tell: SIZ in JPEG 2000, av1C in AVIF.
DEEP_HEADERS = {
    "JPEG2000": rb"\xff\x4f\xff\x51.{38}[\x08-\x7f\x88-\xff]",
    "AVIF": rb"av1C..[\x40-\x7f\xc0-\xff]",
}
NEARLY_GREY = 8  # of 255: by so much the channels of a grey picture may differ after a lossy format
SYSTEM = {"__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """The pixels of a file, uint8 [1 or 3,H,W], grey or RGB, and in words what was changed in them."""

    file: Path
    pixels: Tensor
    changes: tuple[str, ...] = ()

    def name_in(self, folder: Path) -> str:
        """Return the name of its file below a folder, on one line whatever it is."""
        return printable(self.file.relative_to(folder).as_posix())

    def changed(self, pixels: Tensor, change: str) -> "Picture":
        return dataclasses.replace(self, pixels=pixels, changes=(*self.changes, change))


def read_picture(file: Path, background: Background | None = None, settings: str | None = None) -> Picture:
    """Decode a file in any format that Pillow reads, told by its content: one channel where it is grey, else three.

    It is turned as its EXIF orientation says. Raises UserError where it cannot be read, and where pixels would be
    lost: more than 8 bits a channel, several frames, transparency without a background.

    Args:
        background: on which a picture that is transparent somewhere is composed.
        settings: what precedes the names of the caller's settings in an error, "" if nothing does; None where the
            caller has no such settings.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'is a folder; type one file' if file.is_dir() else 'no such file'}")
    try:
        with _opened(file) as image:
            decoded, changes = _decoded(image, file, background, settings)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{file}: not a readable picture; save it as PNG, for example") from error
    except Exception as error:  # damaged files lead to a dozen classes of errors
        raise UserError(f"{file}: not a readable picture ({first_line(error)}); save it again") from error
    return Picture(file, _pixels(decoded), tuple(changes))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    # Not by its name: Pillow 13 then maps an uncompressed TIFF into memory, and scrambles one that EXIF turns sideways.
    with file.open("rb") as content, Image.open(content, formats=_formats()) as image:
        yield image


def _decoded(
    image: Image.Image, file: Path, background: Background | None, settings: str | None
) -> tuple[Image.Image, list[str]]:
    """Return a file's picture as L or RGB, and what was changed in it: see `read_picture`."""
    if _is_deep(image, file):
        raise UserError(f"{file}: has more than 8 bits a channel, most likely 16; save it with 8 bits")
    changes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise UserError(f"{file}: has {frames} frames, pages or layers; save the one that is meant")
    if frames > 1:
        changes.append("took the first of several pictures in the file, as a viewer does")
    if image.format != "TIFF":
        image.load()
    orientation = _orientation(image)  # Pillow turns a TIFF while it loads, and then forgets
    turned = ImageOps.exif_transpose(image)
    if orientation in range(2, 9):
        changes.append(f"turned as its EXIF orientation ({orientation}) says")
    kind = "L" if turned.mode in GREY else "RGB"
    if turned.mode in ("CMYK", "YCbCr", "HSV"):
        changes.append(f"converted from {turned.mode} to RGB")
    if not turned.has_transparency_data:
        return turned.convert(kind), changes
    drawn = turned.convert("RGBA")
    if drawn.getchannel("A").getextrema() == (255, 255):
        return drawn.convert(kind), changes
    if background is None:
        ways = "" if settings is None else f"type {settings}background=white or {settings}background=black, or "
        raise UserError(f"{file}: is transparent in places; {ways}save it without transparency")
    changes.append(f"transparent; composed on {background}")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, background), drawn).convert(kind), changes


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in UNREAD]


def _is_deep(image: Image.Image, file: Path) -> bool:
    """Return whether a channel has more than 8 bits, of which Pillow keeps 8 in colour: its tiles alone tell."""
    if image.mode[0] in "IF":
        return True
    if image.format in DEEP_HEADERS:
        with file.open("rb") as content:
            return bool(re.search(DEEP_HEADERS[image.format], content.read(2**16), re.DOTALL))
    for codec, _, _, given in getattr(image, "tile", ()):
        arguments = given if isinstance(given, tuple) else (given,)
        raw = any(re.search(";16[BLNS]", str(argument)) for argument in arguments)  # BGR;16 is 16 bits a pixel
        largest = arguments[-1] if codec in ("ppm", "ppm_plain") else 0
        if raw or codec == "SGI16" or (isinstance(largest, int) and largest > 255):
            return True
    return False


def _orientation(image: Image.Image) -> int:
    """Return its EXIF orientation; 1, which is upright, where its EXIF data is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except SyntaxError:
        return 1


def sized(picture: Picture, height: int, width: int, resize: bool) -> Picture:
    """Return it as large as an image [height,width]. Raises UserError where it is not, and `resize` is false.

    It is scaled, antialiased, until it just covers the image, and cropped to the middle.
    """
    here = tuple(picture.pixels.shape[1:])
    if here == (height, width):
        return picture
    if not resize:
        raise UserError(
            f"{picture.file}: {here[0]}×{here[1]} pixels; the model's images are {height}×{width}; type resize=true"
        )
    image = ImageOps.fit(to_pil(picture.pixels), (width, height), Image.Resampling.BILINEAR)
    cropped = here[0] * width != here[1] * height
    how = "enlarged" if height > here[0] or width > here[1] else "scaled"
    return picture.changed(_pixels(image), f"{how} to {height}×{width}" + " and cropped to the middle" * cropped)


def in_channels(picture: Picture, channels: int, colour: Colour | None) -> Picture:
    """Return it with 1 or 3 channels. Raises UserError where its colours would be lost, and `colour` is not grey."""
    pixels = picture.pixels
    if colour is None and len(pixels) == channels:
        return picture
    spread = int((pixels.amax(0) - pixels.amin(0)).max())
    if colour is None and spread > NEARLY_GREY:
        raise UserError(f"{picture.file}: is coloured, but the model's images are grey; type colour=grey")
    if spread:
        grey = _pixels(to_pil(pixels).convert("L"))
        picture = picture.changed(
            grey, "coloured, turned to grey" if spread > NEARLY_GREY else "nearly grey, made grey"
        )
    if len(pixels) < channels:
        picture = picture.changed(pixels, "grey, taken as three equal channels")
    return dataclasses.replace(picture, pixels=picture.pixels[:1].expand(channels, -1, -1))


def read_image(
    file: Path,
    image_shape: tuple[int, int, int],
    levels: int,
    background: Background | None = None,
    resize: bool = False,
    colour: Colour | None = None,
    invert: bool = False,
) -> Picture:
    """Read a file as an image of a model, uint8 [C,H,W] in its levels. Raises UserError where it is none."""
    channels, height, width = image_shape
    if levels > 256 or channels not in (1, 3):
        raise UserError(f"{file}: a picture is no image of this model, which is of codes, or not grey or RGB")
    picture = read_picture(file, background, settings="")
    picture = in_channels(picture, channels, colour)
    picture = sized(picture, height, width, resize)
    if invert:
        picture = picture.changed(255 - picture.pixels, "inverted")
    if levels < 256:
        picture = picture.changed(requantize_levels(picture.pixels, 256, levels), f"256 levels taken as {levels}")
    return picture


def require_pictures(key: str, **settings: object) -> None:
    """Raise UserError where one of these settings is typed, but no picture, which is that of `key`."""
    for name, value in settings.items():
        if value is not None and value is not False:
            raise UserError(f"{name}: is for pictures of your own; type {key}, too, or leave {name} out")


class Changes:
    """What was changed in pictures: how often each change was made, the first file, and which came before which."""

    def __init__(self) -> None:
        self.pictures = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Path] = {}
        self.before: dict[str, set[str]] = {}

    def add(self, picture: Picture) -> None:
        self.pictures += 1
        self.counts.update(picture.changes)
        for n, change in enumerate(picture.changes):
            self.first.setdefault(change, picture.file)
            self.before.setdefault(change, set()).update(picture.changes[:n])

    def tell(self) -> None:
        """Print a line for each kind of change, in the order in which they were made."""
        for change in graphlib.TopologicalSorter(self.before).static_order():
            count = self.counts[change]
            which = relative(self.first[change]) if count == 1 else f"{count} of {self.pictures} pictures"
            print(f"{which}: {change}")


def tell(pictures: Iterable[Picture]) -> None:
    """Print what was changed in pictures: see `Changes`."""
    changes = Changes()
    for picture in pictures:
        changes.add(picture)
    changes.tell()


def read_all(files: Sequence[Path], read: Callable[[Path], Picture]) -> list[Picture]:
    """Return what `read` makes of each file, on all cores: decoding lets other threads run."""
    return _on_all_cores(read, files, desc="reading")


def _on_all_cores(function: Callable[[Path], Any], files: Sequence[Path], **bar: object) -> list[Any]:
    _formats()  # before there are threads
    with ThreadPoolExecutor(cores()) as threads:
        return list(progress(threads.map(function, files), total=len(files), **bar))


def class_folders(class_names: Sequence[str]) -> list[str]:
    """Return the name of a folder for each class, which holds its pictures."""
    return [re.sub(r"[/\\\x00]", "_", name) for name in class_names]


def picture_files(folder: Path) -> list[Path]:
    """Return all pictures below a folder, by their content, 2 before 10. Prints how many other files lie there.

    A file that is named as a picture is one, even if it is damaged. Raises UserError where there are no pictures.
    """
    files = sorted(_files_below(folder), key=lambda file: natural(file.as_posix()))
    visible = [file for file in files if not is_hidden(file.relative_to(folder))]
    found = _on_all_cores(_is_picture, visible, desc="looking for pictures")
    pictures = [file for file, picture in zip(visible, found, strict=True) if picture]
    others = sorted(set(visible) - set(pictures))
    if len(visible) < len(files):
        print(f"{relative(folder)}: hidden and system files left out: {len(files) - len(visible)}")
    if others:
        print(f"{relative(folder)}: files left out that are no pictures: {len(others)} ({first_few(others)})")
    if not pictures:
        raise UserError(f"{folder}: no pictures in it; type another folder")
    return pictures


def _files_below(folder: Path) -> Iterator[Path]:
    """Links to folders are followed, to each once. A link that leads nowhere is a file, which cannot be read."""
    seen = {os.path.realpath(folder)}

    def is_new(path: Path) -> bool:
        real = os.path.realpath(path)
        new = real not in seen
        seen.add(real)
        return new

    for directory, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in sorted(folders) if is_new(Path(directory, name))]
        paths = [Path(directory, name) for name in names]
        yield from (path for path in paths if path.is_file() or path.is_symlink())


def _raise(error: OSError) -> None:
    raise error


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key to sort by as people count: numbers by value."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)], name


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part in SYSTEM for part in path.parts)


def _is_picture(file: Path) -> bool:
    """Return whether Pillow recognizes a file, by its content or by the ending of its name."""
    try:
        with _opened(file):
            return True
    except UnidentifiedImageError:
        return Image.registered_extensions().get(file.suffix.lower()) in _formats()
    except Exception:
        return True


def first_few(files: Sequence[Path]) -> str:
    """Return the names of the first few."""
    return ", ".join(file.name for file in files[:3]) + ", ..." * (len(files) > 3)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [1,H,W] of a picture of Pillow's mode L, [3,H,W] of RGB."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def to_pil(image: Tensor) -> Image.Image:
    """An image uint8 [1 or 3,H,W], grey or RGB, its levels unchanged."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
