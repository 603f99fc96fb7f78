"""The flags of a command, as the fields of its dataclass declare them, and what the docstrings say of them."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, as its field of a (nested) dataclass declares it. `owner` is the class that holds the field."""

    name: str
    annotation: Any
    field: dataclasses.Field
    owner: type

    @property
    def group(self) -> type:
        """The class that declares it first: flags that several commands share are of a common base."""
        return next(one for one in reversed(self.owner.__mro__) if self.name in one.__dict__.get("__annotations__", ()))

    @property
    def positional(self) -> bool:
        return tyro.conf.Positional in get_args(self.annotation)

    @property
    def hidden(self) -> bool:
        return tyro.conf.Suppress in get_args(self.annotation)

    @property
    def kind(self) -> Any:
        """The annotation without its range and markers."""
        return get_args(self.annotation)[0] if get_origin(self.annotation) is Annotated else self.annotation

    @property
    def default(self) -> Any:
        """What holds where the flag is not given; MISSING where it must be."""
        made = self.field.default_factory
        return made() if made is not dataclasses.MISSING else self.field.default


def flags_of(args_class: type) -> Iterator[Flag]:
    """Every flag of a (nested) dataclass, without prefixes."""
    hints = get_type_hints(args_class, include_extras=True)
    for field in dataclasses.fields(args_class):
        annotation = hints[field.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from flags_of(annotation)
        elif field.init:
            yield Flag(field.name, annotation, field, args_class)


def text_of(flag: Flag) -> str:
    """What a flag does: the docstring below its field, or the help that a library's field carries."""
    for owner in flag.owner.__mro__:
        if dataclasses.is_dataclass(owner) and flag.name in (found := _docstrings(owner)):
            return found[flag.name]
    return " ".join(str(flag.field.metadata.get("help", "")).split())


@cache
def _docstrings(owner: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def first_sentence(text: str) -> str:
    """The text up to its first full stop."""
    sentence, found, _ = " ".join(text.split()).partition(". ")
    return sentence + ("." if found else "")
