"""Exactly-once shards: every input row ends up in its shard once, however often the run is killed.

Knows row numbers, JSON rows, files and how they survive a crash. Knows nothing of prompts, servers or what a row means
(`tally` counts that for the manifest). Row i belongs to shard i // shard_size, so an uninterrupted run and one that was
killed a hundred times have the same rows in the same shards:

    OUTPUT_DIR/shard-00000.jsonl      rows of a finished shard, in input order; appears whole (temporary name, rename)
               manifest.json          settings, counts, checksums; "complete": true once every row is accounted for
               rejects.jsonl          rows without an answer: id, reason, detail
               .journal/00003.partial finished rows of a shard under way, in the order they finished, one write() each
               .journal/00000.sealed  facts about a finished shard; a shard is finished if and only if this file exists

A line of a partial file is `row number TAB kind TAB crc32 TAB JSON`: a torn or damaged line is recognised and cut away,
and its row is asked again. A line reaches the kernel before its row counts as done, which is all that SIGKILL asks for;
`sync` (call it every few seconds) makes a power cut no worse than a few repeated rows.
"""

import hashlib
import json
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from fledge.console import warn
from fledge.data.sealed import JournalManifest, Sealed, check_file, read_sealed, shard_name
from fledge.errors import UserError, naming
from fledge.outputs import Output, claim, in_full, write_file, write_json, writing
from fledge.parsing import parse_json, read_json
from fledge.redaction import redact, redacted

FORMAT = 1
MANIFEST_EVERY_S = 10.0
ROW, REJECT = b"row", b"reject"
ANSWERS = Output(
    "regenerate", ("shard-*.jsonl", "manifest.json", "rejects.jsonl", "run.json", ".journal"),
    lambda folder: (folder / ".journal").is_dir(),
)  # fmt: skip


