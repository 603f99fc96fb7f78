"""The header of a shard: which tensors it holds and where, checked against what the manifest says of it.

A header is a few kilobytes that no checksum but the whole file's covers, and training does not read whole files first:
every name, type, shape and place in it has to be the one that its identity and counts ask for.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch

from fledge.errors import UserError
from fledge.parsing import convert, parse_json
from fledge.ranges import Natural
from fledge.storage.states.manifest import Identity, ShardEntry
from fledge.target.head import ENTRY

# R records, N tokens of all records, M stored rows of last_hidden, A taps, H hidden, K token ids that are supervised

DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DAMAGED = (
    "Restore the file, or delete it together with its file in sealed/ and run the same `fledge extract` again: "
    "only this shard is made anew."
)


class TensorInfo(msgspec.Struct):
    """A tensor, as safetensors describes it."""

    dtype: str
    shape: list[Natural]
    data_offsets: tuple[Natural, Natural]


class ShardFacts(msgspec.Struct):
    """What the writer adds: whose states these are, and the ids of the records."""

    identity: str
    ids: list[str]


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


def read_header(path: Path, entry: ShardEntry, identity: Identity) -> tuple[dict[str, Slot], ShardFacts]:
    """The tensors of a shard by name, and its facts."""
    where = f"{path} (header)"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= entry.bytes - 8:
            raise UserError(f"{where}: {length} bytes of a file of {entry.bytes}. {DAMAGED}")
        header = parse_json(file.read(length), dict[str, Any], where, hint=DAMAGED)
    metadata = convert(header.pop("__metadata__", {}), dict[str, str], where, hint=DAMAGED)
    facts = parse_json(metadata.get(ENTRY, "{}"), ShardFacts, where, hint=DAMAGED)
    if facts.identity != identity.digest:
        raise UserError(
            f"{path}: made with another target, template, dtype or other settings than the manifest beside it "
            f"states. Put the right manifest back, or extract into a new folder."
        )
    tensors = convert(header, dict[str, TensorInfo], where, hint=DAMAGED)
    _check_layout(tensors, entry, identity, where)
    _check_places(tensors, entry.bytes - 8 - length, where)
    if len(facts.ids) != entry.records:
        raise UserError(f"{where}: it names {len(facts.ids)} records, the manifest {entry.records}. {DAMAGED}")
    slots = {
        name: Slot(DTYPES[info.dtype], tuple(info.shape), 8 + length + info.data_offsets[0])
        for name, info in tensors.items()
    }
    return slots, facts


def _check_layout(tensors: dict[str, TensorInfo], entry: ShardEntry, identity: Identity, where: str) -> None:
    wanted = layout(entry, identity)
    free = {"position_ids": (entry.tokens,), "count_ids": (), "counts": ()}  # one more dimension than this, any size
    optional = {"teacher_argmax", "teacher_logsumexp"}
    missing, unknown = wanted.keys() - tensors.keys() - optional, tensors.keys() - wanted.keys()
    if missing or unknown or len(optional & tensors.keys()) == 1:
        raise UserError(f"{where}: tensors {sorted(missing)} are missing, {sorted(unknown)} unknown. {DAMAGED}")
    for name, info in tensors.items():
        dtype, shape = wanted[name]
        found = tuple(info.shape)
        fits = found == shape or (name in free and found[:-1] == free[name])
        if info.dtype != NAMES[dtype] or not fits:
            raise UserError(
                f"{where}: {name} is {info.dtype} {found}, the manifest asks for {NAMES[dtype]} {shape}. {DAMAGED}"
            )
    if tensors["count_ids"].shape != tensors["counts"].shape:
        raise UserError(f"{where}: count_ids and counts have different lengths. {DAMAGED}")


def layout(entry: ShardEntry, identity: Identity) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that a shard may have. See `fledge.storage.states.shard`."""
    dtype, fp8 = getattr(torch, identity.dtype), identity.tap_storage == "fp8"
    supervised = identity.last_storage == "supervised"
    tokens, records, taps = entry.tokens, entry.records, len(identity.tap_layers)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "offsets": (torch.int64, (records + 1,)),
        "input_ids": (torch.int32, (tokens,)),
        "loss_mask": (torch.bool, (tokens,)),
        "position_ids": (torch.int32, (tokens,)),
        "tap_hidden": (torch.float8_e4m3fn if fp8 else dtype, (tokens, taps, identity.hidden_size)),
        "last_hidden": (dtype, (entry.supervised if supervised else tokens, identity.hidden_size)),
        "teacher_argmax": (torch.int32, (tokens,)),
        "teacher_logsumexp": (torch.float32, (tokens,)),
        "record_crc": (torch.int64, (records,)),
        "count_ids": (torch.int32, (0,)),
        "counts": (torch.int64, (0,)),
    }
    if fp8:
        wanted["tap_scale"] = (torch.float32, (tokens, taps))
    if supervised:
        wanted["last_offsets"] = (torch.int64, (records + 1,))
    return wanted


def _check_places(tensors: dict[str, TensorInfo], data_bytes: int, where: str) -> None:
    """The tensors follow each other without gaps and fill the file."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = info.data_offsets
        if begin != at or end - begin != prod(info.shape) * DTYPES[info.dtype].itemsize:
            raise UserError(f"{where}: {name} lies at bytes {begin} to {end}, where it cannot be. {DAMAGED}")
        at = end
    if at != data_bytes:
        raise UserError(f"{where}: it describes {at} bytes of tensors, the file has {data_bytes}. {DAMAGED}")
