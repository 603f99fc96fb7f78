"""One parser for every command: defaults < recipe YAML < command-line flags, into one dataclass per command.

A recipe is turned into flags that stand before the user's own, so both are read alike: an unknown name is an error that
names the nearest one, a wrong type reads the same from either side. `-` and `_` are the same, a switch may be followed
by true or false, and names of other tools are translated (`fledge.commands.aliases`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from fledge.commands.aliases import translated
from fledge.commands.flags import first_sentence, flags_of, text_of
from fledge.data.gguf import model_folder
from fledge.data.templates import template_name
from fledge.errors import UserError, is_path, nearest
from fledge.offline import stop_asking_an_unknown_hub
from fledge.parsing import read_yaml
from fledge.ranges import check_ranges

Args = TypeVar("Args")
Scalar = bool | int | float | str | None
Recipe = dict[str, Scalar | list[Scalar] | dict[str, Any]]
TRUTH = {"true": True, "false": False}
FREE_TEXT = {"prompt", "system", "gpus"}  # flags whose value may be empty; --gpus "": none
Removed = Mapping[str, tuple[str, str]]  # flags of earlier versions: the value that is done anyway, and why


def parse(args_class: type[Args], argv: Sequence[str], *, prog: str, description: str = "") -> Args:
    """Flags (and `--config recipe.yaml`) to an instance of `args_class`."""
    words = words_of(args_class, argv)
    refuse_missing(args_class, words, prog)
    args = tyro.cli(
        args_class, args=words, prog=prog, description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )  # fmt: skip
    check_ranges(args)
    check_template(args)
    return args


def check_template(args: Any) -> None:
    """An unknown chat template is told before anything is loaded."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if field.name == "chat_template_type":
            template_name(value)
        elif dataclasses.is_dataclass(value):
            check_template(value)


def refuse_missing(args_class: type, words: Sequence[str], prog: str) -> None:
    """Name the first flag that must be given and is not, with what it is."""
    for flag in flags_of(args_class):
        name = flag.name.upper() if flag.positional else f"--{flag.name.replace('_', '-')}"
        given = words if flag.positional else [word for word in words if word.partition("=")[0] == name]
        if flag.default is dataclasses.MISSING and not given:
            what = first_sentence(text_of(flag))
            raise UserError(f"{name} is needed: {what[0].lower()}{what[1:]} `{prog} --help` lists the flags.")


def with_model_folder(args: Args) -> Args:
    """The settings with a --target that is a GGUF file replaced by its unpacked model folder; one that lies nowhere on
    this machine is the hub's, which is asked once whether it is there."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(args):  # type: ignore[arg-type]
        value = getattr(args, field.name, None)
        if field.name == "target" and isinstance(value, str):
            changed["target"] = model_folder(value)
            if not Path(value).exists() and not is_path(value):
                stop_asking_an_unknown_hub()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed[field.name] = with_model_folder(value)
    changed = {name: value for name, value in changed.items() if value is not getattr(args, name)}
    return dataclasses.replace(args, **changed) if changed else args  # type: ignore[type-var]


def words_of(
    args_class: type, argv: Sequence[str], foreign: Sequence[str] = (), removed: Removed | None = None
) -> list[str]:
    """The command line in the spelling of the fields, its recipe first. `foreign` names are another parser's flags."""
    switches = {flag.name: flag.kind is bool for flag in flags_of(args_class)}
    known = [*switches, *foreign]
    words: list[str] = []
    rest = _without_removed(_with_recipe(list(argv), [*known, *(removed or ())]), removed or {})
    refuse_empty(rest)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = _known_name(word, name.replace("-", "_"), known)
        if switches.get(name):
            if not equals and rest and rest[0].lower() in TRUTH:
                equals, value = "=", rest.pop(0)
            name, equals, value = _switched(name, value if equals else "true"), "", ""
        spelt = name if name.removeprefix("no_") in foreign else name.replace("_", "-")
        words.append(f"--{spelt}{equals}{value}")
    return words


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


def _without_removed(words: list[str], removed: Removed) -> list[str]:
    """The words without flags of earlier versions, which may only ask for what is done anyway."""
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in removed:
            kept.append(word)
            continue
        if not equals:
            count = next((i for i, one in enumerate(rest) if one.startswith("--")), len(rest))
            value, rest = " ".join(rest[:count]), rest[count:]
        done_anyway, reason = removed[name]
        if value != done_anyway:
            raise UserError(f"--{name} {value} is no longer an option: {reason}. Leave --{name} out.")
    return kept


def _known_name(word: str, name: str, known: Sequence[str]) -> str:
    """The name of a flag, translated; `no_` may stand before it."""
    name = translated(name, known)
    if name not in known and name.removeprefix("no_") not in known:
        spelt = [f"--{one.replace('_', '-')}" for one in known]
        raise UserError(f"unknown flag {word[:80]!r}{nearest(word[:80].replace('_', '-'), spelt)}.")
    return name


def _switched(name: str, value: str) -> str:
    """A switch that is followed by true or false, in the parser's spelling."""
    if value.lower() not in TRUTH:
        raise UserError(f"--{name.replace('_', '-')} is {value!r}; it must be true or false.")
    return name if TRUTH[value.lower()] else f"no_{name}"


def read_recipe(path: Path, known: Sequence[str]) -> Recipe:
    """A flat recipe file; unknown keys are errors."""
    recipe = read_yaml(path, Recipe, hint="A recipe is a mapping of flag names to values.")
    found: Recipe = {}
    spelt: dict[str, str] = {}
    for key, value in recipe.items():
        name = translated(key.replace("-", "_"), known)
        if name not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(name, known)}.")
        if name in found:
            raise UserError(f"{path}: {spelt[name]!r} and {key!r} are the same flag. Remove one.")
        found[name], spelt[name] = value, key
    return found


def recipe_flags(recipe: Recipe) -> list[str]:
    """The command-line spelling of a recipe. A key without a value is not given."""
    flags: list[str] = []
    for key, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _with_recipe(argv: list[str], known: Sequence[str]) -> list[str]:
    """Replace `--config FILE` by the flags of the recipe, ahead of everything the user wrote."""
    for index, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            inline = word.partition("=")[2]
            if not inline and index + 1 >= len(argv):
                raise UserError("--config needs a YAML file.")
            path = inline or argv[index + 1]
            rest = argv[:index] + argv[index + (1 if inline else 2) :]
            return recipe_flags(read_recipe(Path(path), known)) + rest
    return argv
