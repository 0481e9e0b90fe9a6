"""Score a checkpoint on a split, or on your own pictures.

Bits per dimension overall and per class, or of each picture; or, by Bayes' rule, how well it tells the classes apart,
and whether images of another dataset are less likely to it.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("evaluate")

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from pixelcnn_lit.config.build import check_values
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import ImageData, image_data, saved_or_given, uniform_bpd
from pixelcnn_lit.data.images import Split, fingerprint, random_positions
from pixelcnn_lit.data.pictures import Background, Colour, require_pictures
from pixelcnn_lit.density.bayes import class_prior, marginal
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import load
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.machine import Threads, best_device, made_with, say_threads, step_work, take_threads
from pixelcnn_lit.runs.run_dir import plain_name, relative, run_dir
from pixelcnn_lit.scoring.flips import score_flip_mixture
from pixelcnn_lit.scoring.own_pictures import read_pictures, score_pictures
from pixelcnn_lit.scoring.plots import show_histogram
from pixelcnn_lit.scoring.posteriors import score
from pixelcnn_lit.training.score import score_test_images

BATCH = 64  # pictures that are scored at a time


def main(
    ckpt: str,
    task: Literal["bpd", "classify", "ood"],
    split: Literal["train", "validation", "test"] | None,
    n_images: Annotated[int, Ge(1)] | None,
    images: str | None,
    label: int | str | None,
    background: Background | None,
    resize: bool,
    colour: Colour | None,
    invert: bool,
    flip_mixture: bool,
    dataset: dict[str, Any],
    trainer: dict[str, Any],
    threads: Threads,
    ood: dict[str, Any] | None = None,
) -> None:
    take_threads(threads)
    if flip_mixture and (task != "bpd" or images is not None):
        raise UserError("flip_mixture=true: scores images of a dataset by task=bpd; leave it out")
    if flip_mixture and trainer["limit_test_batches"] != 1.0:
        raise UserError("flip_mixture=true: scores all images; leave trainer.limit_test_batches out")
    if (task == "ood") != (ood is not None):
        raise UserError("task=ood and dataset@ood=NAME go together; type both")
    changes: dict[str, Any] = {"background": background, "resize": resize, "colour": colour, "invert": invert}
    if images is None:
        require_pictures("images=FILE_OR_FOLDER", label=label, **changes)
        data = split or "test", n_images, dataset
        evaluation = of_split(load(ckpt), ckpt, task, *data, trainer, threads, ood, flip_mixture)
    else:
        refuse_dataset(task, split, dataset)
        batch_size = dataset.get("batch_size") or BATCH
        model = load(ckpt)
        path = Path(images).absolute()
        pictures = read_pictures(Path(images), n_images, model, changes)
        place(model, trainer, threads, batch_size)
        print(f"{path.name}, images: {len(pictures)}, {uniform_bpd(model.levels):.4f} bpd for a uniform model")
        head = {"label": path.name, "images": len(pictures), "checkpoint": ckpt} | changes
        folder = Path(images) if path.is_dir() else Path(images).parent
        evaluation = head | score_pictures(model, pictures, folder, label, batch_size)
    if evaluation is None:
        return
    evaluation |= made_with(device_of(trainer))
    atomic_write_text(run_dir() / "evaluation.json", json.dumps(evaluation, indent=2))
    print(relative(run_dir() / "evaluation.json"))


def of_split(
    model: Density,
    ckpt: str,
    task: str,
    split: str,
    n_images: int | None,
    dataset: dict[str, Any],
    trainer: dict[str, Any],
    threads: Threads,
    ood: dict[str, Any] | None,
    flip_mixture: bool,
) -> dict[str, Any] | None:
    """Return the evaluation on the images of a dataset; None in all processes but the first."""
    data = saved_or_given(ckpt, model.settings, dataset, compared=[split])
    whole = data.split(split)
    images = chosen(whole, n_images)
    head = {"label": data.label, "split": split, "images": len(images), "checkpoint": ckpt}
    head["fingerprint"] = fingerprint(images)
    part = f", chosen at random of {len(whole):,}" if len(images) < len(whole) else ""
    rank_zero_only(print)(f"scored: {head['fingerprint']}{part}")
    if task == "bpd":
        figures = bits_per_dimension(model, data.tested_on(images), split, trainer, threads)
        if figures is None:
            return None
        if flip_mixture:
            place(model, trainer, threads, data.batch_size)
            figures |= flip_mixture_figures(model, images, data.batch_size)
        return head | figures
    if not model.conditional:
        raise UserError("task: this model knows no classes; type task=bpd, or train one with conditional=true")
    place(model, trainer, threads, data.batch_size)
    return head | (classify(model, data, images, split) if ood is None else novelty(model, data, images, ood))


def place(model: Density, trainer: dict[str, Any], threads: Threads, batch_size: int) -> None:
    """Put the model where it is to compute, and say what that takes of the CPU."""
    model.to(device_of(trainer))
    say_threads(model.device, take_threads(threads, step_work(model, model.image_shape, batch_size)))


def device_of(trainer: dict[str, Any]) -> torch.device:
    return torch.device("cpu") if trainer["accelerator"] == "cpu" else best_device()


def chosen(split: Split, n_images: int | None) -> Split:
    return split if n_images is None else split[random_positions(len(split), n_images)]


def refuse_dataset(task: str, split: str | None, dataset: dict[str, Any]) -> None:
    """Raise UserError where something is typed that a dataset is needed for, and pictures are given in its place."""
    if task != "bpd":
        raise UserError(f"task={task}: needs images of known classes, of a dataset; leave task or images out")
    if split is not None:
        raise UserError(f"split={split}: is a part of a dataset; leave split or images out")
    typed = sorted(key for key, value in dataset.items() if value is not None and key != "batch_size")
    if typed:
        setting = "dataset" if "_target_" in typed else f"dataset.{typed[0]}"
        raise UserError(f"{setting}: no dataset is read where images are given; leave {setting} or images out")
    if dataset.get("batch_size") is not None:
        check_values("dataset", ImageData, {"batch_size": dataset["batch_size"]})


def bits_per_dimension(
    model: Density, data: ImageData, split: str, trainer: dict[str, Any], threads: int | None
) -> dict[str, Any] | None:
    """Score the test images of `data`, overall and per class. Returns None in all processes but the first."""
    figures = score_test_images(model, data, trainer, threads)
    if figures is None:
        return None
    per_class = figures["bpd_per_class"]
    uniform = uniform_bpd(data.levels)
    print(f"{data.label}, {split} split, {figures['images']} images, {uniform:.4f} bpd for a uniform model")
    width = max(map(len, [*per_class, "all"]))
    for name, bpd in {**per_class, "all": figures["bpd"]}.items():
        error = figures["bpd_standard_error"] if name == "all" else None
        print(f"{name:>{width}}  {bpd:.4f}{'' if error is None else f' ± {error:.4f}'} bpd")
    return {**figures, "uniform_bpd": uniform}


def flip_mixture_figures(model: Density, images: Split, batch_size: int) -> dict[str, Any]:
    """Score images by an even mixture of the model and the model of mirror images, too."""
    mixture = score_flip_mixture(model, images, batch_size)
    bpd, gain, error = mixture
    shown = "" if error is None else f" ± {error:.4f}"
    print(f"half the model, half that of mirror images: {bpd:.4f} bpd, a gain of {gain:.4f}{shown}")
    return mixture._asdict()


def classify(model: Density, data: ImageData, images: Split, split: str) -> dict[str, Any]:
    """Tell the classes of images, which are of `split`, by Bayes' rule. The prior: how often a class is trained on."""
    if model.num_classes < 2:
        raise UserError("task=classify: this model knows one class, and there is none to tell it from; type task=bpd")
    prior = class_prior(data.train.y, model.num_classes)
    log_posteriors = [model.classify(part.x, prior, data.batch_size) for part in images.large_parts()]
    scores = score(torch.cat(log_posteriors), images.y)
    print(f"{data.label}, {split} split, {len(images)} images")
    for name, value in scores._asdict().items():
        print(f"{name:>17}  {value:.4f}")
    return scores._asdict()


