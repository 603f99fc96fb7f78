"""`--help`: the most used flags of a command, a line each. `--help-all`: every flag with its full text.

Both are read off the command's dataclass and the docstrings of its fields, without importing what the command runs.
"""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fledge.commands.flags import Flag, first_sentence, flags_of, text_of

RECIPE = "--config FILE reads flags from a YAML file."
WIDEST = 120
INDENT = 30  # column of the texts


def asks_for_help(argv: Sequence[str]) -> str | None:
    """`--help` or `--help-all`, where one of them is among the words before `--`."""
    words = list(argv[: argv.index("--")] if "--" in argv else argv)
    if any(word in ("--help-all", "--help_all") for word in words):
        return "--help-all"
    return "--help" if any(word in ("-h", "--help") for word in words) else None


def short_help(prog: str, about: str, args_class: type, main: Sequence[str]) -> str:
    """What is needed first. `main` names the flags in order; without it every flag is shown."""
    flags = {flag.name: flag for flag in flags_of(args_class) if not flag.hidden}
    chosen = [flags[name] for name in main] if main else list(flags.values())
    lines = [line for flag in chosen for line in _entry(flag, first_sentence(text_of(flag)))]
    left = len(flags) - len(chosen)
    more = f"{left} more flags: {prog} --help-all. " if left else ""
    return "\n".join([*_head(prog, about, chosen), *lines, "", more + RECIPE])


def full_help(prog: str, about: str, args_class: type, others: Sequence[type] = ()) -> str:
    """Every flag, group by group. `others` are further dataclasses whose fields are flags of the command."""
    flags = [flag for one in (args_class, *others) for flag in flags_of(one) if not flag.hidden]
    lines: list[str] = []
    for owner in dict.fromkeys(flag.group for flag in flags):
        lines += ["", f"{first_sentence(inspect.getdoc(owner) or owner.__name__)}"]
        lines += [line for flag in flags if flag.group is owner for line in _entry(flag, text_of(flag))]
    return "\n".join([*_head(prog, about, flags), *lines[1:], "", RECIPE])


def _head(prog: str, about: str, flags: Sequence[Flag]) -> list[str]:
    positional = "".join(f" {flag.name.upper()}" for flag in flags if flag.positional)
    return [f"usage: {prog}{positional} [flags]", "", *_wrapped(about, 0), ""]


def _entry(flag: Flag, text: str) -> Iterator[str]:
    """The flag, its value and its text, wrapped to the terminal."""
    value = value_of(flag.kind)
    name = flag.name.replace("_", "-")
    left = f"  --{name} {value}" if value else f"  --{name}"
    if flag.positional:
        left = f"  {flag.name.upper()}"
    elif flag.kind is bool and flag.default is True:
        left = f"  --no-{name}"
        text = f"Switches off: {text}"
    lines = _wrapped(" ".join([text, *_default(flag)]), INDENT)
    if len(left) < INDENT - 1 and lines:
        lines[0] = left.ljust(INDENT) + lines[0].lstrip()
    else:
        lines.insert(0, left)
    yield from lines


def _default(flag: Flag) -> Iterator[str]:
    if flag.default is dataclasses.MISSING and not flag.positional:
        yield "(required)"
    elif flag.default is not True and flag.default not in (None, dataclasses.MISSING, False, "", [], ()):
        default = flag.default
        yield f"({' '.join(map(str, default)) if isinstance(default, list | tuple) else default})"


def value_of(kind: Any) -> str:
    """How the value of a flag is called: its choices, or a word for its type; nothing for a switch."""
    if kind is bool:
        return ""
    inner = [part for part in get_args(kind) if part not in (type(None), ...)]
    if get_origin(kind) is Literal:
        return "|".join(map(str, inner))
    if get_origin(kind) in (Union, UnionType):
        return "|".join(value_of(part) or "true|false" for part in inner)
    if get_origin(kind) in (list, tuple):
        return f"{value_of(inner[0])} ..."
    if inner:  # Annotated
        return value_of(inner[0])
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    blank = " " * indent
    return textwrap.wrap(" ".join(text.split()), max(width, indent + 20), initial_indent=blank, subsequent_indent=blank)
