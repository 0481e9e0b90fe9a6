"""Train a density model, score it once on the test set with the weights best on validation, and say where all is."""

import json
import math
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from pixelcnn_lit.build import Range, build, check
from pixelcnn_lit.callbacks import EpochLine, FiniteGuard, HParams, SampleGrid, ScoreAtTheEnd, Stopwatch
from pixelcnn_lit.checkpoints import AtomicCheckpointIO, read_checkpoint, write_text
from pixelcnn_lit.command import Stopped, command, run_dir, shown
from pixelcnn_lit.data.module import ImageData, image_data, uniform_bpd
from pixelcnn_lit.errors import UserError, first_line
from pixelcnn_lit.lit import DensityModel, load, require_same
from pixelcnn_lit.machine import make_trainer
from pixelcnn_lit.resume import Streams
from pixelcnn_lit.runs import CONFIG, alone_in, saved_settings, starting_point, stopped_at, typed_settings


@command("train")
def main(ckpt: str | None, skip_completed: bool, **settings: Any) -> None:
    directory, typed = run_dir(), typed_settings(HydraConfig.get().overrides.task)
    if skip_completed and completed(directory, typed):
        print(f"{shown(directory)}: completed before, left alone")
        return
    with alone_in(directory) if rank_zero_only.rank == 0 else nullcontext():  # pyright: ignore
        start = starting_point(directory, ckpt, or_anew=skip_completed)
        settings = saved_settings(directory, typed) if start else {"scheduler": None, **settings, "overrides": typed}
        check("", train, settings, known=("directory", "start"))
        try:
            train(directory, start, **settings)
        except Stopped:
            say_how_to_go_on(directory)
            raise


def completed(directory: Path, typed: list[str]) -> bool:
    """Whether the very run that is typed has left its result."""
    if not (directory / "result.json").is_file():
        return False
    before = json.loads((directory / "result.json").read_text())["overrides"]
    if set(before) != set(typed):
        raise UserError(f"run_dir={shown(directory)}: completed with {' '.join(before)}; type that, or another run_dir")
    return True


@rank_zero_only
def say_how_to_go_on(directory: Path) -> None:
    if stopped_at(directory):
        run = shlex.quote(f"run_dir={shown(directory)}")
        print(f"stopped; to go on, type: python -m pixelcnn_lit.train {run} ckpt=last")
    else:
        print("stopped; nothing was saved yet")


def train(
    directory: Path,
    start: Path | None,
    dataset: dict[str, Any],
    sampler: dict[str, Any],  # read by callbacks.samples
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    seed: Annotated[int, Range(0, 2**32 - 1)],
    overrides: list[str],  # as typed, for the table of a sweep
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
    saved = read_start(str(start), density, extras) if start else {}
    compared = {"seed": seed, "dataset": dataset, **model, "trainer": trainer}  # what a sweep varies
    settings = {**compared, "sampler": sampler, "callbacks": callbacks, "overrides": overrides}
    progress = [] if sys.stdout.isatty() else [EpochLine()]
    begun = LambdaCallback(on_train_start=lambda fitter, _: record(fitter, directory, settings))
    always = [Streams(seed), FiniteGuard(), stopwatch, HParams(compared), ScoreAtTheEnd(), begun, *progress]
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
    require_scores(fitter)
    forget_requeued(fitter, directory, but=start)
    fit(fitter, density, data, start)
    forget_requeued(fitter, directory)

    kept = fitter.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or not Path(kept.best_model_path).is_file():
        raise UserError("nothing was trained and validated in this run: type a larger trainer.max_epochs")
    best = load(kept.best_model_path)
    fitter.test(best, data, verbose=False)
    if fitter.is_global_zero:
        result = summary(fitter, kept.best_model_path, best, data, stopwatch) | {"overrides": overrides}
        result["seconds"] = stopwatch.all_seconds
        write_text(directory / "result.json", json.dumps(result, indent=2))
        grids = [callback.draw(fitter, best) for callback in extras if isinstance(callback, SampleGrid)]
        print(closing_lines(result, directory, grids))


def record(fitter: L.Trainer, directory: Path, settings: dict[str, Any]) -> None:
    """The settings, now that all of them have been accepted; a result of before is none of the run that goes on."""
    if fitter.is_global_zero:
        write_text(directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(settings)))
        (directory / "result.json").unlink(missing_ok=True)


def fit(fitter: L.Trainer, density: DensityModel, data: ImageData, start: Path | None) -> None:
    """Raises UserError where a checkpoint's own state, which Lightning restores, is not what it should be."""
    try:
        fitter.fit(density, data, ckpt_path=start, weights_only=True)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if start and not fitter.training:
            raise UserError(f"ckpt={start}: cannot be gone on from ({first_line(error)})") from error
        raise


def forget_requeued(fitter: L.Trainer, directory: Path, but: Path | None = None) -> None:
    """What Lightning saved for Slurm it would take before all others, and even test in the place of the best."""
    if fitter.is_global_zero:
        for path in stopped_at(directory):
            if path != but and path.name.startswith("hpc_ckpt_"):
                path.unlink()


def require_scores(trainer: L.Trainer) -> None:
    """Refuse, before any training, settings under which nothing would be kept as best, or tested."""
    every, epochs, kept = trainer.check_val_every_n_epoch, trainer.max_epochs, trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or kept.monitor not in ("val/nll", "val/bpd"):
        raise UserError("callbacks.best: must keep the weights best on val/nll; type callbacks=default or no_ema")
    if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError("trainer.fast_dev_run: keeps no checkpoint; type trainer.max_steps=1")
    for split in ("val", "test"):
        if not getattr(trainer, f"limit_{split}_batches"):
            raise UserError(f"trainer.limit_{split}_batches=0: every run is validated and tested; type 1.0 or a number")
    if every and epochs is not None and 0 <= epochs < every:
        raise UserError(f"trainer.max_epochs={epochs}: type at least trainer.check_val_every_n_epoch={every}")


def read_start(path: str, density: DensityModel, extras: list[Callback]) -> dict[str, Any]:
    """The checkpoint to go on from, which must be of the same data and model, with as many averages."""
    saved = read_checkpoint(path)
    if not all(saved.get(key) for key in ("loops", "callbacks", "optimizer_states")):
        raise UserError(f"ckpt={path}: weights alone, from which no run can go on; type RUN_DIR/checkpoints/last.ckpt")
    same = (*ImageData.FACTS, "model", "likelihood")
    require_same(path, saved["hyper_parameters"], {key: density.hparams[key] for key in same})
    averaged = any(isinstance(callback, WeightAveraging) for callback in extras)
    if ("averaging_state" in saved) != averaged:
        # Lightning alone would silently go on from the averaged weights, or with none.
        raise UserError(f"ckpt={path}: saved with callbacks={'no_ema' if averaged else 'default'}; type that")
    return saved


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
        "n_params": sum(p.numel() for p in best.parameters()),
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
        f"look at it:      tensorboard --logdir {shown(directory)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