@dataclass
class _Shard:
    """A shard under way: where each finished row lies in its partial file."""

    number: int
    first: int
    size: int
    file: BinaryIO
    end: int = 0
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)  # row number -> offset and length of its JSON
    rejects: dict[int, dict[str, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def has(self, index: int) -> bool:
        return index in self.lines or index in self.rejects

    def full(self) -> bool:
        return len(self.lines) + len(self.rejects) == self.size


class Journal:
    """The output folder of one run over `total` input rows; a context manager that holds the folder's lock."""

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        shard_size: int,
        settings: Mapping[str, Any],
        tally: Callable[[dict[str, Any]], Mapping[str, int]] = lambda row: {},
        overwrite: bool = False,
    ) -> None:
        if shard_size < 1:
            raise UserError(f"the shard size is {shard_size}; it must be at least 1.")
        self.folder, self.total, self.shard_size, self._tally = folder, total, shard_size, tally
        self.settings = json.loads(
            json.dumps(redacted({**settings, "data_shard_size": shard_size, "input_rows": total}))
        )
        self._inner, self._overwrite = folder / ".journal", overwrite
        self._open: dict[int, _Shard] = {}
        self._sealed: dict[int, Sealed] = {}
        self._manifest_time = 0.0
        self._closing = threading.Lock()

    def __enter__(self) -> "Journal":
        self._claim = claim(self.folder, ANSWERS, overwrite=self._overwrite)
        try:
            self._inner.mkdir(exist_ok=True)
            self._check_settings()
            self._load()
            self.write_manifest()
        except BaseException:
            self._claim.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for shard in self._open.values():
                os.fsync(shard.file.fileno())
                shard.file.close()
            self.write_manifest()
            self.write_rejects()
        finally:
            self._claim.release()

    # -- what a run asks and says

    def is_done(self, index: int) -> bool:
        """Whether row `index` has an answer or was rejected for good."""
        number = index // self.shard_size
        return number in self._sealed or (number in self._open and self._open[number].has(index))

    @property
    def num_done(self) -> int:
        return sum(self._size(number) for number in self._sealed) + sum(
            len(shard.lines) + len(shard.rejects) for shard in self._open.values()
        )

    @property
    def complete(self) -> bool:
        return self.num_done == self.total

    def counts(self) -> Counter[str]:
        """The tallies of all rows so far, with `rows` and `rejected: REASON` beside them."""
        total: Counter[str] = Counter()
        for sealed in self._sealed.values():
            total.update(sealed.counts)
        for shard in self._open.values():
            total.update(_all_counts(shard))
        return total

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Row `index` is answered; its shard is sealed when this was the last one."""
        shard = self._shard_for(index)
        payload = json.dumps(row, ensure_ascii=False).encode()
        shard.lines[index] = self._append(shard, index, ROW, payload)
        shard.counts.update(self._tally(dict(row)))
        if shard.full():
            self._seal(shard)

    def reject(self, index: int, row_id: str, reason: str, detail: str = "", where: str = "") -> None:
        """Row `index` gets no answer, for this reason."""
        shard = self._shard_for(index)
        entry = {"id": row_id, "where": where, "reason": reason, "detail": redact(detail)}
        self._append(shard, index, REJECT, json.dumps(entry, ensure_ascii=False).encode())
        shard.rejects[index] = entry
        if shard.full():
            self._seal(shard)

    def sync(self) -> None:
        """Put everything written so far on the disk. The only method another thread may call."""
        for handle in self._handles():
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _handles(self) -> list[int]:
        """Duplicates, because a shard may be sealed and closed while its file is being synced."""
        with self._closing:
            return [os.dup(shard.file.fileno()) for shard in self._open.values()]

    def rejects(self) -> Iterator[dict[str, str]]:
        """Every rejected row, in input order."""
        for number in sorted({*self._sealed, *self._open}):
            known = self._sealed[number].rejects if number in self._sealed else self._open[number].rejects
            yield from (entry for _, entry in sorted(known.items()))

    def reopen(self, worth_another_try: Callable[[str], bool]) -> int:
        """Forget the rejects with such a reason, so that their rows are asked again. Returns how many."""
        forgotten = 0
        for number, sealed in sorted(self._sealed.items()):
            if any(worth_another_try(entry["reason"]) for entry in sealed.rejects.values()):
                self._unseal(number, sealed)
        for number, shard in list(self._open.items()):
            keep = {index: entry for index, entry in shard.rejects.items() if not worth_another_try(entry["reason"])}
            if len(keep) < len(shard.rejects):
                forgotten += len(shard.rejects) - len(keep)
                self._write_partial(number, ((index, self._payload(shard, index)) for index in shard.lines), keep)
                shard.file.close()
                self._open[number] = self._read_partial(number)
        return forgotten

    # -- start

    def _check_settings(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            if any(self.folder.glob("shard-*.jsonl")):
                raise UserError(f"{self.folder}: has shards but no manifest.json. Choose an empty --output-dir.")
            return
        before = read_json(path, JournalManifest, hint="Choose another --output-dir.")
        if before.format != FORMAT:
            raise UserError(f"{path}: not a manifest of this version of fledge. Choose another --output-dir.")
        then = before.settings
        different = [
            f"{name} was {then.get(name)!r}, now {self.settings.get(name)!r}"
            for name in sorted({*then, *self.settings})
            if in_full(then.get(name)) != in_full(self.settings.get(name))
        ]
        if different:
            raise UserError(
                f"{self.folder}: holds a run with other settings: {'; '.join(different)}. "
                "Give the same settings to continue it, or another --output-dir."
            )

    def _load(self) -> None:
        for path in sorted(self._inner.glob("*.sealed")):
            sealed = read_sealed(path)
            number, offset = divmod(sealed.first_row, self.shard_size)
            names = (path.stem, sealed.file)
            if offset or names != (f"{number:05d}", shard_name(number)) or sealed.input_rows != self._size(number):
                raise UserError(f"{path}: its rows are not those of shard {path.stem}. Restore it, or delete it.")
            check_file(self.folder, sealed)
            self._sealed[number] = sealed
        for path in sorted(self._inner.glob("*.partial")):
            number = int(path.stem)
            if number in self._sealed:
                path.unlink()  # killed after sealing, before tidying up
                continue
            shard = self._open[number] = self._read_partial(number)
            if shard.full():
                self._seal(shard)  # killed after the last row, before sealing

    def _read_partial(self, number: int) -> _Shard:
        shard = self._new_shard(number)
        with open(shard.file.name, "rb") as lines:
            for line in lines:
                if not self._take_line(shard, line):
                    break
        size = os.path.getsize(shard.file.name)
        if shard.end < size:
            os.ftruncate(shard.file.fileno(), shard.end)
            warn(f"{shard.file.name}: cut {size - shard.end} bytes of an unfinished line; its row is asked again.")
        shard.file.seek(shard.end)
        return shard

    def _take_line(self, shard: _Shard, line: bytes) -> bool:
        """Enter one line of a partial file; False where the line is not whole."""
        head, kind, crc, payload = (line.rstrip(b"\n").split(b"\t", 3) + [b""] * 4)[:4]
        if not line.endswith(b"\n") or crc != _crc(head, kind, payload):
            return False
        index, where = int(head), str(shard.file.name)
        if kind == ROW:
            content = parse_json(payload, dict[str, Any], where)
            shard.lines[index] = (shard.end + len(line) - 1 - len(payload), len(payload))
            shard.counts.update(self._tally(content))
        else:
            shard.rejects[index] = parse_json(payload, dict[str, str], where)
        shard.end += len(line)
        return True

    # -- writing

    def _size(self, number: int) -> int:
        return min(self.shard_size, self.total - number * self.shard_size)

    def _new_shard(self, number: int) -> _Shard:
        path = self._inner / f"{number:05d}.partial"
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        file.close()
        return _Shard(number, number * self.shard_size, self._size(number), open(path, "r+b", buffering=0))

    def _shard_for(self, index: int) -> _Shard:
        assert 0 <= index < self.total, f"{index=} {self.total=}"
        assert not self.is_done(index), f"row {index} is already done"
        number = index // self.shard_size
        if number not in self._open:
            with self._closing:
                self._open[number] = self._new_shard(number)
        return self._open[number]

    def _append(self, shard: _Shard, index: int, kind: bytes, payload: bytes) -> tuple[int, int]:
        """One write() per line. Returns where the JSON lies."""
        head = str(index).encode()
        line = b"\t".join((head, kind, _crc(head, kind, payload), payload)) + b"\n"
        try:
            with naming(Path(shard.file.name)):
                _write_all(shard.file, line)
        except OSError:  # a full disk: what is there of the line must not stand before the next one
            shard.file.truncate(shard.file.seek(shard.end))
            raise
        shard.end += len(line)
        return shard.end - 1 - len(payload), len(payload)

    def _payload(self, shard: _Shard, index: int) -> bytes:
        offset, length = shard.lines[index]
        return os.pread(shard.file.fileno(), length, offset)

    def _seal(self, shard: _Shard) -> None:
        """Sort a full shard into input order and give it its name. Killed at any point, the next start repeats it."""
        name = shard_name(shard.number)
        checksum, size = hashlib.sha256(), 0
        with writing(self.folder / name, self._inner / f"{name}.tmp") as out:
            for index in sorted(shard.lines):
                line = self._payload(shard, index) + b"\n"
                out.write(line)
                checksum.update(line)
                size += len(line)
        sealed = Sealed(
            file=name, first_row=shard.first, input_rows=shard.size, rows=len(shard.lines), bytes=size,
            sha256=checksum.hexdigest(), counts=dict(_all_counts(shard)), rejects=shard.rejects,
        )  # fmt: skip
        write_json(self._inner / f"{shard.number:05d}.sealed", msgspec.structs.asdict(sealed))
        self._sealed[shard.number] = sealed
        with self._closing:
            self._open.pop(shard.number)
            shard.file.close()
        os.unlink(shard.file.name)
        if time.monotonic() - self._manifest_time > MANIFEST_EVERY_S:
            self.write_manifest()

    def _unseal(self, number: int, sealed: Sealed) -> None:
        """The reverse of `_seal`: rows keep their numbers because everything not rejected is in the shard, in order."""
        rows = range(sealed.first_row, sealed.first_row + sealed.input_rows)
        answered = [index for index in rows if index not in sealed.rejects]
        with open(self.folder / sealed.file, "rb") as lines:
            payloads = ((index, line.rstrip(b"\n")) for index, line in zip(answered, lines, strict=True))
            self._write_partial(number, payloads, sealed.rejects)
        (self._inner / f"{number:05d}.sealed").unlink()
        (self.folder / sealed.file).unlink()
        del self._sealed[number]
        self._open[number] = self._read_partial(number)

    def _write_partial(
        self, number: int, rows: Iterable[tuple[int, bytes]], rejects: dict[int, dict[str, str]]
    ) -> None:
        partial = self._inner / f"{number:05d}.partial"
        with writing(partial, partial.with_name(f"{partial.name}.tmp")) as out:
            shard = _Shard(number, 0, 0, out)
            for index, payload in rows:
                self._append(shard, index, ROW, payload)
            for index, entry in rejects.items():
                self._append(shard, index, REJECT, json.dumps(entry, ensure_ascii=False).encode())

    # -- what a reader finds

    def write_manifest(self) -> None:
        """The state of the run as one document; lags behind the shards by at most a few seconds."""
        self._manifest_time = time.monotonic()
        counts = self.counts()
        write_json(
            self.folder / "manifest.json",
            {
                "format": FORMAT,
                "complete": self.complete,
                "settings": self.settings,
                "counts": dict(sorted(counts.items())),
                "shards": [
                    {key: value for key, value in msgspec.structs.asdict(sealed).items() if key != "rejects"}
                    for _, sealed in sorted(self._sealed.items())
                ],
            },
        )

    @property
    def input_rejects(self) -> Path:
        """Where the reader lists the rows it could not use; they come first in rejects.jsonl."""
        return self.folder / ".journal" / "input-rejects"

    def write_rejects(self) -> None:
        before = self.input_rejects.read_text(encoding="utf-8") if self.input_rejects.exists() else ""
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.rejects()]
        write_file(self.folder / "rejects.jsonl", before + "".join(lines))


def _all_counts(shard: _Shard) -> Counter[str]:
    counts = Counter(shard.counts)
    counts["rows"] += len(shard.lines)
    counts.update(f"rejected: {entry['reason']}" for entry in shard.rejects.values())
    return counts


def _crc(head: bytes, kind: bytes, payload: bytes) -> bytes:
    return b"%08x" % zlib.crc32(payload, zlib.crc32(kind, zlib.crc32(head)))


def _write_all(file: BinaryIO, line: bytes) -> None:
    written = file.write(line)
    while written < len(line):  # a full disk raises; a signal may cut a write short
        written += file.write(line[written:])
