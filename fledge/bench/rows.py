"""results.jsonl: one valid line per measured question and repeat, which survives whatever happens to the run.

A row belongs to the *settings* it was measured with: their fingerprint is in every row. The file only ever holds rows
of the current settings; rows of others are set aside in `results-<fingerprint>.jsonl` and come back when those settings
do. Knows JSON lines and files; of a row it knows only the key.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fledge.console import counted, form, say, warn
from fledge.errors import naming
from fledge.outputs import Output, claim, document_has, write_file

Row = dict[str, Any]
Key = tuple[str, ...]
RESULTS = "results.jsonl"
BENCHMARK = Output(
    "bench",
    (RESULTS, "results-*.jsonl", "run.json", "summary.json", "report.md", "report.html"),
    lambda folder: (
        document_has(folder / "run.json", "fingerprint", "settings")
        or document_has(folder / "summary.json", "fingerprint", "sets")
    ),
)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
FINGERPRINT = re.compile("[0-9a-f]{12}")
KEY_FIELDS = ("dataset", "question_id", "question_sha", "repeat", "side", "concurrency")  # the last two: servers only


def fingerprint(settings: dict[str, Any]) -> str:
    """12 hex digits that change when any setting does."""
    text = json.dumps(without_names(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def without_names(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, but no name of a model whose files are told apart: one folder has many paths."""
    return {key: value for key, value in settings.items() if f"{key}_files" not in settings}


def code_fingerprint() -> str:
    """12 hex digits of the source files whose behaviour is measured: edited code starts a new set of rows."""
    import fledge

    root = Path(fledge.__file__).parent
    digest = hashlib.sha256()
    for path in measured_files(root):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def measured_files(root: Path) -> list[Path]:
    """Where the package decides what is decoded and how fast."""
    found = [path for stage in ("target", "drafters", "decoding") for path in sorted((root / stage).rglob("*.py"))]
    return [*found, root / "bench" / "measure.py"]


def folder_fingerprint(name_or_path: str) -> str:
    """What a model path stands for now: for a local folder its model files' sizes and contents, else its name.

    Files above 256 MB count with size and modification time only: reading a large target twice costs minutes.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return hashlib.sha256(name_or_path.encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".safetensors", ".bin", ".gguf") and path.name not in MODEL_FILES:
            continue
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size}".encode())
        digest.update(path.read_bytes() if stat.st_size < 256e6 else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:12]


def row_key(row: Row) -> Key:
    """What makes a row unique among those of the same settings."""
    return tuple(str(row.get(field, "")) for field in KEY_FIELDS)


class Results:
    """The rows of one run's settings, on disk and in memory. Use `open_results`."""

    def __init__(self, path: Path, own: str) -> None:
        self.path, self.fingerprint = path, own
        self._rows: dict[Key, Row] = {row_key(row): row for row in self._collect()}
        _rewrite(path, list(self._rows.values()))

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """Finished rows, in the order they were measured."""
        return list(self._rows.values())

    def append(self, row: Row) -> None:
        """Add a finished row: on disk, as one line, before this returns."""
        row = {"fingerprint": self.fingerprint, **row}
        assert row_key(row) not in self._rows, f"row {row_key(row)} measured twice"
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with naming(self.path), self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows[row_key(row)] = row

    def _collect(self) -> list[Row]:
        """Own rows of results.jsonl and of a set-aside file; foreign rows are moved out of results.jsonl."""
        own: list[Row] = []
        foreign: dict[str, list[Row]] = {}
        for row in read_rows(self.path):
            if row.get("fingerprint") == self.fingerprint:
                own.append(row)
            else:
                foreign.setdefault(str(row.get("fingerprint")), []).append(row)
        for other, rows in foreign.items():
            aside = set_aside(self.path, other)
            _rewrite(aside, [*read_rows(aside), *rows])
            say(f"{counted(len(rows), 'row')} of other settings: kept in {aside.name}.")
        aside = set_aside(self.path, self.fingerprint)
        own = read_rows(aside) + own
        if own:
            _rewrite(self.path, own)  # before the set-aside copy goes, so that a crash here loses nothing
        aside.unlink(missing_ok=True)
        return own


@contextlib.contextmanager
def open_results(folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> Iterator[Results]:
    """The results of these settings in a folder that is this benchmark's alone while they are open."""
    with claim(folder, BENCHMARK, overwrite=overwrite):
        yield Results(folder / RESULTS, fingerprint(settings))


def set_aside(results: Path, fingerprint: str) -> Path:
    """Where rows of these settings wait while results.jsonl holds those of others."""
    return results.with_name(f"{results.stem}-{fingerprint}.jsonl")


def rows_of(folder: Path, fingerprint: str) -> list[Row]:
    """The rows of these settings, in results.jsonl or set aside."""
    results = folder / RESULTS
    found = [*read_rows(set_aside(results, fingerprint)), *read_rows(results)]
    return [row for row in found if row.get("fingerprint") == fingerprint]


def read_rows(path: Path) -> list[Row]:
    """Every readable row; a line torn by a crash is counted and left out."""
    if not path.is_file():
        return []
    rows, torn = [], 0
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate could not be written back
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and _is_whole(row):
            rows.append(row)
        else:
            torn += 1
    if torn:
        lines = form(torn, "line, torn by an interrupted run, was", "lines, torn by an interrupted run, were")
        warn(f"{path}: {torn} unreadable {lines} dropped; what stood there is measured again.")
    return rows


def _is_whole(row: Row) -> bool:
    """Whether a line is a row of a benchmark. Its fingerprint becomes part of a file's name: hex digits only."""
    mark = row.get("fingerprint", "0" * 12)
    return isinstance(row.get("dataset"), str) and isinstance(mark, str) and bool(FINGERPRINT.fullmatch(mark))


def _rewrite(path: Path, rows: list[Row]) -> None:
    """Replace the file atomically by exactly these rows."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
