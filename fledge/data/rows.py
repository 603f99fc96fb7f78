"""Files, folders and hub data sets, as one stream of rows that know where they came from.

Knows containers (JSON lines, JSON arrays, parquet, arrow folders, hub names), not conversations. A row that cannot be
read carries its error instead of a value, so that one broken line is one rejected row named by file and line, where a
table reader would give up on the whole file. Nothing is held: a million rows need the memory of one.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fledge.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet")
OUR_OWN_FILES = ("rejects.jsonl", "manifest.json", "run.json", "dataset_info.json", "state.json")
CHUNK = 1 << 20
LARGEST_ROW = 64 << 20


@dataclass(frozen=True)
class Row:
    """One row: `where` is file:line (or file:row), `key` a stable id from file and position."""

    where: str
    key: str
    value: dict[str, Any] | None
    error: str | None = None


def read_rows(path_or_name: str, split: str = "train") -> Iterator[Row]:
    """Stream the rows of a file, a folder of files, a saved `datasets` folder or a hub data set."""
    check_source(path_or_name)
    path = Path(path_or_name).expanduser()
    if path.is_dir() and (path / "dataset_info.json").is_file():
        yield from _saved_dataset_rows(path)
    elif path.exists():
        files = data_files(path)
        for file in files:
            key = file.stem if len(files) == 1 else file.relative_to(path).as_posix()
            yield from _file_rows(file, key)
    else:
        yield from _hub_rows(path_or_name, split)


def data_files(path: Path) -> list[Path]:
    """The data files behind a path that exists: itself, or those of a folder in a stable order."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown file type. Give {', '.join(SUFFIXES)}, a folder of those, or a hub name.")
        return [path]
    files = sorted(
        file for file in path.rglob("*")
        if file.name.endswith(SUFFIXES) and file.name not in OUR_OWN_FILES and not file.name.startswith(".")
    )  # fmt: skip
    if not files:
        raise UserError(f"{path}: no data files in this folder. It needs files ending in {', '.join(SUFFIXES)}.")
    return files


def check_source(path_or_name: str) -> None:
    """Stop when a name that reads like a path leads nowhere, before a tokenizer is loaded or the hub is asked."""
    path = Path(path_or_name).expanduser()
    looks_like_path = path_or_name.endswith(SUFFIXES) or path_or_name.startswith((".", "/", "~"))
    if not path_or_name or not path.exists() and (looks_like_path or path_or_name.count("/") > 1):
        name = path_or_name or "(empty path)"
        raise UserError(f"{name}: no such file or folder. Check the path (current folder: {Path.cwd()}).")


def is_local(path_or_name: str) -> bool:
    """Whether the data lies on this machine (its content can be hashed and its rows counted)."""
    return Path(path_or_name).expanduser().exists()


def content_hash(path_or_name: str) -> str:
    """A digest of every byte of local data, file names included."""
    path = Path(path_or_name).expanduser()
    digest = hashlib.blake2b(digest_size=20)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() if path.is_dir() else file.stem.encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(4 * CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def count_rows(path_or_name: str) -> int | None:
    """How many rows a progress bar should expect; None where only reading them would tell."""
    path = Path(path_or_name).expanduser()
    if not path.exists() or (path / "dataset_info.json").is_file():
        return None
    total = 0
    for file in data_files(path):
        if file.suffix == ".parquet":
            total += _open_parquet(file).metadata.num_rows
        elif file.suffix in (".jsonl", ".ndjson"):
            with open(file, "rb") as stream:
                while chunk := stream.read(4 * CHUNK):
                    total += chunk.count(b"\n")
        else:
            return None
    return total


def _file_rows(file: Path, key: str) -> Iterator[Row]:
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, key)
    elif file.suffix == ".gz":
        with gzip.open(file, "rb") as stream:
            yield from _json_lines(stream, file, key)
    elif file.suffix == ".json" and _first_character(file) == "[":
        yield from _json_array(file, key)
    else:
        with open(file, "rb") as stream:
            yield from _json_lines(stream, file, key)


def _json_lines(stream: IO[bytes] | gzip.GzipFile, file: Path, key: str) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where, row_key = f"{file}:{number}", f"{key}-{number - 1}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(where, row_key, None, f"not valid JSON ({error})")
            continue
        yield _row(where, row_key, value)


def _json_array(file: Path, key: str) -> Iterator[Row]:
    """The elements of a JSON array, decoded one by one from a moving window over the file."""
    decoder = json.JSONDecoder()
    line, index = 1, 0
    with open(file, encoding="utf-8-sig") as stream:
        while not (window := stream.read(CHUNK)).strip():
            line += window.count("\n")
        position = window.index("[") + 1
        while True:
            position = _skip(window, position, " \t\r\n,")
            line += window.count("\n", 0, position)
            window, position = window[position:], 0
            if window.startswith("]"):
                return
            try:
                value, position = decoder.raw_decode(window)
            except json.JSONDecodeError as error:
                more = stream.read(max(CHUNK, len(window))) if len(window) < LARGEST_ROW else ""
                if not more:
                    raise UserError(
                        f"{file}:{line + error.lineno - 1}: element {index} of the array is not valid JSON "
                        f"({error.msg}). Fix the file, or write one JSON object per line (.jsonl): there a broken line "
                        f"costs one row."
                    ) from None
                window += more
                continue
            yield _row(f"{file}:{line}", f"{key}-{index}", value)
            line, index = line + window.count("\n", 0, position), index + 1
            window, position = window[position:], 0


def _parquet_rows(file: Path, key: str) -> Iterator[Row]:
    parquet, index = _open_parquet(file), 0
    for batch in parquet.iter_batches(batch_size=256):
        for value in batch.to_pylist():
            yield _row(f"{file}:row {index}", f"{key}-{index}", value)
            index += 1


def _saved_dataset_rows(path: Path) -> Iterator[Row]:
    import datasets

    for index, value in enumerate(datasets.load_from_disk(str(path))):
        yield _row(f"{path}:row {index}", f"{path.name}-{index}", value)


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    """Stream a hub data set, `org/name` or `org/name:configuration`."""
    repository, _, configuration = name.partition(":")
    import datasets

    try:
        stream = datasets.load_dataset(repository, configuration or None, split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds: not found, offline, no such split or configuration
        raise UserError(
            f"{name}: neither a file or folder here nor a data set that could be read from the hub "
            f"({type(error).__name__}: {str(error)[:300]}). Check the path, the name or the split {split!r}."
        ) from None
    for index, value in enumerate(stream):
        yield _row(f"{name}:{split} row {index}", f"{repository.split('/')[-1]}-{split}-{index}", value)


def _row(where: str, key: str, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(where, key, None, f"a row is a JSON object, found {type(value).__name__}")
    return Row(where, key, value)


def _open_parquet(file: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}). Write or download it again.") from None


def _first_character(file: Path) -> str:
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        return stream.read(4096).lstrip()[:1]


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
