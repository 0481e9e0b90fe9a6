"""Saved runs: which is resumed, from where, and with which settings."""

import contextlib
import errno
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from omegaconf import MISSING, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pixelcnn_lit.config.errors import UserError, first_line
from pixelcnn_lit.runs.places import CONF, WEIGHTS
from pixelcnn_lit.runs.run_dir import expanded, new_dir, relative, typed

CONFIG = "config.yaml"  # beside the checkpoints: all settings of the run
NOT_SAVED = (
    "run_dir",
    "run_name",
    "ckpt",
    "skip_completed",
    "debug",
)  # are typed for one command, and are no settings of the run
# Settings that runs of earlier releases did not have.
SINCE_0_1_0 = {"logger": {"tensorboard": {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}}}
# The loggers, and those of their settings, that are taken from a file, which may be untrusted: none writes elsewhere or
# sends what a run logs to somebody else's account.
LOGGERS = {
    "lightning.pytorch.loggers.TensorBoardLogger": set(),
    "pixelcnn_lit.training.loggers.CSVLogger": set(),
    "lightning.pytorch.loggers.WandbLogger": {"project", "name", "id", "offline", "tags"},
}
DATASET_GROUPS = ("dataset", "experiment")  # groups whose choice decides which dataset it is
PLACES = ("dataset.root", "dataset.path")
MAY_CHANGE_ON_RESUME = ("trainer.", "callbacks.", *PLACES, "threads")
TOP_K = "callbacks.best.save_top_k"  # but this one


def run_of(ckpt: str | None, parent: str, name: str | None) -> str:
    """Return the directory of the run that a checkpoint belongs to; without one, of this or a new name in `parent`."""
    if name is not None and ckpt in (None, "last"):
        return f"{parent}/{name}"
    if ckpt is None:
        return new_dir(parent)
    if ckpt == "last":
        raise UserError("ckpt=last: of which run? type run_dir=DIRECTORY or run_name=NAME too")
    path = Path(expanded(str(ckpt)))
    directory = _directory_of(path)
    if not path.exists() or not (directory / CONFIG).is_file():
        raise UserError(
            f"ckpt={ckpt}: no run, and no checkpoint of one; type RUN_DIR, or RUN_DIR/checkpoints/last.ckpt "
            f"(init={ckpt} starts from trained weights)"
        )
    return str(directory)


OmegaConf.register_new_resolver("run_of", run_of, use_cache=True, replace=True)


def checkpoint_file(ckpt: str, setting: str = "ckpt") -> Path:
    """Return the file that `ckpt` names: a path, the name of weights that the package ships with, or a run's directory.

    Of a run it is the checkpoint best on validation. Raises UserError where there is no such file.
    """
    pretrained = {file.stem: file for file in WEIGHTS.glob("*.safetensors") if setting != "classifier_ckpt"}
    known = ", ".join(["the path of a .ckpt or .safetensors, a RUN_DIR", *sorted(pretrained)])
    if ckpt == MISSING:
        raise UserError(f"{setting} is missing; type {setting}= and {known}")
    path = pretrained.get(ckpt, Path(ckpt))
    best = path / "checkpoints" / "best.ckpt"
    if path.is_file() or best.is_file():
        return path if path.is_file() else best
    wrong = "no checkpoints/best.ckpt in it" if path.is_dir() else "no such file"
    run = Path("runs", "train_classifier" if setting == "classifier_ckpt" else "train", ckpt)
    named = [str(run)] if run.is_dir() and not path.exists() else []
    near = "".join(f"did you mean {name}? " for name in named or get_close_matches(ckpt, pretrained, n=1))
    raise UserError(f"{setting}={ckpt}: {wrong}; {near}type {known}")


def _directory_of(path: Path) -> Path:
    """Return the directory of a run, of which the path is that directory or a checkpoint."""
    return path if path.is_dir() else path.parent.parent


def data_places(ckpt: str) -> dict[str, str]:
    """Return dataset.root and dataset.path of a checkpoint's run, whose data may have moved since it was written."""
    dataset = _config_of(_directory_of(checkpoint_file(ckpt).absolute())).get("dataset")
    places = dataset if isinstance(dataset, dict) else {}
    return {key: places[key] for key in ("root", "path") if isinstance(places.get(key), str)}


