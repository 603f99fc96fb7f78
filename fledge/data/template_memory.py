"""A limit on what a chat template may make: characters and list elements, over one whole rendering.

A template is a program of whoever made the model, and one operation of it can ask for any amount of memory:
`"x" * 10**10`, a text that a loop joins with itself, a width of a billion. So operators, `~`, filters and methods state
the size of their result before they make it, and a rendering may make `BUDGET` in all. What is printed, joined or
compared is measured to its depth: nested lists may hold one text many times, and comparing them has no end.

Transformers compiles chat templates in an environment of its own making and offers no hook, so the class of that
environment is replaced by one that counts. Outside of `within_budget` nothing is counted.
"""

import functools
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from types import NoneType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

BUDGET = 64 << 20  # a template copies each text some ten times; the longest contexts hold 4 million characters
LARGEST_NUMBER = 100_000  # of a filter's or method's argument (a width, a count), as of Jinja's own range
LARGEST_PRODUCT_BITS = 4096
PIECE = 16  # what an element of a list costs beside its text
NUMBER = 32  # characters of a number
WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*?(\*|\d{5,})|\{[^{}]*:[^{}]*(\{|\d{5,})")  # a computed or very large width
PRINTING = frozenset((  # filters that turn any value into text
    "capitalize", "e", "escape", "forceescape", "lower", "pprint", "safe", "string", "striptags", "title", "trim",
    "upper", "urlencode", "wordcount", "xmlattr",
))  # fmt: skip
MULTIPLYING = frozenset(  # what an argument says is added to every character or element, at most
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "wordwrap", "zfill")
)
GATHERING = frozenset(("join", "sum"))
LISTING = frozenset(("list", "reverse", "sort", "split", "rsplit", "splitlines", "unique"))  # lists, from a text
COMPARING = frozenset(("dictsort", "groupby", "max", "min", "sort", "unique"))
COMPARING_TESTS = ("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan",
                   "<=", "le")  # fmt: skip
SIZED = (str, bytes, list, tuple)
PLAIN = (str, bytes, int, float, NoneType)
_left: ContextVar[list[int] | None] = ContextVar("left", default=None)  # what the rendering under way may still make


@contextmanager
def within_budget() -> Iterator[None]:
    """A rendering with a budget of its own."""
    token = _left.set([BUDGET])
    try:
        yield
    finally:
        _left.reset(token)


def spend(size: int) -> None:
    """Take what is about to be made from the budget. ValueError when it is used up."""
    left = _left.get()
    if left is None:
        return
    left[0] -= size
    if left[0] < 0:
        raise ValueError(f"it makes more than {BUDGET:,} characters and list elements")


def text_size(value: Any) -> int:
    """How many characters `str(value)` has, about, and never much more than the budget."""
    if isinstance(value, str):
        return len(value)
    size, waiting = 0, [value]
    while waiting and size <= BUDGET:
        one = waiting.pop()
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += [part for pair in one.items() for part in pair]
        elif isinstance(one, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
            waiting += one
        elif isinstance(one, Namespace):
            waiting += object.__getattribute__(one, "_Namespace__attrs").values()
        size += PIECE
    return size


def compared(*values: Any) -> None:
    """ValueError when one of these is so nested that comparing it takes for ever."""
    for value in values:
        if not isinstance(value, PLAIN) and _left.get() is not None and text_size(value) > BUDGET:
            raise ValueError(f"it compares values of more than {BUDGET:,} characters and list elements")


def _comparing(test: Any) -> Any:
    @functools.wraps(test)
    def measured(*args: Any) -> Any:
        compared(*args)
        return test(*args)

    return measured


class CountingEnvironment(ImmutableSandboxedEnvironment):
    """Transformers' environment of chat templates, with the budget."""

    intercepted_binops = frozenset(("+", "*", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters)
        self.finalize = _printed
        self.tests |= {name: _comparing(self.tests[name]) for name in COMPARING_TESTS}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):  # nearly all there are
            spend(len(left) + len(right))
            return left + right
        spend(_size_of_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in Jinja
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, (str, bytes)) and _left.get() is not None:
            name = __obj.__name__
            if name == "join" and args:
                args = (list(args[0]),)
            spend(_size_of_call(name, *((args[0], owner) if name == "join" and args else (owner, *args)), **kwargs))
        elif isinstance(owner, (list, tuple)):  # index, count
            compared(*owner, *args)
        result = super().call(__context, __obj, *args, **kwargs)
        spend(_length(result))
        return result

    def joined(self, parts: tuple[Any, ...], autoescape: bool) -> str:
        """`a ~ b`."""
        spend(sum(map(text_size, parts)))
        return markup_join(parts) if autoescape else str_join(parts)

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`, which is a copy."""
        result = value[start:stop:step]
        spend(_length(result))
        return result

    @staticmethod
    def compared(value: Any) -> Any:
        """`value`, if comparing it comes to an end."""
        compared(value)
        return value

    @staticmethod
    def concat(pieces: Any) -> str:
        """The text of a block, a macro or the whole template."""
        found = []
        for piece in pieces:
            spend(len(piece))
            found.append(piece)
        return "".join(found)


class _CountingGenerator(CodeGenerator):
    """`~` and slices become calls of the environment, and what is compared is measured."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - the name is Jinja's
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("), context.eval_ctx.autoescape)")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            self.write(", ")
            self.visit(nodes.Const(None) if part is None else part, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(")
        self._measured(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        self.write(f" {operators[node.op]} ")
        self._measured(node.expr, frame)

    def _measured(self, node: nodes.Expr, frame: Frame) -> None:
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write("environment.compared(")
        self.visit(node, frame)
        self.write(")")


CountingEnvironment.code_generator_class = _CountingGenerator


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that state the size of what they make; transformers adds one of its own to Jinja's."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        place = 1 if hasattr(function, "jinja_pass_arg") else 0  # the value follows the context, if that is passed

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if _left.get() is None:
                return function(*args, **kwargs)
            if name in GATHERING:
                args = (*args[:place], list(args[place]), *args[place + 1 :])
            spend(_size_of_call(name, *args[place:], **kwargs))
            result = function(*args, **kwargs)
            spend(_length(result))
            return result

        super().__setitem__(name, counted)


def _printed(value: Any) -> Any:
    """What `{{ value }}` prints; texts are counted where they are put together."""
    if not isinstance(value, str):
        spend(text_size(value))
    return value


def _size_of_operation(operator: str, left: Any, right: Any) -> int:
    """What `left operator right` makes, for texts and lists; numbers may not grow without end."""
    if operator == "%":
        return _size_of_format(left, right) if isinstance(left, str) else 0
    if operator == "+":
        return _length(left) + _length(right)
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > LARGEST_PRODUCT_BITS:
            raise ValueError("it multiplies numbers of more than a thousand digits")
        return 0
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    return _length(sequence) * max(count, 0) if isinstance(count, int) else 0


def _size_of_call(name: str, value: Any, *args: Any, **kwargs: Any) -> int:
    """What a filter or a method of a text makes of its value, where that may be more than the value."""
    given = (*args, *kwargs.values())
    largest = max((one for one in given if isinstance(one, int)), default=0)
    if largest > LARGEST_NUMBER or name == "translate":
        what = f"with the number {largest:,}" if largest > LARGEST_NUMBER else "is not to be foreseen"
        raise ValueError(f"`{name}` {what}, which no chat template needs")
    if name == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        return text_size(value) + str(value).count(old) * len(new) if isinstance(value, str) else text_size(value)
    if name in ("format", "format_map"):
        return _size_of_format(str(value), given)
    if name in GATHERING:
        return text_size(value) + len(value) * text_size(given)
    if name in MULTIPLYING:
        return text_size(value) * (1 + max(largest, 0) + text_size([one for one in given if not isinstance(one, int)]))
    if name in PRINTING:
        return text_size(value)
    if name in COMPARING:
        compared(value)
    if name in LISTING and isinstance(value, str):
        between = args[0] if name in ("split", "rsplit") and args and isinstance(args[0], str) and args[0] else None
        return PIECE * (value.count(between) + 1 if between else len(value))
    return 0


def _size_of_format(template: str, values: Any) -> int:
    if WIDE.search(template):
        raise ValueError("the width in a format is computed, or has more than four digits")
    return len(template) + (template.count("%") + template.count("{")) * (NUMBER + text_size(values))


def _length(value: Any) -> int:
    return len(value) * (1 if isinstance(value, (str, bytes)) else PIECE) if isinstance(value, SIZED) else 0


chat_template_utils.ImmutableSandboxedEnvironment = CountingEnvironment  # type: ignore[misc]
