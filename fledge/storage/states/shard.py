"""One shard: records end to end in a safetensors file, with offsets and a checksum per record.

    offsets (R + 1,)        record r lies in rows offsets[r] .. offsets[r + 1]
    input_ids, loss_mask    (N,)
    position_ids            (N,) or (N, axes of a multimodal rope)
    tap_hidden              (N, A, H) in the target's dtype, or fp8 with tap_scale (N, A): one scale per row and tap
    teacher_argmax, teacher_logsumexp   (N,) of the target's logits where supervised; absent if nobody computed them
    last_hidden             (M, H); M = N, or only the supervised rows (last_offsets says whose): no other row teaches
    record_crc (R,)         checked whenever a record is read
    count_ids, counts       how often each token id is supervised in this shard

Read with positioned reads, not a mapping: mapped pages count as this process's memory and a file cut short kills the
process, while a read costs the same copy and fails with a message.
"""

import os
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fledge.errors import UserError
from fledge.outputs import check_sealed, file_sha256, replacing
from fledge.storage.states.header import DAMAGED, read_header
from fledge.storage.states.manifest import Identity, ShardEntry
from fledge.storage.states.plan import PlannedShard
from fledge.target.head import as_bytes, one_entry
from fledge.target.record import TargetRecord, TeacherSummary

# R records, N tokens of all records, M stored rows of last_hidden, A taps, H hidden

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SUMMARY = ("teacher_argmax", "teacher_logsumexp")
PER_TOKEN = ("input_ids", "loss_mask", "position_ids", "tap_hidden", "tap_scale", *SUMMARY)


class ShardBuffer:
    """A shard in memory while it is being filled, one record after the other, in the order of its plan."""

    def __init__(self, shard: PlannedShard, identity: Identity, *, pinned: bool = False) -> None:
        self.shard, self.identity, self._pinned = shard, identity, pinned
        tokens, taps, hidden_size = shard.tokens, len(identity.tap_layers), identity.hidden_size
        dtype = getattr(torch, identity.dtype)
        self._fp8, self._supervised = identity.tap_storage == "fp8", identity.last_storage == "supervised"

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)

        self.tensors = {
            "input_ids": empty(tokens, dtype=torch.int32),
            "loss_mask": empty(tokens, dtype=torch.bool),
            "tap_hidden": empty(tokens, taps, hidden_size, dtype=torch.float8_e4m3fn if self._fp8 else dtype),
            "last_hidden": empty(shard.supervised if self._supervised else tokens, hidden_size, dtype=dtype),
        }
        if self._fp8:
            self.tensors["tap_scale"] = empty(tokens, taps, dtype=torch.float32)
        self.tensors["teacher_argmax"] = empty(tokens, dtype=torch.int32)
        self.tensors["teacher_logsumexp"] = empty(tokens, dtype=torch.float32)
        self._positions: list[Tensor] = []
        self._count = self._row = self._last_row = 0

    @property
    def full(self) -> bool:
        return self._count == len(self.shard.samples)

    def put(self, record: TargetRecord) -> None:
        """Copy one record in. It must be the next one of the plan."""
        planned = self.shard.samples[self._count]
        assert (record.sample_id, len(record)) == (planned.id, planned.length), f"{planned=}, got {record.sample_id}"
        rows = slice(self._row, self._row + len(record))
        into = self.tensors
        into["input_ids"][rows].copy_(record.input_ids, non_blocking=True)
        into["loss_mask"][rows].copy_(record.loss_mask, non_blocking=True)
        if self._fp8:
            scale = fp8_scale(record.tap_hidden)
            into["tap_scale"][rows].copy_(scale, non_blocking=True)
            into["tap_hidden"][rows].copy_(to_fp8(record.tap_hidden, scale), non_blocking=True)
        else:
            into["tap_hidden"][rows].copy_(record.tap_hidden, non_blocking=True)
        if record.summary is not None and "teacher_argmax" in into:
            into["teacher_argmax"][rows].copy_(record.summary.argmax, non_blocking=True)
            into["teacher_logsumexp"][rows].copy_(record.summary.logsumexp, non_blocking=True)
        else:  # one record without is enough: a shard has them of all its records or of none
            for name in SUMMARY:
                into.pop(name, None)
        last = record.last_hidden
        if self._supervised:
            last = last.index_select(0, record.loss_mask.nonzero()[:, 0].to(last.device, non_blocking=True))
        into["last_hidden"][self._last_row : self._last_row + len(last)].copy_(last, non_blocking=True)
        self._positions.append(torch.empty(record.position_ids.shape, dtype=torch.int32, pin_memory=self._pinned))
        self._positions[-1].copy_(record.position_ids, non_blocking=True)
        self._row, self._last_row, self._count = rows.stop, self._last_row + len(last), self._count + 1

    def save(self, folder: Path) -> ShardEntry:
        """Write the file under a temporary name, sync and rename it. Returns its entry; the caller seals it."""
        assert self.full, f"{self._count} of {len(self.shard.samples)} records"
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        tensors = self._complete()
        path = folder / f"{self.shard.name}.safetensors"
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata=self._metadata())
            except Exception as error:  # safetensors wraps the system's error in its own type
                raise OSError(str(error)) from error
            digest = file_sha256(temporary)
        samples = self.shard.samples
        return ShardEntry(
            file=path.name, bytes=path.stat().st_size, sha256=digest, records=len(samples), tokens=self.shard.tokens,
            supervised=self.shard.supervised, longest=max(sample.length for sample in samples),
        )  # fmt: skip

    def _complete(self) -> dict[str, Tensor]:
        lengths = torch.tensor([0, *(sample.length for sample in self.shard.samples)])
        tensors = {**self.tensors, "offsets": lengths.cumsum(0), "position_ids": _stack_positions(self._positions)}
        if self._supervised:
            supervised = torch.tensor([0, *(sample.supervised for sample in self.shard.samples)])
            tensors["last_offsets"] = supervised.cumsum(0)
        ids, counts = tensors["input_ids"][tensors["loss_mask"]].unique(return_counts=True)
        tensors |= {"count_ids": ids, "counts": counts}
        self._refuse_infinite(tensors["offsets"])
        tensors["record_crc"] = torch.tensor(
            [record_crc(parts) for parts in _records(tensors, len(self.shard.samples))], dtype=torch.int64
        )
        return tensors

    def _refuse_infinite(self, offsets: Tensor) -> None:
        for name in ("tap_scale" if self._fp8 else "tap_hidden", "last_hidden"):
            if not self.tensors[name].isfinite().all():
                bad = int((~self.tensors[name].flatten(1).isfinite().all(1)).nonzero()[0])
                where = int((offsets[1:] <= bad).sum()) if name != "last_hidden" or not self._supervised else 0
                raise UserError(
                    f"sample {self.shard.samples[where].id!r} (or a neighbour): the target's {name} holds NaN or "
                    f"infinity in {self.identity.dtype}. Use --dtype bfloat16 or float32, or remove the sample."
                )

    def _metadata(self) -> dict[str, str]:
        return one_entry({"identity": self.identity.digest, "ids": [sample.id for sample in self.shard.samples]})


