"""From plain values to objects: find a `_target_`, check its values against its own annotations, call it.

Targets come from yaml files and from checkpoints, and a checkpoint may be untrusted. So a target is never
merely imported: it must be *defined* in one of HOMES, or in a package that the user trusts, and be of the kind the
caller asks for.
"""

import contextlib
import importlib
import inspect
import os
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints

from pixelcnn_lit.config.errors import UserError, first_line, suggest
from pixelcnn_lit.config.schema import describe, matches

HOMES = ("pixelcnn_lit.", "torch.optim.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")
TRUST = "PIXELCNN_LIT_TRUST"  # an environment variable: packages of the user's own, with commas between


def resolve(target: object, kind: type) -> Callable[..., Any]:
    """Return the class `target` if it subclasses `kind`, or the function if it is annotated to return one.

    Raises UserError for anything else, in particular for a name that merely can be reached through our modules
    (`torch.optim.adam.torch.os.system`).
    """
    module, _, name = str(target).rpartition(".")
    homes = *HOMES, *trusted()
    refusal = f"_target_={target}: not a {kind.__name__} of {' or '.join(home.rstrip('.') for home in homes)}"
    if not str(target).startswith(homes):
        raise UserError(f"{refusal}; to trust a package of your own, put {TRUST}=PACKAGE into the environment")
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        cause = f" ({first_line(error)}; is it on PYTHONPATH?)" if str(target).startswith(trusted()) else ""
        raise UserError(refusal + cause) from None
    found = getattr(home, name, None)
    known = [key for key, value in vars(home).items() if _is_of(kind, value)] if found is None else []
    if known:
        raise UserError(f"_target_={target}: there is no {name} in {module}; {suggest(name, known)}")
    if found is None or found is kind or not f"{getattr(found, '__module__', '')}.".startswith(homes):
        raise UserError(refusal)
    if not _is_of(kind, found):
        raise UserError(refusal)
    return found


def trusted() -> tuple[str, ...]:
    """Return the packages of the user's own that a file may name, with a dot behind each."""
    return tuple(f"{package.strip()}." for package in os.environ.get(TRUST, "").split(",") if package.strip())


def _is_of(kind: type, found: object) -> bool:
    """Return whether it is a subclass of `kind`, or a function that is annotated to return one."""
    if inspect.isclass(found):
        return issubclass(found, kind)
    return inspect.isfunction(found) and hints_of(found).get("return") is kind


def build(where: str, config: Mapping[str, Any], kind: type, **facts: object) -> Any:
    """Call `config["_target_"]` with the other values of `config`, checked, and with `facts`, which the program knows.

    `where` is the config group, for the messages ("model.n_residual=-1: ...").
    """
    target, values = inspect_config(where, config, kind, facts)
    try:
        return target(**facts, **values)
    except UserError:
        raise
    except Exception as error:
        if f"{target.__module__}.".startswith((HOMES[0], *trusted())) and not isinstance(error, ValueError):
            raise  # a fault of the program; a library has many words for a value that it does not take
        raise UserError(f"{where}: {error}") from error


def inspect_config(
    where: str, config: Mapping[str, Any], kind: type, known: Collection[str]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The target of a config and its checked values, before all that is `known` only later is at hand."""
    if not isinstance(config, Mapping) or not isinstance(config.get("_target_"), str):
        raise UserError(f"{where}: must be settings with a _target_; leave it out with ~{where}, or choose another")
    target = resolve(config["_target_"], kind)
    values = {key: value for key, value in config.items() if key != "_target_"}
    check(where, target, values, known)
    return target, values


def check(where: str, function: Callable[..., Any], values: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Check names, types and ranges of `values` against the annotations of `function`.

    `known` are the arguments the program fills in; they are neither checked nor missing. `where` may be empty.
    """
    prefix = where and where + "."
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in values:
        if key in known or (key not in parameters and not open_ended):
            settings = [name for name in parameters if name not in known]
            raise UserError(f"{prefix}{key}: there is no such setting; {suggest(key, settings)}")
    check_values(where, function, values)
    for key, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        required = parameter.default is parameter.empty and not variadic
        if required and key not in known and key not in values:
            raise UserError(f"{prefix}{key} is missing; type {prefix}{key}=...")


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Its annotations, but for those that name what only type checkers import, as some in torch's schedulers do."""
    hints, function = {}, inspect.unwrap(function)
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError):
            hints |= get_type_hints(alone, function.__globals__, include_extras=True)
    return hints


def check_values(where: str, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check types and ranges of `values`, as far as the annotations of `function` tell of them."""
    hints = hints_of(function.__init__ if inspect.isclass(function) else function)
    for key, value in values.items():
        hint = hints.get(key, Any)
        if matches(value, hint):
            continue
        key = f"{where and where + '.'}{key}"
        quotes = f"; type '{key}=\"...\"'" if value is not None and matches("", hint) else ""
        raise UserError(f"{key}={value}: must be {describe(hint)}{quotes}")


def check_parts(settings: Mapping[str, Any]) -> None:
    """Check the values in those groups whose targets can be imported without Lightning, which takes seconds.

    What is missing, or known to the program alone, is told where a part is built.
    """
    from torch import Tensor, nn, optim

    kinds: dict[str, type] = {"model": nn.Module, "likelihood": nn.Module, "sampler": Tensor}
    kinds |= {"optimizer": optim.Optimizer, "scheduler": optim.lr_scheduler.LRScheduler}
    for group, kind in kinds.items():
        match settings.get(group):
            case {"_target_": str(target), **values}:
                check_values(group, resolve(target, kind), values)
