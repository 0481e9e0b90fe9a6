"""A user's mistake becomes one line that says what to type."""

import difflib
import errno
import traceback
from collections.abc import Iterable

from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)


class UserError(Exception):
    """A mistake the user can mend; its text is the one line to show, whatever a damaged file put into it."""

    def __init__(self, text: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in text))


def closest(word: str, words: Iterable[str]) -> str:
    """The hint that follows an unknown word: the nearest known one, and all of them."""
    known = sorted(words)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {near[0]}? " if near else "") + "choose from: " + ", ".join(known)


def first_line(error: BaseException) -> str:
    """An error of other people's code, short enough to stand inside a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def explain(error: BaseException | None) -> str | None:
    """One line for an error that the user can mend, or None for a fault of the program."""
    match error:
        case UserError():
            return str(error)
        case MissingConfigException():
            return _missing_config(error)
        case ConfigCompositionException() if isinstance(error.__cause__, (ConfigKeyError, ConfigAttributeError)):
            return _unknown_key(error.__cause__)
        case InstantiationException() if isinstance(error.__cause__, UserError):
            return str(error.__cause__)
        case InterpolationResolutionError() if line := explain(_first(error)):
            return line
        case MissingMandatoryValue():
            return f"{error.full_key} is missing; type {error.full_key}=..."
        case OverrideParseException():
            return f"{error.override}: not an override; type key=value"
        case ConfigCompositionException() | InstantiationException() | OmegaConfBaseException():
            return " ".join(str(error).split())
        case Exception() if _is(error, "MisconfigurationException"):
            return " ".join(str(error).split())
        case ValueError() if str(error).startswith("Config group override"):
            return "a choice cannot be null; leave it out with ~NAME, for example ~scheduler"
        case Exception() if _is(error, "OutOfMemoryError"):
            return "the device ran out of memory; type a smaller batch_size (of dataset or sampler) or model_size"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.filename or 'the directory of the run'}: the disk is full; make room"
        case OSError() if error.filename:
            return f"{error.filename}: {error.strerror}"
        case Exception() if _raised_by_lightning(error):
            return f"{first_line(error)} (a setting of trainer.* or callbacks.*)"
    return None


def _is(error: BaseException, name: str) -> bool:
    """Whether its class is one of torch or Lightning so named, which are not imported to ask."""
    return any(c.__name__ == name and c.__module__.startswith(("torch", "lightning")) for c in type(error).__mro__)


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself refuses: it has no error class of its own for a wrong setting."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith("lightning.")


def _first(error: BaseException) -> BaseException | None:
    """What OmegaConf's error was raised about, which it keeps as its context alone."""
    while error.__context__:
        error = error.__context__
    return None if isinstance(error, InterpolationResolutionError) else error


def _missing_config(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    return f"{group}={choice}: there is no such {group}; {closest(choice, error.options or [])}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    siblings = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
    return f"{error.full_key}: there is no such setting; {closest(str(error.key), siblings)}"
