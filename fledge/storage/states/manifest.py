"""The manifest: what a store's states depend on, and the files it is made of.

`Identity` names everything that could change a stored number. Two stores, or a store and a run, fit together when
their identities are equal; where they differ the message says in what.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fledge.errors import UserError
from fledge.outputs import in_full
from fledge.parsing import convert, read_python_json
from fledge.ranges import Count, Natural

KIND, FORMAT = "hidden_store", 1
MANIFEST, PLAN, SEALED, HEAD = "manifest.json", "plan.jsonl", "sealed", "target_head.safetensors"
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
TapStorage = Literal["same", "fp8"]
LastStorage = Literal["all", "supervised"]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything the stored states depend on, JSON-ready."""

    target: str
    revision: str | None
    weights: str  # digest of embedding and head
    text_config: dict[str, Any]
    vocab_size: Count  # rows of the head
    hidden_size: Count
    head_keys: list[str]  # names of the head's tensor in the target
    tap_layers: Annotated[list[Natural], Meta(min_length=1)]
    dtype: Annotated[str, Meta(pattern="^(float32|bfloat16|float16)$")]
    tap_storage: TapStorage
    last_storage: LastStorage
    template: str  # name of the chat template; `own` is the tokenizer's
    template_fingerprint: str
    tokenizer: str  # digest
    max_length: Count | None
    stop_token_ids: list[Natural]
    special_token_ids: list[Natural]
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
            if field.name not in ignore and in_full(mine) != in_full(theirs):
                found.append(f"{field.name} {_short(mine)}, not {_short(theirs)}")
        return found


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard, as its `sealed` file and the manifest state it."""

    file: Annotated[str, Meta(pattern=r"^shard-\d{5,}\.safetensors$")]
    bytes: Natural
    sha256: Sha256
    records: Count
    tokens: Count
    supervised: Natural
    longest: Count

    @property
    def number(self) -> int:
        return int(self.file.removeprefix("shard-").removesuffix(".safetensors"))


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


class _Counts(msgspec.Struct):
    planned_records: Natural


class _File(msgspec.Struct):
    sha256: Sha256
    bytes: Natural = 0


class _Document(msgspec.Struct):
    """manifest.json, as far as it is read again."""

    identity: Identity
    counts: _Counts
    plan: _File
    head: _File
    shards: tuple[ShardEntry, ...]


REBUILD = "Delete it and run the same `fledge extract` again: it is rebuilt from the finished shards."


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; says what to do when it is damaged or of another kind."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} there. Give a folder written by `fledge extract`.")
    document = read_python_json(path, dict[str, Any], hint=REBUILD)
    checksum, kind, version = document.pop("checksum", None), document.get("kind"), document.get("format")
    if kind != KIND or version != FORMAT:
        raise UserError(f"{path}: kind {kind!r} format {version!r}; this fledge reads {KIND!r} format {FORMAT}.")
    if hashlib.sha256(canonical(document)).hexdigest() != checksum:
        raise UserError(f"{path}: its checksum does not match its content: it was edited or damaged. {REBUILD}")
    stated = convert(document, _Document, str(path), hint=REBUILD)
    manifest = Manifest(
        identity=stated.identity, planned_records=stated.counts.planned_records, plan_sha256=stated.plan.sha256,
        head_bytes=stated.head.bytes, head_sha256=stated.head.sha256, shards=stated.shards,
    )  # fmt: skip
    if manifest.document()["counts"] != document["counts"]:
        raise UserError(f"{path}: its counts are not those of its shards. {REBUILD}")
    return manifest


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
