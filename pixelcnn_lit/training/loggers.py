"""Loggers: scalars, pictures, settings and results of a run, in one or several places at once."""

import csv
import io
import json
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from pixelcnn_lit.config.build import build, resolve
from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.runs.atomic import atomic_write_text
from pixelcnn_lit.runs.run_dir import relative


def with_run_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Return the loggers of a new run, with what a resumed one must find saved to continue the same curves."""
    return {
        name: own | {"id": secrets.token_hex(4)} if _is_wandb(own) and not own.get("id") else own
        for name, own in config.items()
    }


def make_loggers(config: dict[str, Any], directory: Path, step: int | None) -> list[Logger]:
    """Return the loggers of conf/logger, which write into a run's directory. Raises UserError.

    Args:
        step: at which the run is resumed; what it logged after that is dropped.
    """
    return [_make(f"logger.{name}", own, directory, step) for name, own in config.items()]


def _make(where: str, config: dict[str, Any], directory: Path, step: int | None) -> Logger:
    kind = resolve(config.get("_target_"), Logger)
    facts: dict[str, Any] = {"save_dir": str(directory)}
    if kind is TensorBoardLogger:
        facts |= {"name": "", "version": "", "default_hp_metric": False, "purge_step": step}
    if kind is CSVLogger:
        facts |= {"purge_step": step}
    if _is_wandb(config):
        config = config | {"name": config.get("name") or directory.name}
    try:
        logger = build(where, config, Logger, **facts)
        if isinstance(logger, WandbLogger):
            _ = logger.experiment  # refuses a missing key now, where it can be told in a line
    except UserError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise UserError(f"{where}: is not installed; type pip install -e '.[wandb]'") from error
        raise
    except Exception as error:  # those of wandb
        raise UserError(f"{where}: {first_line(error)} (type {where}.offline=true to send nothing)") from error
    return logger


def _is_wandb(config: dict[str, Any]) -> bool:
    return resolve(config.get("_target_"), Logger) is WandbLogger


@rank_zero_only
def log_picture(trainer: L.Trainer, name: str, picture: Tensor) -> None:
    """Show an RGB picture, uint8 [3,H,W], wherever pictures can be shown."""
    for logger in trainer.loggers:
        match logger:
            case TensorBoardLogger():
                logger.experiment.add_image(name, picture, trainer.global_step)
                logger.experiment.flush()
            case WandbLogger():
                logger.log_image(name, [picture.permute(1, 2, 0).numpy()], trainer.global_step)


@rank_zero_only
def log_settings(trainer: L.Trainer, settings: dict[str, int | float | bool | str]) -> None:
    """Show the settings of a run."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Not Lightning's log_hyperparams, which would log a first value of each score. And not the first summary,
            # which names the columns of HPARAMS: without it, those come first whose values differ between runs.
            _, *values = hparams(settings, {})
            writer: Any = logger.experiment._get_file_writer()
            for summary in values:
                writer.add_summary(summary)
        else:
            logger.log_hyperparams(settings)


@rank_zero_only
def log_result(trainer: L.Trainer, result: dict[str, Any]) -> None:
    """Show what a run leaves as result.json."""
    for logger in trainer.loggers:
        match logger:
            case TensorBoardLogger():
                text = json.dumps(result, indent=4)
                logger.experiment.add_text("result", f"    {text}".replace("\n", "\n    "), trainer.global_step)
                logger.experiment.flush()
            case WandbLogger():
                logger.experiment.summary.update(result)


def where_to_look(trainer: L.Trainer) -> list[str]:
    """Return what shows the curves and pictures of a run: a command, a page or a file of each logger."""
    places = []
    for logger in trainer.loggers:
        match logger:
            case TensorBoardLogger():
                places.append(shlex.join(["tensorboard", "--logdir", relative(logger.save_dir)]))
            case CSVLogger():
                places.append(relative(logger.path))
            case WandbLogger():
                kept = str(Path(logger.experiment.dir).parent)
                sync = shlex.join(["wandb", "sync", relative(kept)])
                places.append(sync if logger.experiment.offline else logger.experiment.url)
    return places


def close_loggers(loggers: Sequence[Logger]) -> None:
    """End what outlives a run: W&B would take the next job of a sweep for the same one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]
            logger.experiment.finish()


class CSVLogger(Logger):
    """Scalars in metrics.csv, a row a logged step.

    Lightning's own deletes the file when a run is resumed, and rewrites it in place whenever a column is new.

    Args:
        purge_step: at which a run is resumed; rows of that step and later ones are dropped.
    """

    def __init__(self, save_dir: str, purge_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.purge_step = purge_step
        self.columns: list[str] = []  # of the file, once it is read or written
        self.last_kept: list[dict[str, str]] = []  # rows of the last step before that of `purge_step`

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    def experiment(self) -> Path:
        return self.path

    @rank_zero_only
    def log_hyperparams(self, params: object) -> None:
        """Do nothing: config.yaml lies beside it."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self.columns:
            self._continue()
        row = {"step": str(step)} | {name: str(float(value)) for name, value in metrics.items()}
        if any(row.items() <= kept.items() for kept in self.last_kept):
            return  # resumed where an epoch was over, Lightning logs its figures once more
        columns = list(dict.fromkeys([*self.columns, *row]))
        if columns == self.columns:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
        else:
            self._rewrite(columns, [*_rows(self.path), row])

    def _continue(self) -> None:
        """Begin the file with what an earlier part of the run has logged up to where it is resumed."""
        before = [] if self.purge_step is None else _rows(self.path)
        # What was written as the program was killed may end inside a row.
        kept = [row for row in before if row["step"].isdigit() and int(row["step"]) < (self.purge_step or 0)]
        self.last_kept = [row for row in kept if row["step"] == kept[-1]["step"]]
        self._rewrite(list(kept[0]) if kept else ["step"], kept)

    def _rewrite(self, columns: list[str], rows: Sequence[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.path, text.getvalue().rstrip())
        self.columns = columns


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
