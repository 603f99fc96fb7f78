"""The manifest: what a store's states depend on, and the files it is made of.

`Identity` names everything that could change a stored number. Two stores, or a store and a run, fit together when
their identities are equal; where they differ the message says in what.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fledge.errors import UserError

KIND, FORMAT = "hidden_store", 1
MANIFEST, PLAN, SEALED, HEAD = "manifest.json", "plan.jsonl", "sealed", "target_head.safetensors"
TapStorage = Literal["same", "fp8"]
LastStorage = Literal["all", "supervised"]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything the stored states depend on, JSON-ready."""

    target: str
    revision: str | None
    weights: str  # digest of embedding and head
    text_config: dict[str, Any]
    vocab_size: int  # rows of the head
    hidden_size: int
    head_keys: list[str]  # names of the head's tensor in the target
    tap_layers: list[int]
    dtype: str
    tap_storage: TapStorage
    last_storage: LastStorage
    template: str  # name of the chat template; `own` is the tokenizer's
    template_fingerprint: str
    tokenizer: str  # digest
    max_length: int | None
    stop_token_ids: list[int]
    special_token_ids: list[int]
    backend: str = "hf"
    last_turn_only: bool = False  # the template's fingerprint says so, too

    @property
    def digest(self) -> str:
        fields = dataclasses.asdict(self)
        del fields["last_turn_only"]  # shards written before the field existed keep their digest
        return hashlib.sha256(canonical(fields)).hexdigest()

    def differences(self, other: "Identity", ignore: Sequence[str] = ()) -> list[str]:
        """`field: mine, not theirs` for every field in which the two differ."""
        found = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs and field.name not in ignore:
                found.append(f"{field.name} {_short(mine)}, not {_short(theirs)}")
        return found


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard, as its `sealed` file and the manifest state it."""

    file: str
    bytes: int
    sha256: str
    records: int
    tokens: int
    supervised: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole document."""

    identity: Identity
    planned_records: int
    plan_sha256: str
    head_bytes: int
    head_sha256: str
    shards: tuple[ShardEntry, ...]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def complete(self) -> bool:
        return self.records == self.planned_records

    def document(self) -> dict[str, Any]:
        """JSON-ready, with totals for people and a checksum over all of it."""
        body = {
            "kind": KIND,
            "format": FORMAT,
            "complete": self.complete,
            "counts": {
                "records": self.records, "planned_records": self.planned_records,
                "tokens": sum(shard.tokens for shard in self.shards),
                "supervised": sum(shard.supervised for shard in self.shards),
                "longest": max((shard.longest for shard in self.shards), default=0),
                "bytes": sum(shard.bytes for shard in self.shards) + self.head_bytes,
            },
            "identity": dataclasses.asdict(self.identity),
            "plan": {"file": PLAN, "sha256": self.plan_sha256},
            "head": {"file": HEAD, "bytes": self.head_bytes, "sha256": self.head_sha256},
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }  # fmt: skip
        body = json.loads(canonical(body))
        return {**body, "checksum": hashlib.sha256(canonical(body)).hexdigest()}


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; says what to do when it is damaged or of another kind."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} there. Give a folder written by `fledge extract`.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        checksum = document.pop("checksum", None)
        kind, version = document["kind"], document["format"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: not a readable manifest ({error}). Delete it and run the same `fledge extract` again: it is "
            f"rebuilt from the finished shards."
        ) from None
    if kind != KIND or version != FORMAT:
        raise UserError(f"{path}: kind {kind!r} format {version!r}; this fledge reads {KIND!r} format {FORMAT}.")
    if hashlib.sha256(canonical(document)).hexdigest() != checksum:
        raise UserError(
            f"{path}: its checksum does not match its content: it was edited or damaged. Delete it and run the same "
            f"`fledge extract` again: it is rebuilt from the finished shards."
        )
    return Manifest(
        identity=Identity(**document["identity"]),
        planned_records=document["counts"]["planned_records"],
        plan_sha256=document["plan"]["sha256"],
        head_bytes=document["head"]["bytes"],
        head_sha256=document["head"]["sha256"],
        shards=tuple(ShardEntry(**shard) for shard in document["shards"]),
    )


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def write_atomically(path: Path, content: bytes, tag: str = "") -> None:
    """Write under a temporary name, sync, rename, sync the folder: after a crash the old or the new file is there."""
    temporary = path.with_name(f"{path.name}{tag}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall become `path`: synced and renamed at the end, removed if that fails.

    In a folder of its own: safetensors writes to a temporary file beside the one it is given, which a kill leaves.
    """
    folder = path.with_name(path.name + ".writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        temporary = folder / path.name
        yield temporary
        temporary.chmod(0o644)  # safetensors makes it private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in this folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
