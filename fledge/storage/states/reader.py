"""Reading a store: a sequence of records, in the order of their shards.

Opening checks the manifest and every file's size, header and identity; a record's checksum is checked when it is read.
Holds offsets and checksums, never states, so it travels to loader workers cheaply.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.outputs import check_sealed, file_sha256
from fledge.storage.states.header import DAMAGED
from fledge.storage.states.manifest import HEAD, PLAN, read_manifest
from fledge.storage.states.plan import RESTORE, Plan, PlannedSample
from fledge.storage.states.shard import ShardReader
from fledge.target.head import TargetHead
from fledge.target.record import TargetRecord


class HiddenStore(Sequence[TargetRecord]):
    """A finished store. `allow_incomplete` opens what there is of one that is still being written."""

    def __init__(self, folder: Path, *, max_length: int | None = None, allow_incomplete: bool = False) -> None:
        self.folder, self.max_length = folder, max_length
        self.manifest = read_manifest(folder)
        self.identity = self.manifest.identity
        self._columns: list[int] | None = None  # of the taps that records are given with; None: all
        if not self.manifest.complete and not allow_incomplete:
            raise UserError(
                f"{folder}: incomplete, {self.manifest.records} of {self.manifest.planned_records} records. Run the "
                f"same `fledge extract` again to finish it."
            )
        self.shards = [ShardReader(folder / entry.file, entry, self.identity) for entry in self.manifest.shards]
        self._check_plan(ahead=allow_incomplete)
        self._starts = [0, *accumulate(entry.records for entry in self.manifest.shards)]

    def _check_plan(self, *, ahead: bool) -> None:
        """Every shard holds the records that it was planned with. Of a store that grows the plan may be ahead."""
        plan = Plan.read(self.folder)
        if not ahead and plan.sha256 != self.manifest.plan_sha256:
            raise UserError(f"{self.folder / PLAN}: missing, or not the plan that the manifest names. {RESTORE}")
        planned = {shard.number: shard for shard in plan.shards}
        for shard in self.shards:
            if shard.entry.number not in planned:
                raise UserError(f"{self.folder / PLAN}: it does not name {shard.entry.file}. {RESTORE}")
            shard.check_planned(planned[shard.entry.number])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):  # type: ignore[override]
        shard, row = self._locate(int(index))
        record = self.shards[shard].record(row, self.max_length)
        return record if self._columns is None else replace(record, tap_hidden=record.tap_hidden[:, self._columns])

    def choose(self, tap_layers: Sequence[int]) -> None:
        """Give records with these of the stored taps, in this order."""
        stored = self.identity.tap_layers
        self._columns = None if list(tap_layers) == stored else [stored.index(layer) for layer in tap_layers]

    @cached_property
    def ids(self) -> list[str]:
        return [id for shard in self.shards for id in shard.ids]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each record, before any cut."""
        return np.concatenate([np.diff(shard.offsets) for shard in self.shards] or [np.zeros(0, dtype=np.int64)])

    @cached_property
    def planned(self) -> dict[str, PlannedSample]:
        """id -> what the record was made from."""
        return {id: planned for id, (_, planned) in Plan.read(self.folder).place.items()}

    def checksums(self, indices: Sequence[int]) -> np.ndarray:
        """The stored checksum of each of these records."""
        places = (self._locate(int(index)) for index in indices)
        return np.array([self.shards[shard].crcs[row] for shard, row in places], dtype=np.int64)

    def counts(self, indices: Sequence[int] | None = None) -> Tensor:
        """How often each token id is supervised, in all records or in some. (V,) int64."""
        total = torch.zeros(self.identity.vocab_size, dtype=torch.int64)
        if indices is None or len(indices) == len(self):
            for shard in self.shards:
                total += shard.counts(len(total))
            return total
        for index in indices:
            number, row = self._locate(int(index))
            shard = self.shards[number]
            total += shard.count(len(total), shard.offsets[row], shard.offsets[row + 1])
        return total

    def head(self, device: torch.device) -> TargetHead:
        """The target's ends; the file's checksum is checked."""
        path = self.folder / HEAD
        again = "Delete it and run the same `fledge extract` again: only this file is made anew."
        check_sealed(path, self.manifest.head_bytes, self.manifest.head_sha256, mend=again)
        return TargetHead.load(path, device, self.identity.digest)

    def verify(self) -> None:
        """Read every byte and compare with the manifest."""
        self._check_plan(ahead=not self.manifest.complete)
        for shard in self.shards:
            if file_sha256(shard.path) != shard.entry.sha256:
                for row in range(shard.entry.records):
                    shard.record(row)  # names the record when its states are what is damaged
                raise UserError(f"{shard.path}: its checksum does not match the manifest. {DAMAGED}")
        self.counts()
        self.head(torch.device("cpu"))

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - self._starts[shard]
