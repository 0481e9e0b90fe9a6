"""Plain values against type annotations, by pydantic; and an annotation in words."""

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Interval

if TYPE_CHECKING:
    from pydantic import TypeAdapter

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def matches(value: object, hint: object) -> bool:
    """Return whether a plain value fits an annotation.

    An int passes for a float, a bool for neither, a text for nothing else, and a list, as yaml has it, for a tuple.
    """
    from pydantic import ValidationError  # not above: a typo is answered without it

    adapter = _adapter(hint)
    if adapter is None:
        return True
    for candidate in (value, tuple(value)) if isinstance(value, list) else (value,):
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return True
    return False


@functools.cache
def _adapter(hint: Any) -> "TypeAdapter | None":
    """None for annotations that say nothing of plain values."""
    from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

    if get_origin(hint) is Callable:
        return None
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None


def describe(hint: object) -> str:
    """An annotation in words: "a whole number >= 1"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [extra for extra in arguments[1:] if isinstance(extra, Ge | Interval)]
        low = [bound.ge for bound in bounds]
        high = [bound.le for bound in bounds if isinstance(bound, Interval)]
        words = [f" >= {number}" for number in low if number is not None]
        words += [f" <= {number}" for number in high if number is not None]
        return describe(arguments[0]) + " and".join(words)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments if option in WORDS or get_origin(option))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list [...], each {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {describe(arguments[0])}"
    return WORDS.get(hint, str(hint))