def require_comparable(data: ImageData, other: ImageData) -> None:
    """Raise UserError unless images of another dataset are of the shape and the levels of this one's."""
    (channels, *size), (other_channels, *other_size) = (each.facts["image_shape"] for each in (data, other))
    ways = {f"ood.resize={min(size)}": size != other_size, f"ood.levels={data.levels}": other.levels > data.levels}
    wanted = [f"type {way}" for way, needed in ways.items() if needed]
    if channels != other_channels or other.levels < data.levels:  # which no setting changes
        wanted = ["type another dataset@ood"]
    if wanted:
        here, there = (f"{each.facts['image_shape']} of {each.levels} levels" for each in (data, other))
        raise UserError(f"dataset@ood: images {there}, the model is of {here}; {' and '.join(wanted)}")


def novelty(model: Density, data: ImageData, images: Split, ood: dict[str, Any]) -> dict[str, Any]:
    """Compare log p(x) of images and of as many test images of another dataset, in a histogram, too."""
    other = image_data(ood)
    other.setup()
    require_comparable(data, other)
    prior = class_prior(data.train.y, model.num_classes)

    def bpd(some: Split) -> Tensor:
        given = [model.class_log_likelihoods(part.x, data.batch_size) for part in some.large_parts()]
        return -bits(marginal(torch.cat(given), prior) / model.dims)

    own = bpd(images)
    new = bpd(chosen(other.test, len(images)))
    is_new = torch.arange(len(own) + len(new)) >= len(own)
    told_apart = float(binary_auroc(torch.cat([own, new]), is_new.int()))
    names = [plain_name(d.title) for d in (data, other)]
    path = show_histogram(dict(zip(names, (own, new), strict=True)), run_dir() / "ood.png")
    print(f"{names[0]} {own.mean():.4f} bpd, {names[1]} {new.mean():.4f} bpd: {relative(path)}")
    print(f"of two images, one of each, that of {names[1]} is the less likely in {told_apart:.2%}")
    return {"bpd": float(own.mean()), "bpd_ood": float(new.mean()), "ood": other.label, "auroc": told_apart}
