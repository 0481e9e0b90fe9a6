"""The beginning of each command. Nothing heavy is imported here: see `launch`."""

import sys

from pixelcnn_lit.runs.signals import exit_on_signals


def launch(name: str) -> None:
    """Run the command pixelcnn_lit.<name> with what was typed, and exit.

    A command calls this above its own imports. So a signal, a request for help and a typo, which conf/<name>.yaml tells
    from a setting, need not wait until torch is imported.
    """
    exit_on_signals()
    from pixelcnn_lit.runs.command import run
    from pixelcnn_lit.runs.terminal import print_what_can_be_printed, survive_closed_pipes

    print_what_can_be_printed()
    survive_closed_pipes()
    sys.exit(run(name))
