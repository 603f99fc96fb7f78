"""Files, folders and hub data sets, as one stream of rows that know where they came from.

Knows where data lies; the containers are read by `row_files.py`, conversations are none of its business. A row that
cannot be read carries its error instead of a value, so that one broken line is one rejected row named by file and line,
where a table reader would give up on the whole file. Nothing is held: a million rows need the memory of one.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fledge.console import say
from fledge.data.row_files import SUFFIXES, Row, file_rows, open_parquet, row, suffix_of
from fledge.data.sealed import is_unfinished
from fledge.errors import UserError
from fledge.offline import stop_asking_an_unknown_hub

__all__ = ["ANSWER_MARK", "Row", "check_source", "content_hash", "count_rows", "data_files", "is_local", "read_rows"]

# What fledge, the datasets library and the hub write beside rows; none of it is a row.
NOT_ROWS = (
    "rejects.jsonl", "manifest.json", "run.json", "provenance.json", "report.json", "dataset_info.json",
    "dataset_infos.json", "dataset_dict.json", "state.json",
)  # fmt: skip
ANSWER_MARK = "#answer"  # ID#answer2 is the second answer to the prompt ID
FILES_NAMED = 5
CHUNK = 4 << 20


def read_rows(path_or_name: str, split: str = "train") -> Iterator[Row]:
    """Stream the rows of a file, a folder of files, a saved `datasets` folder or a hub data set."""
    check_source(path_or_name)
    path = Path(path_or_name).expanduser()
    if not path.exists():
        yield from _hub_rows(path_or_name, split)
    elif (saved := _saved_dataset(path, split)) is not None:
        yield from _saved_dataset_rows(saved)
    else:
        files = data_files(path)
        if path.is_dir():
            _say_files(path, tuple(files))
        for file in files:
            key = file.name.removesuffix(suffix_of(file)) if len(files) == 1 else file.relative_to(path).as_posix()
            yield from file_rows(file, key)


def data_files(path: Path) -> list[Path]:
    """The data files behind a path that exists: itself, or those of a folder in a stable order."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown file type. Give {', '.join(SUFFIXES)}, a folder of those, or a hub name.")
        return [path]
    files = sorted(file for file in path.rglob("*") if _holds_rows(file, path))
    if not files and is_unfinished(path):
        raise UserError(
            f"{path}: a run of `fledge regenerate` that has not finished a file yet. Start the same command again: it "
            "goes on where it was (--data-shard-size says how many rows make a file)."
        )
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
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def count_rows(path_or_name: str) -> int | None:
    """How many rows a progress bar should expect; None where only reading them would tell."""
    path = Path(path_or_name).expanduser()
    if not path.exists() or any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return None
    total = 0
    for file in data_files(path):
        if file.suffix == ".parquet":
            total += open_parquet(file).metadata.num_rows
        elif file.suffix in (".jsonl", ".ndjson"):
            with open(file, "rb") as stream:
                while chunk := stream.read(CHUNK):
                    total += chunk.count(b"\n")
        else:
            return None
    return total


def _holds_rows(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is data: no hidden file or folder (`.ipynb_checkpoints`), nothing written beside."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
    return file.name.endswith(SUFFIXES) and file.name not in NOT_ROWS and not hidden and file.is_file()


@cache  # the data is read several times (counted, tokenised); this is said once
def _say_files(folder: Path, files: tuple[Path, ...]) -> None:
    names = [file.relative_to(folder).as_posix() for file in files]
    more = f" and {len(names) - FILES_NAMED} more" if len(names) > FILES_NAMED else ""
    say(f"{folder}: {len(names)} data files: {', '.join(names[:FILES_NAMED])}{more}")


def _saved_dataset(path: Path, split: str) -> Path | None:
    """The folder of a saved `datasets.Dataset`, or of one split of a saved `DatasetDict`; None for other paths."""
    if (path / "dataset_dict.json").is_file():
        if not (path / split / "dataset_info.json").is_file():
            splits = sorted(child.parent.name for child in path.glob("*/dataset_info.json"))
            raise UserError(
                f"{path}: no split {split!r}, it has {', '.join(splits) or 'none'}. Give one of its folders."
            )
        return path / split
    return path if (path / "dataset_info.json").is_file() else None


def _saved_dataset_rows(path: Path) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
        for index, value in enumerate(saved):
            yield row(f"{path}:row {index}", f"{path.name}-{index}", value, from_table=True)
    except Exception as error:  # the library's and arrow's kinds: missing or damaged files, unknown features
        raise UserError(
            f"{path}: not a readable saved data set ({type(error).__name__}: {' '.join(str(error).split())[:300]}). "
            f"Save or copy it again."
        ) from None


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    """Stream a hub data set, `org/name` or `org/name:configuration`."""
    repository, _, configuration = name.partition(":")
    stop_asking_an_unknown_hub()
    import datasets

    try:
        stream = datasets.load_dataset(repository, configuration or None, split=split, streaming=True)
    except Exception as error:  # the hub client raises many kinds: not found, offline, no such split or configuration
        raise UserError(
            f"{name}: neither a file or folder here nor a data set that could be read from the hub "
            f"({type(error).__name__}: {str(error)[:300]}). Check the path, the name or the split {split!r}."
        ) from None
    for index, value in enumerate(stream):
        key = f"{repository.split('/')[-1]}-{split}-{index}"
        yield row(f"{name}:{split} row {index}", key, value, from_table=True)