class ShardReader:
    """A finished shard. Opening reads its header and offsets; records are read when asked for."""

    def __init__(self, path: Path, entry: ShardEntry, identity: Identity) -> None:
        self.path, self.entry, self.identity = path, entry, identity
        check_sealed(path, entry.bytes, mend=DAMAGED)
        self._slots, self._facts = read_header(path, entry, identity)
        self.offsets, self.crcs = self.read("offsets").tolist(), self.read("record_crc").tolist()
        self._last_offsets = self.read("last_offsets").tolist() if "last_offsets" in self._slots else self.offsets
        self._check_offsets()

    @property
    def ids(self) -> list[str]:
        return self._facts.ids

    def _check_offsets(self) -> None:
        last = self._last_offsets
        rising = all(begin < end for begin, end in pairwise(self.offsets)) and all(a <= b for a, b in pairwise(last))
        ends = (self.offsets[0], self.offsets[-1], last[0], last[-1])
        if not rising or ends != (0, self.entry.tokens, 0, self._slots["last_hidden"].shape[0]):
            raise UserError(f"{self.path}: its offsets do not divide its {self.entry.tokens} tokens. {DAMAGED}")

    def check_planned(self, planned: PlannedShard) -> None:
        """The records must be those of the plan: ids and lengths are under no checksum that reading checks."""
        lengths = [end - begin for begin, end in pairwise(self.offsets)]
        wanted = [(sample.id, sample.length) for sample in planned.samples]
        if list(zip(self.ids, lengths, strict=True)) != wanted or planned.supervised != self.entry.supervised:
            raise UserError(f"{self.path}: its records are not those of the plan. {DAMAGED}")

    def counts(self, vocab_size: int) -> Tensor:
        """How often each token id is supervised. (V,) int64, from tokens and mask; the shard's own table must agree."""
        found = self.count(vocab_size, 0, self.entry.tokens)
        ids, counts = self.read("count_ids").long(), self.read("counts")
        if not torch.equal(ids, found.nonzero()[:, 0]) or not torch.equal(counts, found[ids]):
            raise UserError(f"{self.path}: its table of supervised tokens is not that of its tokens. {DAMAGED}")
        return found

    def count(self, vocab_size: int, begin: int, end: int) -> Tensor:
        """How often each token id is supervised in rows begin..end. (V,) int64"""
        ids = self.read("input_ids", begin, end)[self.read("loss_mask", begin, end)]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(f"{self.path}: it holds token ids outside the vocabulary of {vocab_size}. {DAMAGED}")
        return torch.bincount(ids, minlength=vocab_size)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows begin..end of a tensor."""
        slot = self._slots[name]
        end = slot.shape[0] if end is None else end
        tensor = torch.empty((end - begin, *slot.shape[1:]), dtype=slot.dtype)
        row_bytes = tensor[:1].nbytes if len(tensor) else 0
        view = as_bytes(tensor)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            at, done = slot.begin + begin * row_bytes, 0
            while done < len(view):
                got = os.preadv(handle, [view[done:]], at + done)
                if got <= 0:
                    raise UserError(f"{self.path}: ends in the middle of {name}. {DAMAGED}")
                done += got
        finally:
            os.close(handle)
        return tensor

    def record(self, index: int, max_length: int | None = None) -> TargetRecord:
        """Record `index`, its checksum checked, cut to `max_length`."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        parts = {name: self.read(name, begin, end) for name in PER_TOKEN if name in self._slots}
        parts["last_hidden"] = self.read("last_hidden", self._last_offsets[index], self._last_offsets[index + 1])
        if record_crc(parts) != self.crcs[index]:
            raise UserError(f"{self.path}: the checksum of record {self.ids[index]!r} does not match. {DAMAGED}")
        return self._as_record(self.ids[index], parts, max_length)

    def _as_record(self, sample_id: str, parts: dict[str, Tensor], max_length: int | None) -> TargetRecord:
        dtype = getattr(torch, self.identity.dtype)
        taps, last = parts["tap_hidden"], parts["last_hidden"]
        if "tap_scale" in parts:
            taps = (taps.float() * parts["tap_scale"][..., None]).to(dtype)
        if len(last) < len(taps):
            last = torch.zeros(len(taps), last.shape[1], dtype=dtype).masked_scatter_(
                parts["loss_mask"][:, None].expand(-1, last.shape[1]), last
            )
        positions = parts["position_ids"].long()
        rows = slice(max_length)
        summary = None
        if "teacher_argmax" in parts:
            summary = TeacherSummary(parts["teacher_argmax"].long(), parts["teacher_logsumexp"])[rows]
        return TargetRecord(
            sample_id=sample_id,
            input_ids=parts["input_ids"][rows].long(),
            loss_mask=parts["loss_mask"][rows],
            position_ids=(positions if positions.dim() == 1 else positions.T)[..., rows].contiguous(),
            tap_hidden=taps[rows],
            last_hidden=last[rows],
            summary=summary,
        )


