"""Defaults < recipe YAML < command-line flags, into one dataclass per command.

A recipe is turned into flags that stand before the user's own, so both pass through the same parser: an unknown key
is an error that names the nearest one, a wrong type reads the same from either side.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fledge.errors import UserError, nearest
from fledge.parsing import read_yaml
from fledge.ranges import check_ranges

Args = TypeVar("Args")
Scalar = bool | int | float | str | None
Recipe = dict[str, Scalar | list[Scalar] | dict[str, Any]]
OVERWRITE = (
    "Replace what lies in the output folder under names that this command writes, though it did not write them. "
    "Without it such a folder is refused."
)
FREE_TEXT = {"prompt", "system", "system_prompt", "gpus"}  # flags whose value may be empty; --gpus "": none
Overwrite = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=OVERWRITE)]


def parse(args_class: type[Args], argv: Sequence[str], *, prog: str, description: str) -> Args:
    """Flags (and `--config recipe.yaml`) to an instance of `args_class`. Nested dataclasses group the help."""
    flags = _with_recipe(list(argv), field_names(args_class))
    refuse_empty(flags)
    args = tyro.cli(
        args_class, args=flags, prog=prog, description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )  # fmt: skip
    check_ranges(args)
    return args


def refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty value, mostly a shell variable that is not set: an empty path would be the current folder."""
    flag = ""
    for word in words:
        value = word
        if word.startswith("--"):
            flag, has_value, value = word.partition("=")
            value = value if has_value else flag
        if not value.strip() and flag.lstrip("-").replace("-", "_") not in FREE_TEXT:
            raise UserError(f"{flag or 'the first argument'} is empty. Give a value, or leave it out.")


def field_names(args_class: type) -> list[str]:
    """Every flag of a (nested) dataclass, without prefixes."""
    names: list[str] = []
    for field in dataclasses.fields(args_class):
        inner = _dataclass_in(field.type)
        names += field_names(inner) if inner else [field.name]
    return names


def read_recipe(path: Path, known: Sequence[str]) -> Recipe:
    """A flat recipe file; unknown keys are errors."""
    recipe = read_yaml(path, Recipe, hint="A recipe is a mapping of flag names to values.")
    found: Recipe = {}
    for key, value in recipe.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, known)}.")
        if name in found:
            raise UserError(f"{path}: {key!r} is given twice, with - and with _. Remove one.")
        found[name] = value
    return found


def recipe_flags(recipe: Recipe) -> list[str]:
    """The command-line spelling of a recipe."""
    flags: list[str] = []
    for key, value in recipe.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(name if value else "--no-" + name[2:])
        elif isinstance(value, list):
            flags += [name, *map(str, value)]
        else:
            flags += [name, str(value)]
    return flags


def _with_recipe(argv: list[str], known: Sequence[str]) -> list[str]:
    """Replace `--config FILE` by the flags of the recipe, ahead of everything the user wrote."""
    if "config" in known:
        return argv
    for index, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            inline = word.partition("=")[2]
            if not inline and index + 1 >= len(argv):
                raise UserError("--config needs a YAML file.")
            path = inline or argv[index + 1]
            rest = argv[:index] + argv[index + (1 if inline else 2) :]
            return recipe_flags(read_recipe(Path(path), known)) + rest
    return argv


def _dataclass_in(annotation: Any) -> type | None:
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None
