"""What several files of tests do."""

import sys

import pytest

from pixelcnn_lit.command import run


def command(name: str, *overrides: str) -> None:
    """What `python -m pixelcnn_lit.<name>` does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *overrides])
        run(name)
