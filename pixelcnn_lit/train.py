"""Train a density model, score it once on the test set with the weights best on validation, and say where all is."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from pixelcnn_lit.build import Range, build, check
from pixelcnn_lit.callbacks import EpochLine, FiniteGuard, HParams, SampleGrid, ScoreAtTheEnd, Stopwatch
from pixelcnn_lit.checkpoints import AtomicCheckpointIO, read_checkpoint, write_text
from pixelcnn_lit.command import Stopped, command, run_dir, shown
from pixelcnn_lit.data.module import ImageData, image_data, uniform_bpd
from pixelcnn_lit.errors import UserError
from pixelcnn_lit.lit import DensityModel, bits, load, require_same
from pixelcnn_lit.machine import make_trainer
from pixelcnn_lit.resume import CONFIG, Streams, last_checkpoint, requeued, saved_settings, starting_point


@command("train")
def main(ckpt: str | None, skip_completed: bool, **settings: Any) -> None:
    directory, typed = run_dir(), list(HydraConfig.get().overrides.task)
    settings.setdefault("scheduler", None)  # it may have been left out
    if skip_completed and (directory / "result.json").is_file():
        print(f"{shown(directory)}: completed before, left alone")
        return
    start = starting_point(directory, ckpt, or_anew=skip_completed)
    settings = saved_settings(directory, settings, typed) if start else settings | {"overrides": typed}
    check("", train, settings, known=("directory", "start"))
    try:
        train(directory, start, **settings)
    except Stopped:
        say_how_to_go_on(directory)
        raise


@rank_zero_only
def say_how_to_go_on(directory: Path) -> None:
    if last_checkpoint(directory).is_file():
        print(f"stopped; to go on, type: python -m pixelcnn_lit.train run_dir={shown(directory)} ckpt=last")


def train(
    directory: Path,
    start: str | None,
    dataset: dict[str, Any],
    sampler: dict[str, Any],  # read by callbacks.samples
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    seed: Annotated[int, Range(0, 2**32 - 1)],
    overrides: list[str],  # as typed when the run began, for the table of a sweep
    **model: Any,  # the settings of DensityModel
) -> None:
    """Fit in `directory`, from the checkpoint `start` on if there is one; test the best weights; leave result.json."""
    stopwatch = Stopwatch()
    data = image_data(dataset, seed)
    data.setup()
    L.seed_everything(seed, workers=True, verbose=False)
    facts = {**data.facts, "label": data.label, "dataset": dataset}
    check("", DensityModel, model, known=facts)
    density = DensityModel(**facts, **model)

    extras = [build(f"callbacks.{name}", callback, Callback) for name, callback in callbacks.items()]
    saved = read_start(start, density, extras) if start else {}
    compared = {"seed": seed, "dataset": dataset, **model, "trainer": trainer}  # what a sweep varies
    progress = [] if sys.stdout.isatty() else [EpochLine()]
    always = [Streams(seed), FiniteGuard(), stopwatch, HParams(compared), ScoreAtTheEnd(), *progress]
    fitter = make_trainer(
        trainer,
        callbacks=[*extras, *always],
        # purge_step: TensorBoard forgets what the run wrote after its last checkpoint
        logger=TensorBoardLogger(
            directory, name="", version="", default_hp_metric=False, purge_step=saved.get("global_step")
        ),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=directory,
    )
    require_validation(fitter)
    if fitter.is_global_zero:
        settings = {**compared, "sampler": sampler, "callbacks": callbacks, "overrides": overrides}
        write_text(directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(settings)))
        (directory / "result.json").unlink(missing_ok=True)
    fitter.fit(density, data, ckpt_path=start, weights_only=True)

    kept = fitter.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or kept.best_model_score is None:
        raise UserError("nothing was trained and validated in this run: type a larger trainer.max_epochs")
    if fitter.is_global_zero:
        for path in requeued(directory):
            path.unlink()  # its weights would be tested in the place of the best
    fitter.strategy.barrier()
    best = load(kept.best_model_path)
    fitter.test(best, data, verbose=False)
    if fitter.is_global_zero:
        result = summary(fitter, kept, density, best, data, stopwatch) | {"overrides": overrides}
        grids = [callback.draw(fitter, best) for callback in extras if isinstance(callback, SampleGrid)]
        result["seconds"] = stopwatch.all_seconds
        write_text(directory / "result.json", json.dumps(result, indent=2))
        print(closing_lines(result, directory, grids))


def require_validation(trainer: L.Trainer) -> None:
    """Refuse, before any training, settings under which nothing would be validated and so nothing kept as best."""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if not trainer.limit_val_batches:
        raise UserError("trainer.limit_val_batches=0: the best weights are chosen on validation; type 1.0 or a number")
    if every and epochs is not None and 0 <= epochs < every:
        raise UserError(f"trainer.max_epochs={epochs}: type at least trainer.check_val_every_n_epoch={every}")


def read_start(path: str, density: DensityModel, extras: list[Callback]) -> dict[str, Any]:
    """The checkpoint to go on from, which must be of the same data and model, with as many averages."""
    saved = read_checkpoint(path)
    if "loops" not in saved:
        raise UserError(f"ckpt={path}: weights alone, from which no run can go on; type RUN_DIR/checkpoints/last.ckpt")
    same = (*ImageData.FACTS, "model", "likelihood")
    require_same(path, saved["hyper_parameters"], {key: density.hparams[key] for key in same})
    averaged = any(isinstance(callback, WeightAveraging) for callback in extras)
    if ("averaging_state" in saved) != averaged:
        # Lightning alone would silently go on from the averaged weights, or with none.
        raise UserError(f"ckpt={path}: saved with callbacks={'no_ema' if averaged else 'default'}; type that")
    return saved


def summary(
    trainer: L.Trainer,
    kept: ModelCheckpoint,
    density: DensityModel,
    best: DensityModel,
    data: ImageData,
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    """What result.json holds: figures are of the weights best on validation."""
    assert kept.best_model_score is not None
    val_nll = float(kept.best_model_score)
    per_class = [None if math.isnan(bpd) else bpd for bpd in best.bpd_per_class]  # JSON knows no NaN
    return {
        "label": data.label,
        "val/nll": val_nll,
        "val/bpd": bits(val_nll),
        "val/images": density.images_scored,
        **best.figures,
        "test/images": best.images_scored,
        "test/bpd_per_class": dict(zip(data.class_names, per_class, strict=True)),
        "uniform_bpd": uniform_bpd(data.levels),
        "n_params": sum(p.numel() for p in best.parameters()),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "images_per_second": stopwatch.images_per_second,
        "precision": trainer.precision,
        "checkpoint": kept.best_model_path,
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
        f"look at it:      tensorboard --logdir {shown(directory)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
