"""Records laid end to end: what one training step sees.

    documents      a a a a | b b b | c c c c c        lengths = (4, 3, 5), no padding anywhere
    rows           0 . . 3 | 4 . 6 | 7 . . . 11

All layers of the draft but its attention work row by row, and the attention knows the documents (ttt_attention.py),
so packed documents give exactly what each would give alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.target.record import TargetRecord, TeacherSummary

# N rows of all documents, A taps, H hidden


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Several records as one flat row."""

    input_ids: Tensor  # (N,) int64
    loss_mask: Tensor  # (N,) bool, on the host
    position_ids: Tensor  # (N,), or (axes, N) as soon as one document has pictures; int64
    tap_hidden: Tensor  # (N, A, H)
    last_hidden: Tensor  # (N, H)
    lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]
    summary: TeacherSummary | None = None  # of all rows, or not known of some


def pack(records: Sequence[TargetRecord]) -> Batch:
    """Concatenate records. Positions restart with every document, as each record states them."""
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
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, copied while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
