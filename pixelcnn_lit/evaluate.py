"""Score a checkpoint on a split.

Bits per dimension overall and per class; or, by Bayes' rule, how well it tells the classes apart, and whether images of
another dataset are less likely to it.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("evaluate")

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from pixelcnn_lit.config.build import Range
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import ImageData, image_data, saved_or_given, uniform_bpd
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.density import Density, bits
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.atomic import write_text
from pixelcnn_lit.runs.machine import Threads, best_device, say_threads, step_work, take_threads
from pixelcnn_lit.runs.run_dir import plain_name, run_dir, shown
from pixelcnn_lit.scoring.bayes import class_log_likelihoods, marginal, posterior, score
from pixelcnn_lit.training.trainer import make_trainer, require_batches, settle_threads


def main(
    ckpt: str,
    task: Literal["bpd", "classify", "novelty"],
    split: Literal["train", "validation", "test"],
    n_images: Annotated[int, Range(1)] | None,
    dataset: dict[str, Any],
    trainer: dict[str, Any],
    threads: Threads,
    beside: dict[str, Any] | None = None,
) -> None:
    take_threads(threads)
    if (task == "novelty") != (beside is not None):
        raise UserError("task=novelty and dataset@beside=NAME go together; type both")
    model = load(ckpt)
    data = saved_or_given(ckpt, model.settings, dataset, compared=[split])
    data.test = chosen(getattr(data, split), n_images)  # so that Lightning asks for it, process by process
    head = {"label": data.label, "split": split, "images": len(data.test), "checkpoint": ckpt}
    if task == "bpd":
        figures = bits_per_dimension(model, data, split, trainer, threads)
    else:
        model.to("cpu" if trainer["accelerator"] == "cpu" else best_device())
        say_threads(model.device, take_threads(threads, step_work(model, model.image_shape, data.batch_size)))
        figures = classify(model, data, split) if beside is None else novelty(model, data, image_data(beside))
    if figures is None:
        return
    write_text(run_dir() / "evaluation.json", json.dumps(head | figures, indent=2))
    print(shown(run_dir() / "evaluation.json"))


def chosen(split: Split, n_images: int | None) -> Split:
    """So many images, always the same ones, of all classes: files often hold class after class."""
    if n_images is None:
        return split
    return split[torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:n_images]]


def bits_per_dimension(
    model: Density, data: ImageData, split: str, trainer: dict[str, Any], threads: int | None
) -> dict[str, Any] | None:
    """Of the images in data.test, which are of `split`, overall and per class; None in all processes but the first."""
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
        print(f"{name:>{width}}  {bpd:.4f} bpd")
    return {**figures, "uniform_bpd": uniform, "bpd_per_class": per_class}


def classify(model: Density, data: ImageData, split: str) -> dict[str, Any]:
    """The images in data.test, which are of `split`, by Bayes' rule. The prior: how often a class is trained on."""
    if model.num_classes < 2:
        raise UserError("task=classify: this model knows one class, and there is none to tell it from; type task=bpd")
    given, prior = given_each_class(model, data, data), class_prior(data)
    scores = score(posterior(given, prior), data.test.y)
    print(f"{data.label}, {split} split, {len(data.test)} images")
    for name, value in scores._asdict().items():
        print(f"{name:>17}  {value:.4f}")
    return scores._asdict()


def novelty(model: Density, data: ImageData, other: ImageData) -> dict[str, Any]:
    """log p(x) of the images in data.test beside as many test images of another dataset, as a histogram, too."""
    other.setup()
    here, there = (f"{data.facts['image_shape']} of {data.levels} levels" for data in (data, other))
    if here != there:
        raise UserError(f"dataset@beside: images {there}, the model is of {here}; type another, or beside.resize=...")
    other.test = chosen(other.test, len(data.test))
    prior = class_prior(data)
    own, new = (-bits(marginal(given_each_class(model, data, d), prior) / model.dims) for d in (data, other))
    is_new = torch.arange(len(own) + len(new)) >= len(own)
    told_apart = float(binary_auroc(torch.cat([own, new]), is_new.int()))
    names = [plain_name(d.title) for d in (data, other)]
    path = histogram(dict(zip(names, (own, new), strict=True)), run_dir() / "novelty.png")
    print(f"{names[0]} {own.mean():.4f} bpd, {names[1]} {new.mean():.4f} bpd: {shown(path)}")
    print(f"of two images, one of each, that of {names[1]} is the less likely in {told_apart:.2%}")
    return {"bpd": float(own.mean()), "bpd_beside": float(new.mean()), "beside": other.label, "auroc": told_apart}


def given_each_class(model: Density, data: ImageData, of: ImageData) -> Tensor:
    if not model.conditional:
        raise UserError("task: this model knows no classes; type task=bpd, or train one with conditional=true")
    return class_log_likelihoods(model, of.test.x, data.batch_size)


def class_prior(data: ImageData) -> Tensor:
    """How often each class is trained on."""
    return torch.bincount(data.train.y, minlength=len(data.class_names)).double() / len(data.train)


def histogram(bpd: dict[str, Tensor], path: Path) -> Path:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    edges = torch.histogram(torch.cat(list(bpd.values())), 60).bin_edges.tolist()
    for name, values in bpd.items():
        axes.hist(values, edges, alpha=0.6, label=name)
    axes.set(xlabel="bits per dimension of a test image", ylabel="images")
    axes.legend()
    figure.savefig(path)
    return path
