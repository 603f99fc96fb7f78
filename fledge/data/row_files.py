"""One data file as a stream of rows: JSON lines, JSON arrays, parquet and arrow, compressed or not.

Knows containers, not conversations. JSON is read strictly (no NaN, no lone surrogates, no text behind the end): a bad
line is a row with an error; what ends the file for good (a cut .gz, a broken array, damaged pages) is a UserError with
the place. Values of a table come out as JSON would hold them: dates as text, pictures as data URLs, and no field that
arrow only added to give all structs the same fields.
"""

import base64
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import msgspec
from PIL import Image

from fledge.data.images import source_of_value
from fledge.errors import UserError

PLAIN_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (
    *PLAIN_SUFFIXES, *(suffix + ".gz" for suffix in PLAIN_SUFFIXES), *(suffix + ".zst" for suffix in PLAIN_SUFFIXES),
    ".parquet", ".arrow",
)  # fmt: skip
CHUNK = 1 << 20
LARGEST_ROW = 64 << 20
LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # how UTF-16 and UTF-32 files begin
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row: `where` is file:line (or file:row), `key` a stable id from file and position."""

    where: str
    key: str
    value: dict[str, Any] | None
    error: str | None = None


def file_rows(file: Path, key: str) -> Iterator[Row]:
    """Stream the rows of a data file, whatever its container."""
    suffix = suffix_of(file)
    if suffix == ".parquet":
        yield from _table_rows(open_parquet(file).iter_batches(batch_size=256), file, key)
    elif suffix == ".arrow":
        yield from _table_rows(_arrow_batches(file), file, key)
    else:
        with _opened(file) as stream:
            try:
                start = stream.peek(4)
                _refuse_wide_encoding(start, file)
                if suffix.startswith(".json") and not suffix.startswith(".jsonl") and _is_array(stream):
                    yield from _json_array(stream, file, key)
                else:
                    yield from _json_lines(stream, file, key)
            except (
                EOFError,
                OSError,
                zlib.error,
            ) as error:  # cut short, a wrong checksum, something else
                raise UserError(
                    f"{file}: cannot be read to its end ({error}). The file is cut or damaged: write or download it "
                    f"again."
                ) from None


def suffix_of(file: Path) -> str:
    """The known suffix of a data file, compression included."""
    return max((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), key=len, default="")


def row(where: str, key: str, value: Any, *, from_table: bool = False) -> Row:
    """A decoded value as a row; values of a table are made plain first."""
    if not isinstance(value, dict):
        return Row(where, key, None, f"a row is a JSON object, found {type(value).__name__}")
    return Row(where, key, plain(value) if from_table else value)


def plain(value: Any) -> Any:
    """A value of a table as JSON holds it. Fields that are None are left out: arrow fills structs with them."""
    if isinstance(value, dict):
        if _is_picture(value):
            return _picture(value)
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return _text_or_base64(bytes(value))
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    return source_of_value(value) if isinstance(value, Image.Image) else str(value)


def _is_picture(value: dict[str, Any]) -> bool:
    embedded, named = value.get("bytes"), value.get("path")
    return (isinstance(embedded, (bytes, bytearray)) and bool(embedded)) or (
        value.keys() == {"bytes", "path"} and isinstance(named, str) and bool(named)
    )


def _picture(value: dict[str, Any]) -> Any:
    """{"bytes": ..., "path": ...} as its source; in a part of a message, under the part's key `image`."""
    source = source_of_value({name: value.get(name) for name in ("bytes", "path")})
    others = {name: plain(item) for name, item in value.items() if name not in ("bytes", "path") and item is not None}
    return {**others, "image": source} if others else source


