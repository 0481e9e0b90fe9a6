"""Text as it is typed, so that Hydra reads it as it is."""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def setting(key: str, text: str) -> str:
    """`key=text` for Hydra, which shall read the text as it is: in quotes where it would take it for anything else."""
    plain = f"{key}={text}"
    return plain if "${" not in text and read(plain) == text else f"{key}={quoted(uninterpolated(text))}"


def quoted(text: str) -> str:
    """A text in quotes of Hydra's grammar."""
    return QuotedString(text, Quote.double).with_quotes()


def uninterpolated(text: str) -> str:
    """A text that OmegaConf resolves to `text`, whatever ${...} is in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def read(override: str) -> Any:
    """The value that Hydra reads in `key=value`; None where it cannot."""
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException:
        return None
