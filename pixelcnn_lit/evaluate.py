"""Score a checkpoint on a split.

Bits per dimension overall and per class; or, by Bayes' rule, how well it tells the classes apart, and whether images of
another dataset are less likely to it.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("evaluate")

import json
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import ImageData, image_data, saved_or_given, uniform_bpd
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.bayes import class_prior, marginal
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.machine import Threads, best_device, say_threads, step_work, take_threads
from pixelcnn_lit.runs.run_dir import plain_name, relative, run_dir
from pixelcnn_lit.scoring.plots import show_histogram
from pixelcnn_lit.scoring.posteriors import score
from pixelcnn_lit.training.trainer import make_trainer, require_batches, settle_threads


def main(
    ckpt: str,
    task: Literal["bpd", "classify", "ood"],
    split: Literal["train", "validation", "test"],
    n_images: Annotated[int, Ge(1)] | None,
    dataset: dict[str, Any],
    trainer: dict[str, Any],
    threads: Threads,
    ood: dict[str, Any] | None = None,
) -> None:
    take_threads(threads)
    if (task == "ood") != (ood is not None):
        raise UserError("task=ood and dataset@ood=NAME go together; type both")
    model = load(ckpt)
    data = saved_or_given(ckpt, model.settings, dataset, compared=[split])
    images = chosen(data.split(split), n_images)
    head = {"label": data.label, "split": split, "images": len(images), "checkpoint": ckpt}
    if task == "bpd":
        figures = bits_per_dimension(model, data.tested_on(images), split, trainer, threads)
    else:
        if not model.conditional:
            raise UserError("task: this model knows no classes; type task=bpd, or train one with conditional=true")
        model.to("cpu" if trainer["accelerator"] == "cpu" else best_device())
        say_threads(model.device, take_threads(threads, step_work(model, model.image_shape, data.batch_size)))
        figures = classify(model, data, images, split) if ood is None else novelty(model, data, images, ood)
    if figures is None:
        return
    atomic_write_text(run_dir() / "evaluation.json", json.dumps(head | figures, indent=2))
    print(relative(run_dir() / "evaluation.json"))


def chosen(split: Split, n_images: int | None) -> Split:
    """Return so many images, always the same ones, of all classes: files often hold class after class."""
    if n_images is None:
        return split
    return split[torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:n_images]]


def bits_per_dimension(
    model: Density, data: ImageData, split: str, trainer: dict[str, Any], threads: int | None
) -> dict[str, Any] | None:
    """Score the test images of `data`, overall and per class. Returns None in all processes but the first."""
    scorer = make_trainer(trainer, logger=False, enable_checkpointing=False)
    require_batches(scorer, "test", len(data.test), data.batch_size)
    settle_threads(scorer, threads, step_work(model, model.image_shape, data.batch_size))
    module = DensityModule(model)
    scorer.test(module, data, verbose=False)
    figures = {key.removeprefix("test/"): value for key, value in module.figures.items()}
    # A class without images has no bpd.
    per_class = {n: b for n, b in zip(data.class_names, module.bpd_per_class, strict=True) if b == b}
    if not scorer.is_global_zero:
        return None
    uniform = uniform_bpd(data.levels)
    print(f"{data.label}, {split} split, {figures['images']} images, {uniform:.4f} bpd for a uniform model")
    width = max(map(len, [*per_class, "all"]))
    for name, bpd in {**per_class, "all": figures["bpd"]}.items():
        error = figures["bpd_standard_error"] if name == "all" else None
        print(f"{name:>{width}}  {bpd:.4f}{'' if error is None else f' ± {error:.4f}'} bpd")
    return {**figures, "uniform_bpd": uniform, "bpd_per_class": per_class}


def classify(model: Density, data: ImageData, images: Split, split: str) -> dict[str, Any]:
    """Tell the classes of images, which are of `split`, by Bayes' rule. The prior: how often a class is trained on."""
    if model.num_classes < 2:
        raise UserError("task=classify: this model knows one class, and there is none to tell it from; type task=bpd")
    prior = class_prior(data.train.y, model.num_classes)
    scores = score(model.classify(images.x, prior, data.batch_size), images.y)
    print(f"{data.label}, {split} split, {len(images)} images")
    for name, value in scores._asdict().items():
        print(f"{name:>17}  {value:.4f}")
    return scores._asdict()


def novelty(model: Density, data: ImageData, images: Split, ood: dict[str, Any]) -> dict[str, Any]:
    """Compare log p(x) of images and of as many test images of another dataset, in a histogram, too."""
    other = image_data(ood)
    other.setup()
    here, there = (f"{data.facts['image_shape']} of {data.levels} levels" for data in (data, other))
    if here != there:
        raise UserError(f"dataset@ood: images {there}, the model is of {here}; type another, or ood.resize=...")
    prior = class_prior(data.train.y, model.num_classes)

    def bpd(x: Tensor) -> Tensor:
        given = model.class_log_likelihoods(x, data.batch_size)
        return -bits(marginal(given, prior) / model.dims)

    own = bpd(images.x)
    new = bpd(chosen(other.test, len(images)).x)
    is_new = torch.arange(len(own) + len(new)) >= len(own)
    told_apart = float(binary_auroc(torch.cat([own, new]), is_new.int()))
    names = [plain_name(d.title) for d in (data, other)]
    path = show_histogram(dict(zip(names, (own, new), strict=True)), run_dir() / "ood.png")
    print(f"{names[0]} {own.mean():.4f} bpd, {names[1]} {new.mean():.4f} bpd: {relative(path)}")
    print(f"of two images, one of each, that of {names[1]} is the less likely in {told_apart:.2%}")
    return {"bpd": float(own.mean()), "bpd_ood": float(new.mean()), "ood": other.label, "auroc": told_apart}