def _text_or_base64(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return base64.b64encode(content).decode()


# ---- JSON --------------------------------------------------------------------------------------------------------


def _opened(file: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed."""
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file, "rb"), CHUNK)  # type: ignore[arg-type]  # has all that a raw stream has
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), CHUNK)
    return open(file, "rb")


def _refuse_wide_encoding(start: bytes, file: Path) -> None:
    if start.startswith(WIDE_MARKS) or b"\0" in start[:4]:
        raise UserError(
            f"{file}: not UTF-8 (it begins with the bytes {start[:4].hex(' ')}, as UTF-16 or UTF-32 does). Convert it, "
            f"for example with `iconv -f UTF-16 -t UTF-8`."
        )


def _is_array(stream: io.BufferedReader) -> bool:
    """Whether the text begins with `[`, after a byte order mark and whitespace. Consumes nothing."""
    return stream.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["


def _json_lines(stream: IO[bytes], file: Path, key: str) -> Iterator[Row]:
    decode = msgspec.json.decode
    number = offset = 0
    while line := stream.readline(LARGEST_ROW):
        number += 1
        where, row_key, begin = f"{file}:{number}", f"{key}-{number - 1}", offset
        offset += len(line)
        if len(line) == LARGEST_ROW and not line.endswith(b"\n"):
            while (rest := stream.readline(LARGEST_ROW)) and not rest.endswith(b"\n"):
                offset += len(rest)
            offset += len(rest)
            yield Row(where, row_key, None, f"longer than {LARGEST_ROW >> 20} MiB, the most that is read as one row")
            continue
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            value = decode(line)
        except (ValueError, RecursionError) as error:
            yield Row(where, row_key, None, _problem(line, error, begin))
            continue
        yield row(where, row_key, value)


def _problem(line: bytes, error: Exception, begin: int) -> str:
    """What is wrong with a line that is no JSON; `begin` is its offset in the file."""
    try:
        line.decode()
    except UnicodeDecodeError as found:
        return f"not UTF-8 (byte {begin + found.start} of the file is 0x{line[found.start]:02x})"
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply)"
    if surrogate := _lone_surrogate(line):
        return f"not valid JSON (lone surrogate {surrogate}, half of a character)"
    return f"not valid JSON ({error})"


def _lone_surrogate(line: bytes) -> str | None:
    """The escape of a lone surrogate, in a text that the standard library can still read; else None."""
    if not LONE_SURROGATE.search(line):
        return None
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    except (ValueError, RecursionError):
        return None
    return None


class _ArrayText:
    """A window that moves over the text of a JSON array, and the line it begins at."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        self._stream, self._file = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), file
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant)
        self.text, self.line, self.index = "", 1, 0

    def next_character(self) -> str:
        """The next character that is no whitespace; empty at the end of the file."""
        while True:
            stripped = self.text.lstrip(" \t\r\n")
            self.line += self.text.count("\n", 0, len(self.text) - len(stripped))
            self.text = stripped
            if stripped or not self._read(CHUNK):
                return stripped[:1]

    def take(self, number: int = 1) -> str:
        taken, self.text = self.text[:number], self.text[number:]
        self.line += taken.count("\n")
        return taken

    def element(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text)
                break
            except RecursionError:
                raise self.error("is nested too deeply", self.line) from None
            except json.JSONDecodeError as error:
                if len(self.text) < LARGEST_ROW and self._read(max(CHUNK, len(self.text))):
                    continue
                raise self.error(f"is not valid JSON ({error.msg})", self.line + error.lineno - 1) from None
            except ValueError as error:
                raise self.error(f"is not valid JSON ({error})", self.line) from None
        taken = self.take(end)
        if "\\ud" in taken.lower() and (surrogate := _lone_surrogate(taken.encode("utf-8", "surrogatepass"))):
            return Row("", "", None, f"not valid JSON (lone surrogate {surrogate}, half of a character)")
        return value

    def error(self, problem: str, line: int) -> UserError:
        return UserError(
            f"{self._file}:{line}: element {self.index} of the array {problem}. Fix the file, or write one JSON object "
            f"per line (.jsonl): there a broken line costs one row."
        )

    def _read(self, number: int) -> bool:
        try:
            more = self._stream.read(number)
        except UnicodeDecodeError as error:
            offset = self._stream.buffer.tell() - len(error.object) + error.start
            raise UserError(
                f"{self._file}: not UTF-8 (byte {offset} of the file is 0x{error.object[error.start]:02x}). Convert it "
                f"to UTF-8."
            ) from None
        self.text += more
        return bool(more)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_array(stream: IO[bytes], file: Path, key: str) -> Iterator[Row]:
    """The elements of a JSON array, decoded one by one."""
    array = _ArrayText(stream, file)
    array.next_character()
    array.take()  # the bracket
    if array.next_character() != "]":
        while True:
            array.next_character()
            where, row_key = f"{file}:{array.line}", f"{key}-{array.index}"
            value = array.element()
            yield Row(where, row_key, None, value.error) if isinstance(value, Row) else row(where, row_key, value)
            array.index += 1
            following = array.next_character()
            if following == "]":
                break
            if following != ",":
                found = f"{following!r}" if following else "the end of the file"
                raise array.error(f"does not follow a comma: found {found}", array.line)
            array.take()
    array.take()
    if trailing := array.next_character():
        raise UserError(
            f"{file}:{array.line}: {trailing!r} after the end of the array. Remove what follows the closing bracket, "
            f"or write one JSON object per line (.jsonl)."
        )


# ---- tables ------------------------------------------------------------------------------------------------------


def open_parquet(file: Path) -> Any:
    """A parquet file, its footer read; damaged ones are one line."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}). Write or download it again.") from None


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Record batches of an arrow file, in the format of files or of streams."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        reader = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _table_rows(batches: Iterator[Any], file: Path, key: str) -> Iterator[Row]:
    import pyarrow

    index = 0
    try:
        for batch in batches:
            for value in batch.to_pylist(maps_as_pydicts="lossy"):
                yield row(f"{file}:row {index}", f"{key}-{index}", value, from_table=True)
                index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{file}: damaged at or after row {index} ({' '.join(str(error).split())[:300]}). Write or download it "
            f"again."
        ) from None
