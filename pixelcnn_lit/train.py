"""Train a density model, score it once on the test set with the weights best on validation, and say where all is."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from pixelcnn_lit.build import check
from pixelcnn_lit.callbacks import EpochLine, HParams, SampleGrid, ScoreAtTheEnd, Stopwatch
from pixelcnn_lit.command import command, run_dir
from pixelcnn_lit.data.module import ImageData, image_data, uniform_bpd
from pixelcnn_lit.lit import DensityModel, bits, load, read_checkpoint, require_same_data
from pixelcnn_lit.machine import make_trainer


@command("train")
def main(cfg: DictConfig) -> None:
    began = time.perf_counter()
    directory = run_dir()
    OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
    data = image_data(config["dataset"], config["seed"])
    L.seed_everything(config["seed"], workers=True, verbose=False)
    data.setup()
    model = density_model(config, data)
    callbacks: list[Callback] = [hydra.utils.instantiate(c) for c in cfg.callbacks.values()]
    stopwatch = Stopwatch()
    progress = [] if sys.stdout.isatty() else [EpochLine()]
    trainer = make_trainer(
        config["trainer"],
        callbacks=[*callbacks, stopwatch, HParams(), ScoreAtTheEnd(), *progress],
        logger=TensorBoardLogger(directory, name="", version="", default_hp_metric=False),
        default_root_dir=directory,
    )
    trainer.fit(model, data, ckpt_path=resume_from(config["ckpt"], data, directory))

    best = load(trainer.checkpoint_callback.best_model_path)
    trainer.test(best, data, verbose=False)
    if trainer.is_global_zero:
        result = summary(trainer, best, data, stopwatch) | {"seconds": time.perf_counter() - began}
        (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        print(closing_lines(result, directory, next((c for c in callbacks if isinstance(c, SampleGrid)), None)))


def density_model(config: dict[str, Any], data: ImageData) -> DensityModel:
    """The model of a config on the facts of the data."""
    parts = ("model", "likelihood", "dataset", "optimizer", "scheduler", "label_dropout", "channels_last", "compile")
    settings = {part: config[part] for part in parts}
    facts = {**data.facts, "label": data.label}
    check("", DensityModel, settings, known=facts)
    return DensityModel(**facts, **settings)


def resume_from(ckpt: str | None, data: ImageData, directory: Path) -> str | None:
    """The checkpoint to go on from, which must be of the same data; `last` is this run directory's own."""
    if ckpt is None:
        return None
    path = str(directory / "checkpoints" / "last.ckpt") if ckpt == "last" else ckpt
    require_same_data(path, read_checkpoint(path).get("hyper_parameters", {}), data.facts)
    return path


def summary(trainer: L.Trainer, best: DensityModel, data: ImageData, stopwatch: Stopwatch) -> dict[str, Any]:
    """What result.json holds: figures are of the weights best on validation."""
    checkpoint = trainer.checkpoint_callback
    val_nll = float(checkpoint.best_model_score)
    return {
        "label": data.label,
        "val/nll": val_nll,
        "val/bpd": bits(val_nll),
        **{key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")},
        "test/bpd_per_class": dict(zip(data.class_names, best.bpd_per_class, strict=True)),
        "uniform_bpd": uniform_bpd(data.levels),
        "n_params": sum(p.numel() for p in best.parameters()),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "images_per_second": stopwatch.images_per_second,
        "precision": trainer.precision,
        "checkpoint": checkpoint.best_model_path,
        "overrides": list(HydraConfig.get().overrides.task),
    }


def closing_lines(result: dict[str, Any], directory: Path, samples: SampleGrid | None) -> str:
    nats = f" ({result['test/nats_per_image']:.2f} nats an image)" if "test/nats_per_image" in result else ""
    lines = [
        f"{result['label']}: val {result['val/bpd']:.4f}, test {result['test/bpd']:.4f} bpd{nats}"
        f" (a uniform model: {result['uniform_bpd']:.4f})",
        f"{result['n_params']:,} parameters, {result['images_per_second']:.0f} training images/s, "
        f"{result['seconds']:.0f} s in all",
        f"best checkpoint: {result['checkpoint']}",
        f"sample grid:     {samples.path}" if samples and samples.path else "",
        f"look at it:      tensorboard --logdir {directory}",
    ]
    return "\n".join(filter(None, lines))


if __name__ == "__main__":
    main()
