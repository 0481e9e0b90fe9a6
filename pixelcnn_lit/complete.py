"""Complete images: keep some pixels and draw the others.

Each image is completed several times; the pixels that are kept stay as they are, to the bit.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("complete")

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import saved_or_given
from pixelcnn_lit.data.grids import grid, save
from pixelcnn_lit.data.pictures import read_png
from pixelcnn_lit.data.transforms import requantize_levels
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.machine import Threads, best_device, processes_of, say_threads, take_threads
from pixelcnn_lit.runs.run_dir import relative, run_dir


def main(
    ckpt: str,
    keep: Literal["top_half", "bottom_half", "left_half", "right_half"] | None,
    keep_mask: str | None,
    image: str | None,
    label: int | str | None,
    n_images: Annotated[int, Ge(1)],
    dataset: dict[str, Any],
    sampler: dict[str, Any],
    threads: Threads,
) -> None:
    threads = take_threads(threads)
    model = load(ckpt)
    model.check_sampler(sampler)
    if keep and keep_mask:
        raise UserError("keep and keep_mask exclude each other; type one")
    if label is not None and not image:
        raise UserError(f"label={label}: is the class of image=FILE.png; test images bring their own")
    if image:
        x, y = read_image(image, model), known_class(label, model)
    else:
        x, y = test_images(ckpt, model, dataset, n_images)
    known = read_mask(keep_mask, model) if keep_mask else half(keep or "top_half", model.image_shape)
    if not 0 < int(known.sum()) < known.numel():
        raise UserError(
            f"{int(known.sum())} of {known.numel()} pixels are kept: nothing to complete; type another keep"
        )
    model, processes = model.to(best_device()), processes_of(threads)
    say_threads(model.device, threads, processes)
    given = {"image": x.to(model.device), "known": known.to(model.device)}
    drawn = model.draw(sampler, y, threads, **given, progress=True, processes=processes).cpu()

    directory = run_dir()
    rows = torch.cat([x[:, None], torch.where(known, x, model.levels // 2)[:, None], drawn], dim=1)
    save(grid(rows, model.levels, model.called(y)), directory / "completions.png")
    result: dict[str, Any] = {"checkpoint": ckpt, "images": len(x), "known": int(known.sum()), "labels": y}
    if is_beginning(known):
        scores = {
            "bpd of the images' own rest": conditional_bpd(model, x[:, None], y, known),
            "bpd of the completions": conditional_bpd(model, drawn, y, known),
        }
        print(*(f"{name} under the model, given what is kept: {value:.4f}" for name, value in scores.items()), sep="\n")
        result |= scores
    else:
        print("not the conditional: kept pixels stand behind drawn ones")
    atomic_write_text(directory / "completions.json", json.dumps(result, indent=2))
    print(f"image, what is kept, {drawn.shape[1]} completions a row: {relative(directory / 'completions.png')}")


def half(keep: str, image_shape: tuple[int, ...]) -> Tensor:
    """The pixels to keep, bool [H,W]."""
    _, height, width = image_shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    side = {"top_half": rows < height // 2, "bottom_half": rows >= height // 2}
    side |= {"left_half": columns < width // 2, "right_half": columns >= width // 2}
    return side[keep].expand(height, width)


def is_beginning(known: Tensor) -> bool:
    """Return whether the known pixels of bool [H,W] precede all others: only then is the rest drawn given them."""
    n = int(known.sum())
    return bool(known.flatten()[:n].all())


@torch.no_grad()
def conditional_bpd(model: Density, x: Tensor, y: list[int], known: Tensor) -> float:
    """Bits per dimension of the pixels of x [K,n,C,H,W] that are not known, given those that are and the classes."""
    nats = []
    for images, label in zip(x.to(model.device), y, strict=True):
        for some in images.split(64):
            given = torch.full((len(some),), label, device=model.device)
            nats.append(-model.log_prob(some, given)[..., ~known].cpu().double())
    return bits(float(torch.cat(nats).mean()))


def test_images(ckpt: str, model: Density, dataset: dict[str, Any], n: int) -> tuple[Tensor, list[int]]:
    data = saved_or_given(ckpt, model.settings, dataset)
    first = data.test[:n]
    return first.x, (first.y.tolist() if model.conditional else model.classes * len(first))


def read_image(path: str, model: Density) -> Tensor:
    """uint8 [1,C,H,W] in the model's levels."""
    x = read_png(Path(path))
    if tuple(x.shape) != model.image_shape:
        raise UserError(f"image={path}: (C, H, W) = {tuple(x.shape)}; this model draws {model.image_shape}")
    return requantize_levels(x[None], 256, model.levels)


def read_mask(path: str, model: Density) -> Tensor:
    """bool [H,W], true where the PNG is white."""
    mask = read_png(Path(path))
    if mask.shape[1:] != model.image_shape[1:]:
        raise UserError(f"keep_mask={path}: (H, W) = {tuple(mask.shape[1:])}; images are {model.image_shape[1:]}")
    return mask.float().mean(0) >= 128


def known_class(label: int | str | None, model: Density) -> list[int]:
    if label is not None:
        return model.class_numbers([label], f"label={label}")
    if len(model.classes) > 1:
        raise UserError(f"label is missing; type label={model.class_names[0]} or another class of the image")
    return model.classes
