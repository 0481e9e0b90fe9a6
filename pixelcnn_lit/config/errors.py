"""A user's mistake becomes one line that says what to type."""

import difflib
import errno
import re
import shlex
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from pixelcnn_lit.config.quoting import quoted, read

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake the user can mend; its text is the one line to show, whatever a damaged file put into it."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


def printable(text: str) -> str:
    """A text as one line, with a space for each control character."""
    return "".join(c if c.isprintable() else " " for c in text)


def suggest(word: str, words: Iterable[str]) -> str:
    """The hint that follows an unknown word: the nearest known one, and all of them."""
    known = sorted(words)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"did you mean {near[0]}? " if near else "") + "choose from: " + ", ".join(known)


def meant(key: str, settings: Mapping[str, Any]) -> list[str]:
    """Those of all `settings` that may be meant by an unknown key.

    Where its group is right, a setting of another one must have the very name that it has there.
    """
    group, _, last = key.rpartition(".")
    inside = _group(group, settings)
    likeness = {
        name: _likeness(key, name)
        for name in _names(settings, nested="." in key)
        if inside is None
        or name.startswith(f"{group}.")
        or (name.rpartition(".")[2] == last and _group(name, settings) is None)
    }
    nearest = max(likeness.values(), default=(0.0, 0.0))
    return [name for name, own in likeness.items() if own == nearest >= (0.7, 0.0)]


