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
from pixelcnn_lit.data.pictures import Background, Colour, read_image, read_picture, require_pictures, sized, tell
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import load
from pixelcnn_lit.density.negatives import hint_at_negatives, likelier_as_negatives
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.machine import Threads, best_device, made_with, processes_of, say_threads, take_threads
from pixelcnn_lit.runs.run_dir import relative, run_dir


def main(
    ckpt: str,
    keep: Literal["top_half", "bottom_half", "left_half", "right_half"] | None,
    keep_mask: str | None,
    image: str | None,
    label: int | str | None,
    background: Background | None,
    resize: bool,
    colour: Colour | None,
    invert: bool,
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
        raise UserError(f"label={label}: is the class of image=FILE; test images have their own")
    if not image:
        require_pictures("image=FILE", background=background, colour=colour, invert=invert)
    if not image and not keep_mask:
        require_pictures("image=FILE or keep_mask=FILE", resize=resize)
    if image:
        picture = read_image(Path(image), model.image_shape, model.levels, background, resize, colour, invert)
        x, y = picture.pixels[None], known_class(label, model)
        changes = list(picture.changes)
        tell([picture])
        if not invert:
            hint_at_negatives(likelier_as_negatives(model, x, torch.tensor(y), model.nats(x, y)))
    else:
        changes = []
        x, y = test_images(ckpt, model, dataset, n_images)
    known = read_mask(keep_mask, model, resize) if keep_mask else half(keep or "top_half", model.image_shape)
    if not 0 < int(known.sum()) < known.numel():
        raise UserError(
            f"{int(known.sum())} of {known.numel()} pixels are kept: nothing to complete; type another keep"
        )
    model, processes = model.to(best_device()), processes_of(threads)
    say_threads(model.device, threads, processes)
    given: dict[str, Any] = {"image": x.to(model.device), "known": known.to(model.device)}
    drawn = model.draw(sampler, y, threads, **given, progress=True, processes=processes).cpu()

    directory = run_dir()
    rows = torch.cat([x[:, None], torch.where(known, x, model.levels // 2)[:, None], drawn], dim=1)
    save(grid(rows, model.levels, model.called(y)), directory / "completions.png")
    result: dict[str, Any] = {"checkpoint": ckpt, "images": len(x), "known": int(known.sum()), "labels": y}
    if image:
        result |= {"image": image, "changes": changes}
    if is_beginning(known):
        scores = {
            "bpd of the true remaining pixels": conditional_bpd(model, x[:, None], y, known),
            "bpd of the completions": conditional_bpd(model, drawn, y, known),
        }
        print(*(f"{name} given what is kept: {value:.4f}" for name, value in scores.items()), sep="\n")
        result |= scores
    else:
        print("not the conditional: kept pixels stand behind drawn ones")
    result |= made_with(model.device)
    atomic_write_text(directory / "completions.json", json.dumps(result, indent=2))
    path = relative(directory / "completions.png")
    print(f"each row shows the image, what is kept and {drawn.shape[1]} completions: {path}")


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


def read_mask(path: str, model: Density, resize: bool) -> Tensor:
    """bool [H,W], true where the picture is white."""
    mask = sized(read_picture(Path(path)), *model.image_shape[1:], resize)
    tell([mask])
    return mask.pixels.float().mean(0) >= 128


def known_class(label: int | str | None, model: Density) -> list[int]:
    if label is not None:
        return model.class_numbers([label], "label")
    if len(model.classes) > 1:
        raise UserError(f"label is missing; type label={model.class_names[0]} or another class of the image")
    return model.classes
