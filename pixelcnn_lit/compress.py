"""Compress images without loss, and count the bits."""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("compress")

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from pixelcnn_lit.codec.coder import Compressed, compress
from pixelcnn_lit.codec.format import MAX_BATCH
from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.data.arrays import as_levels
from pixelcnn_lit.data.datamodule import saved_or_given
from pixelcnn_lit.data.images import Split, channels_first
from pixelcnn_lit.data.pictures import class_folders, picture_files, read_all, read_picture, tell, to_pil
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.atomic import atomic_write
from pixelcnn_lit.runs.machine import Threads, best_device, processes_of, say_threads, take_threads
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.terminal import progress

SPLITS = ("train", "validation", "test")


def main(
    ckpt: str,
    images: str,
    out: str,
    n_images: Annotated[int, Ge(0)] | None,
    batch_size: Annotated[int, Interval(ge=1, le=MAX_BATCH)],
    flip: bool,
    dataset: dict[str, Any],
    threads: Threads,
) -> None:
    threads = take_threads(threads)
    if Path(out).is_dir():
        raise UserError(f"out={out}: is a folder; type the name of a file")
    model = load(ckpt).to(best_device())
    with atomic_write(Path(out)) as file:  # which is tried before the work
        if images in SPLITS:
            given = of_split(model, images, ckpt, dataset)[:n_images].held()
        else:
            given = of_file(model, images, n_images, batch_size)
        processes = processes_of(threads)
        say_threads(model.device, threads, processes)
        done = compress(model, given, batch_size, processes, flip)
        file.write(done.content)
    if len(given):
        print(report(model, given, done))
    print(f"{len(given)} images, {len(done.content):,} bytes: {relative(out)}")


def of_split(model: Density, split: str, ckpt: str, dataset: dict[str, Any]) -> Split:
    data = saved_or_given(ckpt, model.settings, dataset)
    return data.split(split)


def of_file(model: Density, path: str, n_images: int | None, batch_size: int) -> Split:
    """The first images of an npz or a folder; where they have no labels, those that make them likeliest."""
    if Path(path).is_dir():
        pixels, labels = read_folder(path, n_images, model.called(model.classes))
    else:
        pixels, labels = read_npz(path, n_images, model.levels, model.level_dtype)
    if tuple(pixels.shape[1:]) != model.image_shape:
        raise UserError(f"images={path}: {list(pixels.shape[1:])}, but the model is of {list(model.image_shape)}")
    _require_levels(path, pixels.numpy(), model.levels)
    if labels is None and len(pixels):
        labels = torch.tensor(model.classes)[model.class_log_likelihoods(pixels, batch_size).argmax(1)]
    if labels is None:
        labels = torch.zeros(0, dtype=torch.int64)
    if len(model.classes) > 1 and not set(labels.tolist()) <= set(model.classes):
        raise UserError(
            f"images={path}: labels {int(labels.min())}..{int(labels.max())}, the model knows {model.classes}"
        )
    return Split(pixels, labels)


def read_folder(path: str, n_images: int | None, class_names: list[str]) -> tuple[Tensor, Tensor | None]:
    """Pictures, and as their labels the folders that they are in, if all are named by a class, as by `decompress`."""
    files = picture_files(Path(path))[:n_images]
    if not files:
        raise UserError("n_images=0: leaves no picture; type 1 or more")
    pictures = read_all(files, read_picture)
    tell(pictures)
    x = [picture.pixels for picture in pictures]
    if len({image.shape for image in x}) > 1:
        raise UserError(f"images={path}: of different sizes; make them one size")
    folders = [file.parent.name for file in files]
    label_of = {folder: label for label, folder in enumerate(class_folders(class_names))}
    labelled = set(folders) <= label_of.keys()
    return torch.stack(x), torch.tensor([label_of[folder] for folder in folders]) if labelled else None


def read_npz(path: str, n_images: int | None, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if not Path(path).is_file():
        raise UserError(f"images={path}: no such file; type {', '.join(SPLITS)}, an npz or a folder of PNGs")
    try:
        with np.load(path) as content:
            x, y = content["images"], content.get("labels")
    except Exception as error:  # zip and numpy name their troubles in a dozen classes
        if Path(path).suffix.lower() != ".npz":
            raise UserError(f"images={path}: no npz; of pictures type the folder that they are in") from error
        raise UserError(f"images={path}: no npz with `images` and perhaps `labels` ({first_line(error)})") from error
    labels = y is None or (y.shape == x.shape[:1] and y.dtype.kind in "iu")
    right = x.dtype == np.uint8 or (x.dtype.kind in "iu" and levels > 256)  # or codes, of any integers
    if not right or x.ndim not in (3, 4) or not labels:
        raise UserError(f"images={path}: `images` must be uint8 [N,H,W] or [N,H,W,C], `labels` integers [N]")
    _require_levels(path, x, levels)
    images = channels_first(torch.from_numpy(as_levels(x[:n_images], dtype)))
    return images, None if y is None else torch.from_numpy(y[:n_images]).long()


def _require_levels(path: str, x: np.ndarray, levels: int) -> None:
    if x.size and not 0 <= x.min() <= x.max() < levels:
        raise UserError(f"images={path}: values {x.min()} to {x.max()}, but the model is of {levels} levels")


def report(model: Density, images: Split, done: Compressed) -> str:
    """Bits per dimension, and what other formats take."""
    dims, size = len(images) * model.dims, 8 * len(done.content)
    ideal = {"model": done.model_bits, "classes": done.class_bits}
    ideal |= {"mirrored or not": done.flip_bits} if done.flip_bits else {}
    lines = {"file": size, **ideal}
    if images.x.dtype == torch.uint8 and images.image_shape[0] in (1, 3):
        png = [encoded(image, "PNG", optimize=True) for image in progress(images.x, desc="as PNG")]
        webp = [encoded(image, "WEBP", lossless=True, quality=100) for image in progress(images.x, desc="as WebP")]
        lines |= {"PNG, a file an image": 8 * sum(png), "WebP lossless, likewise": 8 * sum(webp)}
    rows = [f"{name:>24}  {bits / dims:.4f} bits per dimension" for name, bits in lines.items()]
    return "\n".join([*rows, f"{'overhead':>24}  {size / sum(ideal.values()) - 1:.3%} over {' and '.join(ideal)}"])


def encoded(image: Tensor, format: str, **options: object) -> int:
    """Bytes of an image uint8 [C,H,W] as Pillow writes it."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format, **options)
    return buffer.tell()
