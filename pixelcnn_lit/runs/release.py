"""The release of this program that has written a file."""

import re
from importlib.metadata import version

from pixelcnn_lit.config.errors import UserError

WRITTEN_BY = "pixelcnn_lit"  # the key of it in a file
RELEASE = version("pixelcnn_lit")


def refuse_later(written_by: object, where: str) -> None:
    """Raise UserError, which names a file as `where`, if a later release than this one has written it.

    None is a release before files said so.
    """
    if written_by is not None and _numbers(str(written_by)) > _numbers(RELEASE):
        raise UserError(f"{where}: written by pixelcnn_lit {written_by}, and this is {RELEASE}; install that release")


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d{1,6}", release)[:3]]
