"""Records laid end to end: what one training step sees.

    documents      a a a a | b b b | c c c c c        lengths = (4, 3, 5), no padding anywhere
    rows           0 . . 3 | 4 . 6 | 7 . . . 11

All layers of the draft but its attention work row by row, and the attention knows the documents (ttt_attention.py),
so packed documents give exactly what each would give alone.

On a CPU a document of zeros lies at the end, which fills the batch up to a multiple of 64 rows and lends its own to the
rows that are trained (`runs` in `fledge.drafters.alignment`). It teaches nothing. The library behind bf16 products
keeps half a MiB for every shape it has met, and conversations have all lengths (docs/log.md, "A leak of shapes").
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.drafters.products import FULL
from fledge.target.record import TargetRecord, TeacherSummary

# N rows of all documents, A taps, H hidden


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Several records as one flat row."""

    input_ids: Tensor  # (N,) int64
    loss_mask: Tensor  # (N,) bool
    position_ids: Tensor  # (N,), or (axes, N) as soon as one document has pictures; int64
    tap_hidden: Tensor  # (N, A, H)
    last_hidden: Tensor  # (N, H)
    lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]
    summary: TeacherSummary | None = None  # of all rows, or not known of some
    filler: int = 0  # rows of the last document, when it is there to fill up

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "loss_mask", "position_ids", "tap_hidden", "last_hidden")
        }
        summary = None if self.summary is None else self.summary.to(device)
        return dataclasses.replace(self, **moved, summary=summary)


def fill_for(device: torch.device) -> int:
    """What `pack` is told to fill up to on this device."""
    return FULL if device.type == "cpu" else 1


def pack(records: Sequence[TargetRecord], *, fill: int = 1) -> Batch:
    """Concatenate records. Positions restart with every document, as each record states them.

    With `fill` above 1 a document of zeros follows: of so many rows that all together are a multiple, and of at least
    `fill` rows.
    """
    filler = 0
    if fill > 1:
        filler = fill - sum(map(len, records)) % fill + fill
        records = [*records, _zeros(filler, records[0])]
    positions = [record.position_ids for record in records]
    axes = max((len(p) for p in positions if p.dim() == 2), default=0)
    if axes:  # text-only rows beside rows with images
        positions = [p if p.dim() == 2 else p.expand(axes, -1) for p in positions]
    return Batch(
        input_ids=torch.cat([record.input_ids for record in records]),
        loss_mask=torch.cat([record.loss_mask for record in records]),
        position_ids=torch.cat(positions, dim=-1),
        tap_hidden=torch.cat([record.tap_hidden for record in records]),
        last_hidden=torch.cat([record.last_hidden for record in records]),
        lengths=tuple(len(record) for record in records),
        sample_ids=tuple(record.sample_id for record in records),
        summary=TeacherSummary.cat([record.summary for record in records]),
        filler=filler,
    )


def _zeros(length: int, like: TargetRecord) -> TargetRecord:
    """A record of zeros; it has a summary, so as not to be the one that lacks it."""
    numbers = like.input_ids.new_zeros(length)
    return TargetRecord(
        sample_id="",
        input_ids=numbers,
        loss_mask=numbers.bool(),
        position_ids=torch.arange(length, device=numbers.device),
        tap_hidden=like.tap_hidden.new_zeros((length, *like.tap_hidden.shape[1:])),
        last_hidden=like.last_hidden.new_zeros((length, *like.last_hidden.shape[1:])),
        summary=TeacherSummary(numbers, torch.zeros(length, device=numbers.device)),
    )
