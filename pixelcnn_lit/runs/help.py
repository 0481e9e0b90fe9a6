"""What a command says of itself: the page of --help, from its docstring, its yaml and the options in conf/."""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pixelcnn_lit.runs.places import CONF, PACKAGE, WEIGHTS

WIDTH = 80  # columns of a page
HEADS = 30  # of these, those of the first column of a table at most
SCRIPT = "pixelcnn"  # as pyproject.toml installs it
REQUIRED = "???"


class Entry(NamedTuple):
    """A line `key: value # comment` of a yaml, word for word; the key follows those it is nested in, with dots."""

    key: str
    value: str
    comment: str


def page(name: str, composed: Mapping[str, Any] | None = None) -> str:
    """Return the help of a command: what it does, examples, and, of its `composed` config, the settings and groups."""
    sections = [paragraphs(docstring(name)), section("Examples", examples(name))]
    if composed is not None:
        groups, included = defaults(CONF / f"{name}.yaml")
        settings = [entry for file in (CONF / f"{name}.yaml", *included) for entry in own_settings(file)]
        settings.sort(key=lambda entry: entry.value != REQUIRED)
        rows = [(_head(entry), _meaning(entry)) for entry in settings]
        choices = [(_head(group), _options(group, composed)) for group in groups]
        column = column_of(rows + choices)
        sections += [
            section("Settings (KEY=VALUE), with their defaults", table(rows, column)),
            section("Groups (GROUP=OPTION, then GROUP.KEY=VALUE)", table(choices, column)),
            section("More", table(_more(), column)),
        ]
    return "\n\n".join(filter(None, sections))


# What is read


def docstring(name: str) -> str:
    """Return the docstring of a command, which is not imported for it."""
    file = PACKAGE / f"{name}.py"
    source = file if file.is_file() else PACKAGE / name / "__main__.py"
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


def examples(name: str) -> list[str]:
    """Return the commands that its yaml opens with or, where it has none, that its docstring shows."""
    file = CONF / f"{name}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else docstring(name)
    shown = re.findall(r"^(?:#| {3}) python -m pixelcnn_lit\.(\w+)(.*)$", text, re.MULTILINE)
    return [line for command, settings in shown for line in continued(typed_as(command) + settings)]


def typed_as(name: str) -> str:
    """Return how a command is typed: with the script if this process runs it, or else as a module."""
    is_script = [Path(word).stem for word in sys.orig_argv[1:2]] == [SCRIPT]
    return f"{SCRIPT} {name}" if is_script else f"python -m pixelcnn_lit.{name}"


def own_settings(file: Path) -> list[Entry]:
    """Return what a yaml sets itself."""
    return [entry for entry in _entries(file) if entry.key.partition(".")[0] not in ("defaults", "hydra")]


def defaults(file: Path) -> tuple[list[Entry], list[Path]]:
    """Return the groups in the defaults list of a yaml, and the files that it includes."""
    prefix = "defaults."
    listed = [entry for entry in _entries(file) if entry.key.startswith(prefix)]
    groups = [entry._replace(key=entry.key.removeprefix(prefix).split()[-1]) for entry in listed if entry.value]
    included = [CONF / f"{entry.key.removeprefix(prefix)}.yaml" for entry in listed if not entry.value]
    return groups, [path for path in included if path.is_file()]


def _entries(file: Path) -> list[Entry]:
    text = file.read_text(encoding="utf-8")
    return list(_inside(yaml.compose(text, yaml.SafeLoader), text, ""))


def _inside(node: yaml.Node | None, text: str, prefix: str) -> Iterator[Entry]:
    """The entries of a mapping, or of a list of mappings, whose other items become entries without a value."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                yield Entry(f"{prefix}{item.value}", "", "")
            else:
                yield from _inside(item, text, prefix)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            yield from _inside(value, text, f"{name}.")
        else:
            written = text[value.start_mark.index : value.end_mark.index]
            yield Entry(name, written, _comment(text[value.end_mark.index :]))


def _comment(rest: str) -> str:
    """Return the comment that follows a value, with the indented lines of comment below it."""
    found = re.match(r" *# *(.*(?:\n +#.*)*)", rest)
    return re.sub(r"\n +# *", " ", found[1]) if found else ""


# How it is said


def _head(entry: Entry) -> str:
    """A setting or a group with its default: none where it is computed, or the null of a group."""
    if entry.value == REQUIRED:
        return f"{entry.key}=..."
    is_group = (CONF / entry.key.partition("@")[0]).is_dir()
    if "${" in entry.value or (is_group and entry.value == "null"):
        return entry.key
    return f"{entry.key}={entry.value.replace(', ', ',')}"


def _meaning(entry: Entry) -> str:
    """Its comment, which names the shipped weights where it speaks of them."""
    shipped = ", ".join(sorted(path.stem for path in WEIGHTS.glob("*.safetensors")))
    comment = entry.comment.replace("shipped weights", f"shipped weights ({shipped})")
    return f"required; {comment}" if entry.value == REQUIRED else comment


def _options(group: Entry, composed: Mapping[str, Any]) -> str:
    """Its options, its comment, and the keys of the option that is chosen, a paragraph each."""
    name, _, package = group.key.partition("@")
    parts = [", ".join(sorted(_option(path, CONF / name) for path in (CONF / name).rglob("*.yaml")))]
    if group.comment:
        parts.append(f"({group.comment})")
    chosen = composed.get(package or name) if group.value != "null" else None
    if keys := [key for key in chosen or () if not key.startswith("_")]:
        parts.append("keys: " + ", ".join(keys))
    return "\n".join(parts)


def _option(file: Path, group: Path) -> str:
    return file.relative_to(group).with_suffix("").as_posix()


def _more() -> list[tuple[str, str]]:
    conf = CONF.relative_to(Path.cwd()) if CONF.is_relative_to(Path.cwd()) else CONF
    return [
        ("--cfg job", "print the config as composed, and run nothing"),
        ("-m KEY=A,B", "sweep: one run for each value"),
        ("--hydra-help", "options of Hydra itself"),
        (f"{conf}/", "every key and its meaning"),
    ]


def section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *lines]) if lines else ""


def paragraphs(text: str) -> str:
    """A docstring, wrapped, without what is indented in it."""
    return "\n\n".join("\n".join(_wrapped(part, WIDTH)) for part in text.split("\n\n") if not part.startswith(" "))


def continued(command: str) -> list[str]:
    """A command as indented lines of a shell."""
    width = WIDTH - len("  ")
    *first, last = [command] if len(command) <= width else _wrapped(command, width - len("     \\"))
    lines = [f"{line} \\" for line in first] + [last]
    return [f"  {lines[0]}", *(f"      {line}" for line in lines[1:])]


def column_of(rows: list[tuple[str, str]]) -> int:
    """Return where the second column begins: behind all heads but those that are too long."""
    return max((len(f"  {head}  ") for head, _ in rows if len(f"  {head}  ") <= HEADS), default=HEADS)


def table(rows: list[tuple[str, str]], column: int) -> list[str]:
    """Lines in two columns; a head that is too long for the first has a line of its own."""
    lines = []
    for head, text in rows:
        heads = [f"  {head}"]
        if len(heads[0]) + 2 > column:
            lines.append(heads.pop())
        wrapped = [line for part in text.split("\n") for line in _wrapped(part, WIDTH - column)]
        lines += [f"{first:<{column}}{line}".rstrip() for first, line in zip_longest(heads, wrapped, fillvalue="")]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)
