"""The commands, a line each; and `pixelcnn COMMAND`, the same program as `python -m pixelcnn_lit.COMMAND`."""

import difflib
import runpy
import sys
from importlib.metadata import version

from pixelcnn_lit.runs.help import column_of, docstring, section, table, typed_as
from pixelcnn_lit.runs.signals import exit_on_signals
from pixelcnn_lit.runs.terminal import print_what_can_be_printed, survive_closed_pipes

COMMANDS = {
    "Use a trained model": ["sample", "complete", "compress", "decompress", "export"],
    "Train": ["data", "train", "train_classifier", "benchmark"],
    "Look at results": ["evaluate", "judge", "summarize"],
}


def main() -> None:
    exit_on_signals()
    match sys.argv[1:]:
        case [] | ["help" | "--help" | "-h"]:
            print_what_can_be_printed()
            survive_closed_pipes()
            print(overview())
        case ["--version"]:
            print(version("pixelcnn_lit"))
        case ["help", name, *_]:
            become(name, "--help")
        case [name, *typed]:
            become(name, *typed)


def become(name: str, *typed: str) -> None:
    """Run a command as `python -m` does: what starts the program again, as DDP does, finds that module as __main__."""
    known = [command for commands in COMMANDS.values() for command in commands]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(known)}"
        sys.exit(f"error: {name}: there is no such command; {hint}")
    sys.argv[1:] = typed
    runpy.run_module(f"pixelcnn_lit.{name}", run_name="__main__", alter_sys=True)


def overview() -> str:
    """Return the list of all commands, and what to type first."""
    first = [
        (typed_as("sample ckpt=mnist"), "draw digits with shipped weights"),
        (typed_as("train"), "train on small digits: a minute on a CPU"),
        (typed_as("sample --help"), "what a command does, its settings, examples"),
    ]
    rows = {title: [(name, docstring(name).partition("\n")[0]) for name in names] for title, names in COMMANDS.items()}
    column = column_of([row for group in rows.values() for row in group])
    sections = [section(title, table(group, column)) for title, group in rows.items()]
    return "\n\n".join([
        "Class-conditional PixelCNN image models, in PyTorch Lightning.",
        *sections,
        section("Type first", table(first, column_of(first))),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
