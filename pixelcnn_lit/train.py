"""Train a density model, and score it on the test set.

It is scored once, with the weights best on validation. The last lines printed say where checkpoints, samples and
curves are.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("train")

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from annotated_types import Interval
from lightning.fabric.utilities.rank_zero import rank_zero_only

from pixelcnn_lit.config.build import check
from pixelcnn_lit.data.datamodule import image_data, uniform_bpd
from pixelcnn_lit.density.density import Density
from pixelcnn_lit.density.load import load
from pixelcnn_lit.density.summary import summary
from pixelcnn_lit.density.warm_start import parts_of, taken_over
from pixelcnn_lit.lit.density_module import DensityModule
from pixelcnn_lit.runs.machine import Threads, take_threads
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.runs.saved import checkpoint_file
from pixelcnn_lit.runs.signals import Stopped
from pixelcnn_lit.training.fit import fit, scores_line, write_result
from pixelcnn_lit.training.loggers import log_result, where_to_look
from pixelcnn_lit.training.run import Run, train_in_a_run
from pixelcnn_lit.training.sample_grid import SampleGrid


def main(ckpt: str | None, skip_completed: bool, **settings: object) -> float | None:
    """Return the validation score, to be minimised."""
    return train_in_a_run(train, ckpt, skip_completed, settings, score="val/bpd")


def train(
    run: Run,
    dataset: dict[str, Any],
    sampler: dict[str, Any],  # read by callbacks.samples
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    logger: dict[str, Any],
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)],
    overrides: list[str],  # as typed, for the table of a sweep
    model: dict[str, Any],
    likelihood: dict[str, Any],
    optimizer: dict[str, Any],
    scheduler: dict[str, Any] | None,
    threads: Threads = None,
    conditional: bool = True,
    label_dropout: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    init: str | None = None,
    **own: object,  # of DensityModule
) -> dict[str, Any] | None:
    """Fit in the run's directory, test the best weights, and leave result.json, which the first process returns."""
    take_threads(threads)  # weights are drawn on as many, whatever training takes
    data = image_data(dataset, seed)
    data.setup()
    L.seed_everything(seed, workers=True, verbose=False)
    parts = {"model": model, "likelihood": likelihood, "conditional": conditional, "label_dropout": label_dropout}
    training = {"optimizer": optimizer, "scheduler": scheduler, **own}
    check("", DensityModule, training, known=["density"])
    trained = load(str(checkpoint_file(init, "init"))) if init and not run.start else None
    if trained:
        parts |= parts_of(trained, overrides)
    density = Density(**data.facts, label=data.label, dataset=dataset, poses=data.poses, **parts)
    if trained:
        rank_zero_only(print)(f"init={init}: {taken_over(density, trained)}")
    print_summary(density)
    module = DensityModule(density, **training)
    hparams = {"seed": seed, "init": init, "dataset": dataset, **parts, **training, "trainer": trainer}
    extra_config = {"sampler": sampler, "callbacks": callbacks, "logger": logger}
    extra_config |= {"overrides": overrides, "threads": threads}
    fitted = fit(run, module, data, hparams, extra_config)
    best, fitter = DensityModule(load(fitted.best_checkpoint)), fitted.trainer
    n_params = sum(p.numel() for p in best.parameters())  # counted before FSDP spreads them over the cards
    fitter.test(best, data, verbose=False)
    if fitter.is_global_zero:
        per_class = [None if math.isnan(bpd) else bpd for bpd in best.bpd_per_class]  # JSON knows no NaN
        result = fitted.result(best, data) | {
            "test/bpd_per_class": dict(zip(data.class_names, per_class, strict=True)),
            "uniform_bpd": uniform_bpd(data.levels),
            "n_params": n_params,
            "overrides": overrides,
        }
        write_result(run.directory, result, fitted.throughput)  # before drawing, which takes its time
        grids = []
        drawn_from = load(fitted.best_checkpoint)
        with suppress(Stopped):  # all else is done: the run ends by itself
            grids = [grid.draw(fitter, drawn_from) for grid in fitted.extras if isinstance(grid, SampleGrid)]
        result = write_result(run.directory, result, fitted.throughput)
        log_result(fitter, result)
        print(closing_lines(result, grids, where_to_look(fitter)))
        return result
    return None


@rank_zero_only
def print_summary(density: Density) -> None:
    print(summary(density))


def closing_lines(result: dict[str, Any], grids: list[Path], places: list[str]) -> str:
    nats = f" ({result['test/nats_per_image']:.2f} nats an image)" if "test/nats_per_image" in result else ""
    lines = [
        scores_line(result, "bpd", ".4f", f" bpd{nats}") + f" (a uniform model: {result['uniform_bpd']:.4f})",
        f"{result['n_params']:,} parameters, {result['images_per_second']:.0f} training images/s, "
        f"{result['seconds']:.0f} s in all",
        f"best checkpoint: {relative(result['checkpoint'])}",
        *(f"its samples:     {relative(path)}" for path in grids),
        *(f"look at it:      {place}" for place in places),
    ]
    return "\n".join(lines)
