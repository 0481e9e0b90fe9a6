"""Train a density model, score it once on the test set with the weights best on validation, and say where all is."""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("train")

import math
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import lightning as L

from pixelcnn_lit.checkpoints.read import read_checkpoint
from pixelcnn_lit.config.build import Range, check
from pixelcnn_lit.data.datamodule import ImageData, image_data, uniform_bpd
from pixelcnn_lit.lit.density_module import DensityModel, load
from pixelcnn_lit.runs.machine import Threads, take_threads
from pixelcnn_lit.runs.run_dir import shown
from pixelcnn_lit.runs.signals import Stopped
from pixelcnn_lit.training.callbacks import Stopwatch
from pixelcnn_lit.training.fit import fit, start_or_go_on, write_result
from pixelcnn_lit.training.sample_grid import SampleGrid


def main(ckpt: str | None, skip_completed: bool, **settings: Any) -> None:
    start_or_go_on(train, ckpt, skip_completed, settings)


def train(
    directory: Path,
    start: Path | None,
    dataset: dict[str, Any],
    sampler: dict[str, Any],  # read by callbacks.samples
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    seed: Annotated[int, Range(0, 2**32 - 1)],
    overrides: list[str],  # as typed, for the table of a sweep
    threads: Threads = None,
    **model: Any,  # the settings of DensityModel
) -> None:
    """Fit in `directory`, from the checkpoint `start` on if there is one; test the best weights; leave result.json."""
    take_threads(threads)  # weights are drawn on as many, whatever training takes
    data = image_data(dataset, seed)
    data.setup()
    L.seed_everything(seed, workers=True, verbose=False)
    facts = {**data.facts, "label": data.label, "dataset": dataset}
    check("", DensityModel, model, known=facts)
    density = DensityModel(**facts, **model)
    compared = {"seed": seed, "dataset": dataset, **model, "trainer": trainer}
    beside = {"sampler": sampler, "callbacks": callbacks, "overrides": overrides, "threads": threads}
    fitter, checkpoint, stopwatch, extras = fit(directory, start, density, data, compared, beside)
    best = load(checkpoint)
    n_params = sum(p.numel() for p in best.parameters())  # counted before FSDP spreads them over the cards
    fitter.test(best, data, verbose=False)
    if fitter.is_global_zero:
        result = summary(fitter, checkpoint, best, data, stopwatch)
        result |= {"n_params": n_params, "overrides": overrides}
        write_result(directory, result, stopwatch)  # before drawing, which takes its time
        grids = []
        with suppress(Stopped):  # all else is done: the run ends by itself
            grids = [callback.draw(fitter, load(checkpoint)) for callback in extras if isinstance(callback, SampleGrid)]
        print(closing_lines(write_result(directory, result, stopwatch), directory, grids))


def summary(
    trainer: L.Trainer, checkpoint: str, best: DensityModel, data: ImageData, stopwatch: Stopwatch
) -> dict[str, Any]:
    """What result.json holds: figures are of the weights best on validation."""
    val_images, val_figures = read_checkpoint(checkpoint)["scored"]
    per_class = [None if math.isnan(bpd) else bpd for bpd in best.bpd_per_class]  # JSON knows no NaN
    return {
        "label": data.label,
        **val_figures,
        "val/images": val_images,
        **best.figures,
        "test/images": best.images_scored,
        "test/bpd_per_class": dict(zip(data.class_names, per_class, strict=True)),
        "uniform_bpd": uniform_bpd(data.levels),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "images_per_second": stopwatch.images_per_second,
        "precision": trainer.precision,
        "checkpoint": checkpoint,
    }


def closing_lines(result: dict[str, Any], directory: Path, grids: list[Path]) -> str:
    nats = f" ({result['test/nats_per_image']:.2f} nats an image)" if "test/nats_per_image" in result else ""
    lines = [
        f"{result['label']}: val {result['val/bpd']:.4f}, test {result['test/bpd']:.4f} bpd{nats} "
        f"on {result['val/images']} and {result['test/images']} images (a uniform model: {result['uniform_bpd']:.4f})",
        f"{result['n_params']:,} parameters, {result['images_per_second']:.0f} training images/s, "
        f"{result['seconds']:.0f} s in all",
        f"best checkpoint: {shown(result['checkpoint'])}",
        *(f"its samples:     {shown(path)}" for path in grids),
        f"look at it:      {shlex.join(['tensorboard', '--logdir', shown(directory)])}",
    ]
    return "\n".join(lines)
