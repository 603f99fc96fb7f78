"""Ways to break a JSON document: its text, or one field of it.

A rule is a name and what it makes of a good document. Every rule here gives an input that no reader may accept.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

DEEP = 100_000
HUGE = 10**400
Path = tuple[str | int, ...]

# Values that are wrong wherever a field of this kind is read.
NO_NUMBER: tuple[Any, ...] = ("x", "7", True, [], {}, [1], float("nan"), float("inf"))
NO_INT: tuple[Any, ...] = (*NO_NUMBER, 1.5, HUGE)
NO_SIZE: tuple[Any, ...] = (*NO_INT, 0, -1, -64)
NO_COUNT: tuple[Any, ...] = (*NO_INT, -1)
NO_TEXT: tuple[Any, ...] = (5, 1.5, True, [], {}, ["x"])
NO_FLAG: tuple[Any, ...] = ("yes", "", 5, [], {}, 1.5)
NO_LIST: tuple[Any, ...] = ("x", 5, True, {}, {"a": 1})
NO_OBJECT: tuple[Any, ...] = ("x", 5, True, [], [1])

BROKEN_TEXT: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda text: b"",
    "only blanks": lambda text: b" \n ",
    "first half": lambda text: text.rstrip()[: len(text.rstrip()) // 2],
    "last character missing": lambda text: text.rstrip()[:-1],
    "text behind the document": lambda text: text.rstrip() + b" x",
    "second document behind it": lambda text: text.rstrip() + text,
    "comma missing": lambda text: text.replace(b', "', b'  "', 1),
    "comma too many": lambda text: text.replace(b', "', b', , "', 1),
    "colon missing": lambda text: text.replace(b'": ', b'"  ', 1),
    "quote missing": lambda text: text.replace(b'"', b"", 1),
    "single quotes": lambda text: text.replace(b'"', b"'"),
    "not UTF-8": lambda text: text.replace(b'"', b'"\xff\xfe'),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "NUL bytes": lambda text: b"\0" * len(text),
    "control character in a string": lambda text: text.replace(b'"', b'"\x01', 1),
    "nested without end": lambda text: b"[" * DEEP,
    "nested too deeply": lambda text: b"[" * DEEP + b"]" * DEEP,
    "objects nested too deeply": lambda text: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of 5000 digits": lambda text: b"9" * 5000,
    "a list": lambda text: b"[" + text + b"]",
    "a string": lambda text: b'"text"',
    "null": lambda text: b"null",
}


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


def at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


def changed(document: Any, path: Path, value: Any) -> Any:
    """A copy with another value at `path`."""
    document = copy.deepcopy(document)
    at(document, path[:-1])[path[-1]] = value
    return document


def without(document: Any, path: Path) -> Any:
    """A copy without the field at `path`."""
    document = copy.deepcopy(document)
    del at(document, path[:-1])[path[-1]]
    return document


def name_of(path: Path) -> str:
    return ".".join(map(str, path))


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"


def broken_text(good: bytes, leave_out: Sequence[str] = ()) -> st.SearchStrategy[tuple[str, bytes]]:
    """(rule, text) of a good document's text."""
    rules = [name for name, rule in BROKEN_TEXT.items() if name not in leave_out and rule(good) != good]
    return st.sampled_from(rules).map(lambda name: (name, BROKEN_TEXT[name](good)))


def broken_fields(
    good: Any, wrong: Mapping[Path, Sequence[Any]], required: Sequence[Path] = ()
) -> st.SearchStrategy[tuple[str, Any]]:
    """(rule, document) of a good document with one field missing or of a value that it cannot have."""
    values = [(path, value) for path, some in wrong.items() for value in some]
    changes = st.sampled_from(values).map(
        lambda pair: (f"{name_of(pair[0])} is {short(pair[1])}", changed(good, *pair))
    )
    if not required:
        return changes
    missing = st.sampled_from(list(required)).map(lambda path: (f"{name_of(path)} is missing", without(good, path)))
    return st.one_of(changes, changes, missing)
