"""Ranges of numbers, one name for each: declared at the field, of a record from a file as of a command's flag.

msgspec obeys them where it reads a record; `check_ranges` does where flags were parsed, for every command in one place.
A float is always finite: NaN compares with nothing, so it would pass every check that asks for what is wrong.

    class SamplingArgs:
        top_p: PositiveShare = 1.0          # --top-p nan: error: --top-p is nan; it must be above 0 and at most 1.
"""

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta

from fledge.errors import UserError

LARGEST = 2**53  # what JSON and floats hold exactly; no count of ours comes near
LARGEST_FLOAT = sys.float_info.max  # infinity is above it

Count = Annotated[int, Meta(ge=1, le=LARGEST)]
Natural = Annotated[int, Meta(ge=0, le=LARGEST)]
Whole = Annotated[int, Meta(ge=-LARGEST, le=LARGEST)]
TreeNodes = Annotated[int, Meta(ge=2, le=LARGEST)]  # the root and something to verify
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # numpy takes no more
Port = Annotated[int, Meta(ge=1, le=65_535)]
Finite = Annotated[float, Meta(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST_FLOAT)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST_FLOAT)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
PartialShare = Annotated[float, Meta(ge=0, lt=1)]

LIMITS = ((operator.ge, "at least"), (operator.gt, "above"), (operator.le, "at most"), (operator.lt, "below"))


def check_ranges(args: Any, *, separator: Literal["-", "_"] = "-") -> None:
    """Refuse the first number of a (nested) dataclass of flags that is outside its declared range."""
    for name, annotation, value in _fields_with_values(args):
        ranges = [range_ for _, range_ in numbers_in(annotation) if range_ is not None]
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                _check(f"--{name.replace('_', separator)}", number, ranges)


def declared(args_class: type) -> Iterator[tuple[str, Any]]:
    """(name, annotation with its range) of every field of a (nested) dataclass.

    A class that inherits fields from a library declares their ranges in a dict RANGES.
    """
    hints = get_type_hints(args_class, include_extras=True)
    for field in dataclasses.fields(args_class):
        annotation = getattr(args_class, "RANGES", {}).get(field.name, hints[field.name])
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield from declared(annotation)
        else:
            yield field.name, annotation


def numbers_in(annotation: Any, range_: Meta | None = None) -> Iterator[tuple[type, Meta | None]]:
    """Every int and float of an annotation (`Count | None`, `list[Natural]`) with the range declared for it."""
    if annotation in (int, float):
        yield annotation, range_
    elif get_origin(annotation) is Annotated:
        base, *extras = get_args(annotation)
        yield from numbers_in(base, next((extra for extra in extras if isinstance(extra, Meta)), range_))
    elif get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from numbers_in(inner, range_)


def _fields_with_values(args: Any) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        value, annotation = getattr(args, field.name), hints[field.name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield from _fields_with_values(value)
        else:
            yield field.name, getattr(args, "RANGES", {}).get(field.name, annotation), value


def _check(flag: str, value: float, ranges: list[Meta]) -> None:
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or ranges and not any(_inside(value, range_) for range_ in ranges):
        needed = " or ".join(_described(range_, value) for range_ in ranges) or "finite"
        raise UserError(f"{flag} is {value}; it must be {needed}.")


def _limits(range_: Meta) -> list[tuple[Callable[[Any, Any], bool], str, float]]:
    limits = [(test, word, getattr(range_, test.__name__)) for test, word in LIMITS]
    return [limit for limit in limits if limit[-1] is not None]


def _inside(value: float, range_: Meta) -> bool:
    return all(test(value, limit) for test, _, limit in _limits(range_))


def _described(range_: Meta, value: float) -> str:
    """above 0 and at most 1; what only keeps a number exact is left out where it is kept."""
    longest = LARGEST if math.isfinite(value) and abs(value) <= LARGEST else LARGEST_FLOAT
    return " and ".join(f"{word} {limit}" for _, word, limit in _limits(range_) if abs(limit) < longest)
