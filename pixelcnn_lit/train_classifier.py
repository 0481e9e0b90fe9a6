"""Train a classifier, and score it on the test set.

It is scored once, with the weights best on validation. The last lines printed say where checkpoints, confusions and
curves are.
"""

from pixelcnn_lit.runs.launch import launch

if __name__ == "__main__":
    launch("train_classifier")

from pathlib import Path
from typing import Annotated, Any

import lightning as L
from annotated_types import Interval
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.model_summary.model_summary import summarize

from pixelcnn_lit.config.build import check
from pixelcnn_lit.config.errors import UserError
from pixelcnn_lit.data.datamodule import image_data
from pixelcnn_lit.data.images import channel_statistics
from pixelcnn_lit.data.pictures import read_picture
from pixelcnn_lit.lit.classifier_module import ClassifierModule, load_classifier
from pixelcnn_lit.lit.metrics import per_class
from pixelcnn_lit.runs.machine import Threads, take_threads
from pixelcnn_lit.runs.run_dir import relative
from pixelcnn_lit.scoring.plots import show_confusion
from pixelcnn_lit.training.fit import fit, scores_line, write_result
from pixelcnn_lit.training.loggers import log_picture, log_result, where_to_look
from pixelcnn_lit.training.run import Run, train_in_a_run


def main(ckpt: str | None, skip_completed: bool, **settings: object) -> float | None:
    """Return the validation accuracy, to be maximised."""
    return train_in_a_run(train, ckpt, skip_completed, settings, score="val/accuracy")


def train(
    run: Run,
    dataset: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    logger: dict[str, Any],
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)],
    overrides: list[str],  # as typed, for the table of a sweep
    threads: Threads = None,
    **settings: Any,  # of ClassifierModule
) -> dict[str, Any] | None:
    """Fit in the run's directory, test the best weights, and leave result.json, which the first process returns."""
    take_threads(threads)  # weights are drawn on as many, whatever training takes
    data = image_data(dataset, seed)
    data.setup()
    if len(data.class_names) < 2:
        raise UserError(f"dataset: {data.label} has one class, and a classifier tells two or more apart; type another")
    if data.poses > 1:
        raise UserError(f"dataset.poses={data.poses}: classifiers are told no pose; type dataset.horizontal_flip=true")
    L.seed_everything(seed, workers=True, verbose=False)
    mean, std = ([value / (data.levels - 1) for value in values] for values in channel_statistics(data.train))
    std = [value or 1.0 for value in std]  # a channel that is the same everywhere becomes zeros
    facts = {**data.facts, "label": data.label, "dataset": dataset, "mean": mean, "std": std}
    check("", ClassifierModule, settings, known=facts)
    classifier = ClassifierModule(**facts, **settings)
    if run.start is None:
        classifier.load_pretrained()
    rank_zero_only(print)(summarize(classifier, max_depth=3))
    hparams = {"seed": seed, "dataset": dataset, **settings, "trainer": trainer}
    extra_config = {"callbacks": callbacks, "logger": logger, "overrides": overrides, "threads": threads}
    fitted = fit(run, classifier, data, hparams, extra_config)
    best, fitter = load_classifier(fitted.best_checkpoint), fitted.trainer
    fitter.test(best, data, verbose=False)
    if not fitter.is_global_zero:
        return None
    result = fitted.result(best, data) | {
        "test/accuracy_per_class": dict(zip(data.class_names, per_class(best.counted), strict=True)),
        "n_params": sum(p.numel() for p in best.parameters()),
        "overrides": overrides,
    }
    picture = show_confusion(best.counted, data.class_names, run.directory / "confusion.png")
    log_picture(fitter, "confusion", read_picture(picture).pixels)
    result = write_result(run.directory, result, fitted.throughput)
    log_result(fitter, result)
    print(closing_lines(result, picture, where_to_look(fitter)))
    return result


def closing_lines(result: dict[str, Any], picture: Path, places: list[str]) -> str:
    shares = {name: share for name, share in result["test/accuracy_per_class"].items() if share is not None}
    return "\n".join([
        *(f"{name:>{max(map(len, shares))}}  {share:.1%}" for name, share in shares.items()),
        scores_line(result, "accuracy", ".2%"),
        f"{result['n_params']:,} parameters, {result['images_per_second']:.0f} training images/s, "
        f"{result['seconds']:.0f} s in all",
        f"best checkpoint: {relative(result['checkpoint'])}",
        f"confusions:      {relative(picture)}",
        *(f"look at it:      {place}" for place in places),
    ])  # fmt: skip
