"""Bits per dimension of people's own pictures, which belong to no dataset."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixelcnn_lit.data.grids import as_rgb, heat, save, tiled
from pixelcnn_lit.data.images import random_positions
from pixelcnn_lit.data.pictures import Picture, picture_files, read_all, read_image, tell
from pixelcnn_lit.density.bayes import marginal, posterior
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.negatives import hint_at_negatives, likelier_as_negatives
from pixelcnn_lit.runs.run_dir import relative, run_dir
from pixelcnn_lit.runs.terminal import progress

SHOWN = 100  # pictures that are listed and drawn; all are in the json
LONGEST = 24  # characters of a name beside its picture


def read_pictures(path: Path, n_images: int | None, model: Density, changes: dict[str, Any]) -> list[Picture]:
    """Read a file, or all pictures below a folder, as images of the model; a line tells of each kind of change."""
    files = picture_files(path) if path.is_dir() else [path]
    if n_images is not None and n_images < len(files):
        print(f"{n_images} of {len(files)} pictures, a fixed random subset")
        files = [files[n] for n in random_positions(len(files), n_images).tolist()]
    pictures = read_all(files, lambda file: read_image(file, model.image_shape, model.levels, **changes))
    tell(pictures)
    return pictures


def score_pictures(
    model: Density, pictures: list[Picture], folder: Path, label: int | str | None, batch_size: int
) -> dict[str, Any]:
    """Bits per dimension of each picture, named as from a folder, in a table, and a picture of where they are spent."""
    x = torch.stack([picture.pixels for picture in pictures])
    given = classes_of(model, x, label, batch_size)
    batches = list(zip(x.split(batch_size), given.y.split(batch_size), strict=True))
    spent = torch.cat([model.bits_per_pixel(*batch).cpu() for batch in progress(batches, desc="scoring")])
    bpd = (spent.double().sum((1, 2)) if given.nats is None else bits(given.nats)) / model.dims
    columns = {
        "file": [picture.name_in(folder) for picture in pictures],
        "class": model.called(given.y.tolist()),
        "probability": [None] * len(x) if given.probability is None else given.probability.tolist(),
        "bpd": bpd.tolist(),
        "changes": [picture.changes for picture in pictures],
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    print(f"class: {given.how}")
    print(table(rows[:SHOWN], float(bpd.mean())))
    if not any("inverted" in picture.changes for picture in pictures):
        nats = (math.log(2) * spent.sum((1, 2))).split(batch_size)
        both = progress(list(zip(batches, nats, strict=True)), desc="comparing with negatives")
        hint_at_negatives(torch.cat([likelier_as_negatives(model, some, y, known) for (some, y), known in both]))
    show_bits(model, x[:SHOWN], spent[:SHOWN], rows[:SHOWN])
    if len(rows) > SHOWN:
        print(f"shown: the first {SHOWN} of {len(rows)}; all are in evaluation.json")
    return {"bpd": float(bpd.mean()), "classes": given.how, "pictures": rows}


class Given(NamedTuple):
    """The classes that images are scored given, int64 [N], and how they were chosen.

    Where they are the likeliest: how probable each is, [N], and -log p(x) in nats, over all classes, float64 [N].
    """

    y: Tensor
    how: str
    probability: Tensor | None = None
    nats: Tensor | None = None


def classes_of(model: Density, x: Tensor, label: int | str | None, batch_size: int) -> Given:
    if label is not None:
        (number,) = model.class_numbers([label], "label")
        return Given(torch.full((len(x),), number), f"label={label}")
    if len(model.classes) == 1:
        return Given(torch.full((len(x),), model.classes[0]), "the model's only class")
    given = model.class_log_likelihoods(x, batch_size)
    prior = torch.full((len(model.classes),), 1 / len(model.classes))
    probability, y = posterior(given, prior).exp().max(1)
    how = (
        f"the likeliest of {len(model.classes)} by Bayes' rule, however unlike all of them a picture may be; "
        "bpd: of p(x), with a uniform prior of the classes (label=... sets one)"
    )
    return Given(y, how, probability, -marginal(given, prior))


def table(rows: list[dict[str, Any]], mean: float) -> str:
    lines = [["file", "class", "bpd"]]
    for row in rows:
        sure = "" if row["probability"] is None else f" ({row['probability']:.0%})"
        lines.append([row["file"], f"{row['class']}{sure}", f"{row['bpd']:.4f}"])
    lines += [["mean", "", f"{mean:.4f}"]]
    first, second, third = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(f"{file:{first}}  {name:>{second}}  {bpd:>{third}}" for file, name, bpd in lines)


def show_bits(model: Density, x: Tensor, spent: Tensor, rows: list[dict[str, Any]]) -> None:
    """Draw each image beside a map of its bits."""
    most = model.uniform_bits
    pairs = torch.stack([as_rgb(x, model.levels), heat(spent, most)], dim=1)
    stems = [Path(row["file"]).stem for row in rows]
    short = [stem if len(stem) <= LONGEST else stem[: LONGEST - 1] + "…" for stem in stems]
    names = [f"{stem}: {row['class']}, {row['bpd']:.2f} bpd" for stem, row in zip(short, rows, strict=True)]
    path = run_dir() / "bits_per_pixel.png"
    save(tiled(pairs, names), path)
    print(f"image, and where its bits are spent (black: none, white: {most:.3g} or more in a pixel): {relative(path)}")
