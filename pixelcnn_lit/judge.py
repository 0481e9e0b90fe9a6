"""Judge a model's samples by a classifier.

Do they look like their class, and how far are they from real images? A table, a confusion matrix, some samples beside
the nearest training images, and, of several temperatures and guidance scales, consistency over diversity as a curve.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("judge")

import json
from itertools import product
from typing import Annotated, Any

import torch
from annotated_types import Ge

from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import ImageData, saved_or_given
from pixelcnn_lit.data.grids import grid, save
from pixelcnn_lit.data.images import Split
from pixelcnn_lit.density.load import load
from pixelcnn_lit.lit.classifier_module import load_classifier
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.machine import (
    Threads,
    best_device,
    made_with,
    processes_of,
    say_threads,
    step_work,
    take_threads,
)
from pixelcnn_lit.runs.run_dir import relative, run_dir
from pixelcnn_lit.scoring.plots import show_confusion, show_curve
from pixelcnn_lit.scoring.samples import SampleScores, nearest, read, verdict

SHOWN = 4  # samples a class, each beside the training image that is nearest to it
REAL = "real test images"


def main(
    ckpt: str,
    classifier_ckpt: str,
    temperatures: list[float],
    guidance_scales: list[float],
    batch_size: Annotated[int, Ge(1)],
    sampler: dict[str, Any],
    dataset: dict[str, Any],
    threads: Threads,
) -> None:
    to_draw = take_threads(threads)
    model = load(ckpt).to(best_device())
    if not model.conditional:
        raise UserError(f"ckpt={ckpt}: draws without classes, which a judge could not find again; type another")
    facts = {key: model.settings[key] for key in ImageData.FACTS}
    judge = load_classifier(classifier_ckpt, facts).to(best_device())
    points = {
        f"temperature {t:g}, guidance {scale:g}": {**sampler, "temperature": t, "guidance_scale": scale}
        for scale, t in product(guidance_scales, temperatures)
    }
    for point in points.values():  # now, and not after the first has been drawn
        model.check_sampler(point)
    if not points:
        raise UserError("temperatures and guidance_scales: type at least one number in each")
    data = saved_or_given(ckpt, model.settings, dataset)

    to_read = take_threads(threads, step_work(judge, model.image_shape, batch_size))
    say_threads(model.device, to_read, what="to read")
    say_threads(model.device, to_draw, processes_of(to_draw), "to draw")
    training = read(judge, data.train, batch_size)
    n = min(sampler["n_per_class"], int(torch.bincount(data.test.y).min()))
    if n < 2:
        raise UserError("sampler.n_per_class: distances want two images of each class, drawn and in the test set")

    real = read(judge, data.test, batch_size)
    verdicts = {REAL: verdict(real, data.test.y, training, model.num_classes, n)}
    for name, point in points.items():
        images = model.draw(point, threads=to_draw, processes=processes_of(to_draw), progress=True).cpu()  # [K,n,C,H,W]
        y = torch.arange(len(images)).repeat_interleave(images.shape[1])
        drawn = read(judge, Split(images.flatten(0, 1), y), batch_size)
        verdicts[name] = verdict(drawn, y, training, model.num_classes, n)
        if len(verdicts) == 2:
            some = images[:, :SHOWN]
            shown_features = drawn.features.unflatten(0, images.shape[:2])[:, :SHOWN].flatten(0, 1)
            closest = nearest(shown_features, training.features)
            pairs = torch.stack([some, data.train[closest].x.view_as(some)], dim=2).flatten(1, 2)
            save(grid(pairs, model.levels, model.class_names), run_dir() / "nearest.png")
            show_confusion(verdicts[name].confusion, data.class_names, run_dir() / "confusion.png")
    head = {"ckpt": ckpt, "classifier_ckpt": classifier_ckpt, "label": data.label, "n_compared": n}
    head |= made_with(model.device)
    report(verdicts, head)
    if len(points) > 1:
        print(relative(show_curve(points, verdicts, REAL, run_dir() / "curve.png")))


def report(verdicts: dict[str, SampleScores], head: dict[str, Any]) -> None:
    columns = ("consistency", "frechet", "kernel", "diversity")
    print(f"{head['label']}, distances of {head['n_compared']} images a class")
    print(f"{'':>28}" + "".join(f"{column:>13}" for column in columns))
    for name, own in verdicts.items():
        print(f"{name:>28}" + "".join(f"{getattr(own, column):>13.4f}" for column in columns))
    rows = {name: own._asdict() | {"confusion": own.confusion.tolist()} for name, own in verdicts.items()}
    atomic_write_text(run_dir() / "judge.json", json.dumps(head | {"verdicts": rows}, indent=2))
    print(*(relative(run_dir() / name) for name in ("judge.json", "confusion.png", "nearest.png")), sep="\n")