def _group(key: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what is set in a group, which may lie inside others; None if there is no such group."""
    found: object = settings
    for part in key.split(".") if key else ():
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if key and isinstance(found, Mapping) else None


def _names(settings: Mapping[str, Any], nested: bool, inside: str = "") -> Iterator[str]:
    """The groups, those that are `nested` in others if wanted, and all that is set in them, with dots."""
    for key, value in settings.items():
        group = isinstance(value, Mapping)
        if nested or not (group and inside):
            yield inside + key
        if group:
            yield from _names(value, nested, f"{inside}{key}.")


def _likeness(key: str, name: str) -> tuple[float, float]:
    """Return how like two settings are: their last parts, which people remember, and of those alike the whole."""
    last, name_last = (dotted.rpartition(".")[2] for dotted in (key, name))
    return _ratio(last, name_last), _ratio(key, name) if "." in key else 0.0


def _ratio(a: str, b: str) -> float:
    if a in (b, _initials(b)) or b == _initials(a):
        return 1.0
    return difflib.SequenceMatcher(None, a, b).ratio()


def _initials(name: str) -> str:
    """learning_rate -> lr."""
    return "".join(word[:1] for word in name.split("_"))


def first_line(error: BaseException) -> str:
    """An error of other people's code, short enough to stand inside a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def explain(error: BaseException | None, settings: Callable[[], Mapping[str, Any]] = dict) -> str | None:
    """One line for an error that the user can mend, or None for a fault of the program.

    `settings()` are all of the command, among which one may be meant that was typed wrong.
    """
    match error:
        case UserError():
            return str(error)
        case MissingConfigException():
            return _missing_config(error)
        case InstantiationException() if isinstance(error.__cause__, UserError):
            return str(error.__cause__)
        case InterpolationResolutionError() if line := explain(_first(error)):
            return line
        case MissingMandatoryValue():
            key = error.full_key or str(error).rpartition(" ")[2]  # in an interpolation it is named by the text alone
            return f"{key} is missing; type {key}=..."
        case InterpolationKeyError():
            return f"{first_line(error)}; where ${{ stands for itself, type \\${{ in quotes"
        case OverrideParseException():
            return _not_an_override(error.override, settings())
        case ConfigCompositionException() if unknown := re.match(_UNKNOWN, str(error)):
            return _no_such_setting(unknown["key"], settings())
        case ConfigCompositionException() if sweep := re.match(_SWEEP, str(error), re.DOTALL):
            return _not_one_value(sweep)
        case ConfigCompositionException() | InstantiationException() | OmegaConfBaseException():
            return " ".join(str(error).split())
        case Exception() if _is(error, "MisconfigurationException"):
            return " ".join(str(error).split())
        case ValueError() if str(error).startswith("Only one of --"):  # Hydra's, of its options
            return f"{first_line(error)}; type one of them"
        case ValueError() if str(error).startswith("Config group override"):
            return "a choice cannot be null; leave it out with ~NAME, for example ~scheduler"
        case Exception() if _is(error, "OutOfMemoryError"):
            return "the device ran out of memory; type a smaller batch_size (of dataset or sampler) or model_size"
        case MemoryError():
            return _NO_MEMORY
        case RuntimeError() if "can't allocate memory" in str(error):  # torch's, on a CPU
            return _NO_MEMORY
        case Exception() if _is(error, "InductorError") and "InvalidCxxCompiler" in str(error):
            return "compile=true: there is no C++ compiler here; install one, as g++, or type compile=false"
        case RuntimeError() if 'Could not detect "srun"' in str(error):  # submitit's
            return "hydra/launcher=submitit_slurm: there is no srun here; type it on a machine of the cluster"
        case RuntimeError() if re.search(_GONE, str(error)):
            return f"another process of the run has ended ({first_line(error)}); resume with its run_dir and ckpt=last"
        case OSError() if error.errno in DISK_FULL:
            return f"{error.filename or 'the directory of the run'}: the disk is full; make room"
        case OSError() if error.filename:
            return f"{error.filename}: {error.strerror}"
        case Exception() if _raised_by_lightning(error):
            return f"{first_line(error)} (a setting of trainer.* or callbacks.*)"
    return None


# As gloo and NCCL say it.
_GONE = r"gloo.*(Connection (closed|reset) by peer|Broken pipe)|remote process (has )?exited"

_NO_MEMORY = (
    "out of memory; type a smaller batch_size (of dataset or sampler) or model_size; if the images are too many, see "
    "dataset=arrays"
)


def _is(error: BaseException, name: str) -> bool:
    """Return whether its class is one of torch or Lightning so named, which are not imported to ask."""
    return any(c.__name__ == name and c.__module__.startswith(("torch", "lightning")) for c in type(error).__mro__)


def _raised_by_lightning(error: BaseException) -> bool:
    """Return whether Lightning itself refuses: it has no error class of its own for a wrong setting."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").startswith("lightning.")


def _first(error: BaseException) -> BaseException | None:
    """Return what OmegaConf's error was raised about, which it keeps as its context alone."""
    while error.__context__:
        error = error.__context__
    return None if isinstance(error, InterpolationResolutionError) else error


def group_and_choice(error: MissingConfigException) -> tuple[str, str]:
    """Return the group of conf/, or of Hydra, in which a config is missing, and its name, with the folder inside it."""
    path = error.missing_cfg_file or ""
    group, _, choice = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    return group, choice


def _missing_config(error: MissingConfigException) -> str:
    group, choice = group_and_choice(error)
    plugins = "; others are plugins: see pixelcnn_lit/training/README.md" if group.startswith("hydra/") else ""
    return f"{group}={choice}: there is no such {group}; {suggest(choice, error.options or [])}{plugins}"


_UNKNOWN = r"(Could not override|Could not delete from config\.) '(?P<key>(?!hydra\b)[^'@]+)'"


def _no_such_setting(key: str, settings: Mapping[str, Any]) -> str:
    if likely := meant(key, settings):
        return f"{key}: there is no such setting; did you mean {' or '.join(likely)}?"
    group, _, last = key.rpartition(".")
    if key in ("dataset.path", "dataset.root"):
        return f"{key}: this dataset has no such setting; type dataset=NAME, too, that of a run that is resumed as well"
    inside = _group(group, settings)
    if inside is None:
        return f"{key}: there is no such setting; {suggest(last, settings)}"
    more = f"; if its _target_ has it, type +{key}=..." if "_target_" in inside else ""
    return f"{key}: there is no such setting; {suggest(last, inside)}{more}"


def _not_an_override(override: str, settings: Mapping[str, Any]) -> str:
    key, sign, value = override.partition("=")
    if not sign:
        likely = [f"{name}=..." for name in meant(key, settings)]
        return f"{override}: not an override; type {' or '.join(likely) or 'key=value'}, without spaces"
    if value.endswith(",") or (value.startswith("[") and not value.endswith("]")):
        example = f"{key}=[a,b]" if value.startswith("[") else f"{key}=a,b"
        ways = f"{example} without spaces, or {_in_quotes(key, value)} for one text"
        return printable(f"{override}: ends too soon for a list; type {ways}")
    if read(f"{key}={quoted(value)}") != value:
        return f"{override}: not an override; type key=value"
    if value[:1] + value[-1:] in ("[]", "{}"):
        example = shlex.quote(f"{key}=[{quoted('a=b')}]")
        return printable(f"{override}: cannot be read; type the texts in it in quotes, as in {example}")
    return printable(f"{override}: cannot be read without quotes; type {_in_quotes(key, value)}")


_SWEEP = (
    r"(?P<list>Ambiguous value for argument|Sweep parameters) '(?P<override>.*?)'(\n1\. To use| requires --multirun)"
)


def _not_one_value(sweep: re.Match[str]) -> str:
    override = sweep["override"]
    key, _, value = override.partition("=")
    ways = [f"{key}=[{value}] for a list"] if sweep["list"].startswith("Ambiguous") else []
    ways += [f"{_in_quotes(key, value)} for one text", "-m too for a sweep"]
    return printable(f"{override}: is it several values? type {', '.join(ways)}")


def _in_quotes(key: str, text: str) -> str:
    """A setting as it is typed into a shell, its value in quotes for Hydra, too."""
    return shlex.quote(f"{key}={quoted(text)}")
