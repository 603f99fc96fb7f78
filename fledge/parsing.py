"""JSON and YAML from outside, as typed records, or one line with the file, the line and the field that is wrong.

msgspec decodes and checks the types. What it does not say itself is added here: where the text came from, which line,
and that a file may be missing, unreadable, too large, not UTF-8 or nested too deeply. Knows nothing of what is read.

    class Report(msgspec.Struct, forbid_unknown_fields=True):
        rows: Annotated[int, msgspec.Meta(ge=0)]

    read_json(folder / "report.json", Report)   # error: .../report.json: Expected `int`, got `str` - at `$.rows`
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from fledge.errors import UserError

Record = TypeVar("Record")
PIECE = 1 << 20
LARGEST_DOCUMENT = 256 << 20  # bytes; what fledge writes itself stays far below


def read_json(path: Path, kind: type[Record], *, hint: str = "", largest: int = LARGEST_DOCUMENT) -> Record:
    """The JSON document of a file as a `kind`. UserError, ending in `hint`, when it is none."""
    return parse_json(read_bytes(path, hint=hint, largest=largest), kind, str(path), hint=hint)


def read_yaml(path: Path, kind: type[Record], *, hint: str = "", largest: int = LARGEST_DOCUMENT) -> Record:
    """The YAML document of a file as a `kind`; an empty file is an empty mapping."""
    content = decode_text(read_bytes(path, hint=hint, largest=largest), str(path), hint=hint)
    try:
        value = yaml.load(content, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        raise UserError(_sentence(str(path), f"not valid YAML ({_one_line(error)})", hint)) from None
    return convert({} if value is None else value, kind, str(path), hint=hint)


def parse_json(content: bytes | str, kind: type[Record], where: str, *, hint: str = "") -> Record:
    """A JSON text as a `kind`; `where` names its place in the error."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(_sentence(where, str(error), hint)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        place = _line_of(content, error, where)
        raise UserError(_sentence(place, f"not valid JSON ({_one_line(error)})", hint)) from None


def read_python_json(path: Path, kind: type[Record], *, hint: str = "") -> Record:
    """Like `read_json`, of what Python's json module may have written: NaN and Infinity are numbers there."""
    text = decode_text(read_bytes(path, hint=hint), str(path), hint=hint)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(_sentence(f"{path}:{error.lineno}", f"not valid JSON ({error.msg})", hint)) from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python converts
        raise UserError(_sentence(str(path), f"not valid JSON ({_one_line(error)})", hint)) from None
    return convert(value, kind, str(path), hint=hint)


def read_json_lines(path: Path, kind: type[Record], *, hint: str = "") -> Iterator[tuple[str, Record]]:
    """(`file:line`, record) of every line of a file that is not empty."""
    for number, line in enumerate(read_bytes(path, hint=hint).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, parse_json(line, kind, where, hint=hint)


def convert(value: Any, kind: type[Record], where: str, *, hint: str = "") -> Record:
    """Plain lists, dicts and scalars as a `kind`."""
    try:
        return msgspec.convert(value, type=kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(_sentence(where, _one_line(error), hint)) from None


def read_bytes(path: Path, *, hint: str = "", largest: int = LARGEST_DOCUMENT) -> bytes:
    """A whole file of at most `largest` bytes. `read` reserves what it is asked for: the file's size first."""
    try:
        with open(path, "rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, largest) + 1)
            while len(content) <= largest and (more := file.read(PIECE)):  # a pipe says no size
                content += more
    except FileNotFoundError:
        raise UserError(_sentence(str(path), "no such file", hint)) from None
    except OSError as error:
        raise UserError(_sentence(str(path), f"cannot be read ({error.strerror or error})", hint)) from None
    if len(content) > largest:
        raise UserError(_sentence(str(path), f"larger than the {largest >> 20} MiB that are read", hint))
    return content


def decode_text(content: bytes, where: str, *, hint: str = "") -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            _sentence(f"{where}:{line}", f"not UTF-8 (byte {error.start} is 0x{content[error.start]:02x})", hint)
        ) from None


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice in a mapping: YAML's own reader takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _line_of(content: bytes, error: Exception, where: str) -> str:
    """`where:line` when msgspec names the byte at which it stopped."""
    _, _, place = str(error).rpartition("(byte ")
    digits = place.rstrip(")")
    line = content.count(b"\n", 0, int(digits)) + 1 if digits.isdigit() else None
    return f"{where}:{line}" if line else where


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sentence(where: str, problem: str, hint: str) -> str:
    return f"{where}: {problem.rstrip('.')}.{' ' + hint if hint else ''}"