def record_crc(parts: dict[str, Tensor]) -> int:
    """CRC-32 over a record's tensors in the order of their names."""
    crc = 0
    for name in sorted(parts):
        crc = zlib.crc32(as_bytes(parts[name].contiguous()), crc)
    return crc


def fp8_scale(tap_hidden: Tensor) -> Tensor:
    """(T, A, H) -> (T, A) fp32: each row's largest magnitude becomes the largest fp8 number."""
    return (tap_hidden.float().abs().amax(-1) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def to_fp8(tap_hidden: Tensor, scale: Tensor) -> Tensor:
    return (tap_hidden.float() / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def token_bytes(identity: Identity, supervised_share: float = 1.0) -> float:
    """Bytes on disk per token."""
    item, taps = getattr(torch, identity.dtype).itemsize, len(identity.tap_layers)
    hidden_size = identity.hidden_size
    tapped = taps * (hidden_size + 4) if identity.tap_storage == "fp8" else taps * hidden_size * item
    share = supervised_share if identity.last_storage == "supervised" else 1.0
    return tapped + share * hidden_size * item + 4 + 1 + 4 + 4 + 4


def _records(tensors: dict[str, Tensor], count: int) -> Any:
    offsets = tensors["offsets"].tolist()
    last = tensors.get("last_offsets", tensors["offsets"]).tolist()
    for index in range(count):
        parts = {name: tensors[name][offsets[index] : offsets[index + 1]] for name in PER_TOKEN if name in tensors}
        yield {**parts, "last_hidden": tensors["last_hidden"][last[index] : last[index + 1]]}


def _stack_positions(positions: list[Tensor]) -> Tensor:
    """(N,), or (N, axes) as soon as one record has several rows."""
    axes = max((len(position) for position in positions if position.dim() == 2), default=0)
    if not axes:
        return torch.cat(positions)
    return torch.cat([p if p.dim() == 2 else p.expand(axes, -1) for p in positions], dim=1).T.contiguous()