def _config_of(directory: Path) -> dict[Any, Any]:
    """Return the settings in a run's directory as they stand there; none where it is no run, or a damaged one."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(directory / CONFIG), resolve=False)
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError, RecursionError, OmegaConfBaseException, YAMLError):
        return {}


def with_dataset_of_run(words: Sequence[str]) -> list[str]:
    """Return what was typed, and what chose the dataset of the run that is resumed if only the data's place is typed.

    The run may be somebody else's: a choice is one of conf/, and nothing that leads out of it.
    """
    given = {key: value.strip("'\"") for key, _, value in (word.partition("=") for word in words)}
    moved = "ckpt" in given and not given.keys().isdisjoint(PLACES) and given.keys().isdisjoint(DATASET_GROUPS)
    if not moved:
        return list(words)
    run = Path(expanded(given.get("run_dir") or given["ckpt"]))
    overrides = _config_of(_directory_of(run)).get("overrides")
    saved = overrides if isinstance(overrides, list) else []
    choices = [re.fullmatch(rf"\+?({'|'.join(DATASET_GROUPS)})=([\w/]+)", str(word)) for word in saved]
    known = [choice[0] for choice in choices if choice and (CONF / choice[1] / f"{choice[2]}.yaml").is_file()]
    place = next(n for n, word in enumerate(words) if word.startswith("ckpt="))
    return [*words[:place], *known, *words[place:]]


def last_checkpoint(directory: Path, before: int = 0) -> Path:
    """Return where the last checkpoint of a run is, or the one that was the last so many times before."""
    return directory / "checkpoints" / (f"last-{before}.ckpt" if before else "last.ckpt")


def last_whole_checkpoint(directory: Path) -> Path | None:
    """Return the last of a run's checkpoints that is no torn file, as delayed writes of a network's disk leave them.

    If there is none, that is the last of all, which will be refused; None where there never was one.
    """
    kept = [last_checkpoint(directory)]
    while (before := last_checkpoint(directory, len(kept))).is_file():
        kept.append(before)
    kept = [path for path in kept if path.is_file()]
    return next((path for path in kept if not damage(path)), kept[0] if kept else None)


def damage(path: Path) -> str:
    """Return what is wrong with a .ckpt, which is a zip archive with checksums; nothing where it is whole.

    Raises OSError where it cannot be read, which says nothing of it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                return "it is compressed, as no checkpoint is"  # and might unpack to any size
            damaged = archive.testzip()
    except MemoryError:
        raise
    except OSError as error:
        if error.errno == errno.ENOENT:
            return "is not there"
        if error.errno != errno.EINVAL:  # which a seek to where a torn archive points ends in
            raise
        return first_line(error)
    except Exception as error:  # zip names its troubles in a dozen classes
        return first_line(error)
    return f"bad checksum in {damaged}" if damaged else ""


def find_resume_checkpoint(directory: Path, ckpt: str | None, or_anew: bool) -> Path | None:
    """Return the checkpoint to resume from in `directory`, or None to start; `or_anew` takes what there is."""
    last = last_whole_checkpoint(directory)
    for requeued in directory.glob("hpc_ckpt_*"):  # Lightning would take it before all others, and check nothing
        raise UserError(f"{relative(requeued)}: none of this program's; remove it")
    if ckpt not in (None, "last"):
        path = Path(ckpt)
        if not path.exists():
            raise UserError(f"ckpt={ckpt}: no such file; type ckpt=last")
        if _directory_of(path.absolute()).resolve() != directory.resolve():
            raise UserError(f"ckpt={ckpt}: of another run; leave out run_dir, or type ckpt=last")
        if path.is_file():
            return path
    if last and (ckpt or or_anew or "SLURM_RESTART_COUNT" in os.environ):
        return last
    if ckpt:
        raise UserError(f"run_dir={relative(directory)}: nothing was saved there yet; {_run_meant(directory)}")
    if last:
        other = "another run_dir or run_name"
        raise UserError(f"run_dir={relative(directory)}: holds a run; type ckpt=last to resume, or {other}")
    return None


def _run_meant(directory: Path) -> str:
    """Say which run beside it may be meant by a directory without one."""
    runs = {run.name for run in directory.parent.glob("*") if last_checkpoint(run).is_file()}
    near = "".join(
        f"did you mean run_dir={relative(directory.parent / name)}? "
        for name in get_close_matches(directory.name, runs, n=1)
    )
    return f"{near}to start a new run, leave out ckpt"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """No other process trains in the directory meanwhile. The lock of a process that dies is gone with it."""
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"run_dir={relative(directory)}: another process trains there; type another run_dir") from None
    except (NotImplementedError, OSError):
        pass  # a filesystem without locks
    try:
        yield
    finally:
        lock.release()


def typed_settings() -> list[str]:
    """Return what was typed that is a setting of the run."""
    parsed = OverridesParser.create().parse_overrides(typed())
    return [text for text, o in zip(typed(), parsed, strict=True) if o.key_or_group not in NOT_SAVED]


