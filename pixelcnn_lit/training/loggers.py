"""Loggers: scalars, pictures, settings and results of a run, in one or several places at once."""

import csv
import inspect
import io
import json
import secrets
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
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
        name: own | {"id": secrets.token_hex(4)} if _kind(name, own) is WandbLogger and not own.get("id") else own
        for name, own in config.items()
    }


def open_loggers(config: dict[str, Any], directory: Path, step: int | None, closing: ExitStack) -> list[Logger]:
    """Return the loggers of conf/logger, which write into a run's directory, and are closed with it. Raises UserError.

    Args:
        step: at which the run is resumed; TensorBoard and CSV drop what was logged after it.
    """
    loggers = []
    for name, own in config.items():
        loggers.append(_open(name, own, directory, step))
        closing.push(partial(_close, loggers[-1]))
    return loggers


def _kind(name: str, config: object) -> Callable[..., Any]:
    """Return the class of a logger. Raises UserError where its settings name none."""
    if not isinstance(config, dict) or not isinstance(config.get("_target_"), str):
        raise UserError(f"logger.{name}: must be settings with a _target_; leave it out")
    return resolve(config["_target_"], Logger)


def _open(name: str, config: dict[str, Any], directory: Path, step: int | None) -> Logger:
    where, kind = f"logger.{name}", _kind(name, config)
    facts: dict[str, Any] = {"save_dir": str(directory)} if "save_dir" in inspect.signature(kind).parameters else {}
    if kind is TensorBoardLogger:
        facts |= {"name": "", "version": "", "default_hp_metric": False, "purge_step": step}
    if kind is CSVLogger:
        facts |= {"purge_step": step}
    if kind is WandbLogger:
        facts |= {"settings": {"quiet": True}}
        config = config | {"name": config.get("name") or directory.name}
    try:
        logger = build(where, config, Logger, **facts)
        if kind is WandbLogger:
            _ = logger.experiment  # refuses a missing key now, where it can be told in a line
    except UserError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            package = "-e '.[wandb]'" if kind is WandbLogger else "what it requires"
            raise UserError(f"{where}: {first_line(error.__cause__)}; type pip install {package}") from error
        raise
    except Exception as error:
        if kind is not WandbLogger:
            raise
        raise UserError(f"{where}: {first_line(error)} (type {where}.offline=true to send nothing)") from error
    return logger


def _close(logger: Logger, *error: object) -> None:
    """End what outlives a run; W&B would take the next job of a sweep for the same one. `error`: as of __exit__."""
    if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]
        logger.finalize("failed" if error[0] else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=1 if error[0] else 0)


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


class CSVLogger(Logger):
    """Scalars in metrics.csv, a row for each time that something is logged.

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
    """Return the rows of a file that are whole."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a kill may have left a part of a row
    return list(csv.DictReader(whole.splitlines()))