def saved_settings(directory: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Return the settings saved in a run's directory, with the `changes` typed of what MAY_CHANGE_ON_RESUME.

    What an override changes is told by composing conf/ with it and without. Raises UserError if it changes more.
    """
    path = directory / CONFIG
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        saved: dict[str, Any] = SINCE_0_1_0 | found
        before = _composed(saved["overrides"]) if changes else {}
        assert isinstance(saved["callbacks"], dict)
        assert isinstance(saved["logger"], dict)
    except MissingConfigException as error:
        raise UserError(
            f"{path}: the run began with {error.missing_cfg_file}, which is not in conf/; type its --config-dir, too"
        ) from error
    except Exception as error:  # yaml and an untrusted contents have many
        raise UserError(
            f"{path}: damaged or not of this program ({first_line(error)}); it holds the settings"
        ) from error
    for name, callback in saved["callbacks"].items():
        for key, value in callback.items() if isinstance(callback, dict) else ():
            if value and ("path" in key or "dir" in key or (key == "filename" and "/" in str(value))):
                raise UserError(f"{path}: callbacks.{name} would write elsewhere; remove its {key}")
    saved["logger"] = _loggers(path, saved["logger"], changes)
    if changes:
        both = [*saved["overrides"], *changes]
        saved = _changed(saved, before, _composed(both), _composed(both, resolve=True))
        earlier = [override for override in saved["overrides"] if override not in changes]
        saved["overrides"] = [*earlier, *changes]  # of one key the last counts
    return saved


def _loggers(path: Path, saved: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return the loggers of a resumed run: those typed among the `changes`, if any, or those saved in `path`.

    Raises UserError where settings that LOGGERS does not list are saved, and not typed again.
    """
    typed = [change for change in changes if change.lstrip("+~").partition("=")[0].partition(".")[0] == "logger"]
    if typed:
        known = [name for name in saved if (CONF / "logger" / f"{name}.yaml").is_file()]
        now = _composed([f"logger=[{','.join(known) or 'none'}]", *typed], resolve=True)["logger"]
        kept = {name: own["id"] for name, own in saved.items() if isinstance(own, dict) and own.get("id")}
        return {name: own | {"id": kept[name]} if name in kept else own for name, own in now.items()}
    for name, own in saved.items():
        target = own.get("_target_") if isinstance(own, dict) else None
        if target not in LOGGERS or not own.keys() <= LOGGERS[target] | {"_target_"}:
            raise UserError(f"{path}: logger.{name} has settings that are taken from no file; type logger=... again")
    return saved


def _composed(overrides: list[str], resolve: bool = False) -> dict[str, Any]:
    composed = compose(str(HydraConfig.get().job.config_name), overrides)
    with open_dict(composed):
        for key in composed.keys() & set(NOT_SAVED):
            del composed[key]
    settings: Any = OmegaConf.to_container(composed, resolve=resolve)
    return {"scheduler": None, **settings}


def _changed(
    saved: dict[str, Any], before: dict[str, Any], after: dict[str, Any], resolved: dict[str, Any]
) -> dict[str, Any]:
    """Return `saved` with what differs between `before` and `after` as it is when `resolved`."""
    logger = saved["logger"]  # which is as it was typed
    kept, old, new, values = (flat({**config, "logger": {}}) for config in (saved, before, after, resolved))
    for key in sorted({**old, **new}, key=lambda key: not key.endswith("_target_")):  # another choice first
        if key in old and key in new and old[key] == new[key]:
            continue
        if key == TOP_K:  # Lightning would compare what comes with those that it has been told to keep
            raise UserError(f"{key} is {old.get(key)} in the run and {new.get(key)} here; it cannot be changed later")
        if not key.startswith(MAY_CHANGE_ON_RESUME):
            raise UserError(
                f"{key} is {old.get(key)} in the run and {new.get(key)} here; only trainer.*, callbacks.*, "
                "logger, threads and the place of the data may be changed when a run is resumed"
            )
        kept = {name: value for name, value in kept.items() if not _is_in(name, key)}
        kept |= {name: value for name, value in values.items() if _is_in(name, key) and key in new}
    return _nested(kept) | {"logger": logger}


def _is_in(name: str, key: str) -> bool:
    """Return whether a flat key is `key`, or lies inside it, as settings do that an interpolation brought."""
    return name == key or name.startswith(f"{key}.")


def flat(config: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty group stays a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{inside}{key}.")
        else:
            found[f"{inside}{key}"] = value
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return nested
