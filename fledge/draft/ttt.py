"""Unrolling the draft over its own outputs: which row learns what, and the K forward passes (training-time test).

Alignment of row t at TTT step k, in a document x_0 .. x_{T-1} with tap features g and loss mask l:

    input token    x_{t+1+k}                  the ground truth, for k > 0 too
    hidden         k = 0: fuse(g_t)           k > 0: the draft's own output of step k - 1 at the same row
    rope position  position_t + k
    teacher        softmax(L_p), p = t+1+k    the target's distribution of x_{p+1}
    trained        where l_p and l_{p+1}      so everything about training a step depends on p alone

The shift is made here and nowhere else. For a prompt of P tokens the first token the draft proposes is x_{P+1}; its
teacher is p = P and, at k = 0, its row is P - 1: the last prompt row. With the mask left unshifted that row is never
trained.

    P = 3, T = 6          x  p p p a a a        l  0 0 0 1 1 1
    taught positions p    . . . 3 4 .
    rows at k = 0         . . 2 3 . .           row = p - 1 - k
    rows at k = 1         . 1 2 . . .
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.draft.batch import Batch
from fledge.draft.model import DraftModel
from fledge.draft.ttt_attention import Run, runs_of, ttt_attention

# N rows of all documents, P taught positions, S active rows, K TTT steps, H hidden


@dataclass(frozen=True)
class Alignment:
    """Which rows of a batch are trained, and by which teacher positions."""

    positions: Tensor  # (P,) int64 rows p whose target distribution teaches
    document: Tensor  # (P,) int64 document of each position
    rows: Tensor  # (S,) int64 rows that are trained at some step, ascending
    row_index: Tensor  # (K, P) int64 index into rows of row p - 1 - k; -1 before the document's first row
    runs: tuple[Run, ...]  # the active rows as contiguous runs
    last_row: Tensor  # (S,) int64 last row of each active row's document

    @property
    def trained(self) -> Tensor:
        """(K, P) bool: position p teaches a row at step k."""
        return self.row_index >= 0


def align(batch: Batch, ttt_steps: int) -> Alignment:
    """Apply the shift: teacher positions, active rows and the map between them."""
    device = batch.loss_mask.device
    lengths = torch.tensor(batch.lengths, device=device)
    stops = lengths.cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(batch.lengths), device=device), lengths)
    first_row, last_row = (stops - lengths)[document], (stops - 1)[document]

    supervised = batch.loss_mask
    row = torch.arange(len(supervised), device=device)
    taught = supervised & supervised.roll(-1) & (row < last_row)
    positions = taught.nonzero()[:, 0]

    wanted = positions - 1 - torch.arange(ttt_steps, device=device)[:, None]  # (K, P)
    inside = wanted >= first_row[positions]
    active = torch.zeros_like(supervised)
    active[wanted[inside]] = True
    rows = active.nonzero()[:, 0]
    index_of = torch.full_like(row, -1)
    index_of[rows] = torch.arange(len(rows), device=device)
    return Alignment(
        positions=positions,
        document=document[positions],
        rows=rows,
        row_index=torch.where(inside, index_of[wanted.clamp_min(0)], -1),
        runs=runs_of(active.cpu(), batch.lengths),
        last_row=last_row[rows],
    )


def unroll(draft: DraftModel, batch: Batch, alignment: Alignment, ttt_steps: int) -> Tensor:
    """K draft forwards. Returns (K, S, H): normed states of the active rows, ready for `lm_head`.

    Prompt rows cost only their step-0 keys and values: nothing reads their outputs.
    """
    rows, features = alignment.rows, draft.fuse(batch.tap_hidden)
    next_ids = batch.input_ids.roll(-1)
    q, k, v = draft.project(draft.embed(next_ids), features, draft.rope(batch.position_ids), queries=rows)
    hidden, positions = features[rows], batch.position_ids[..., rows]
    states, later_k, later_v = [], [], []
    for step in range(ttt_steps):
        if step > 0:
            tokens = batch.input_ids[torch.minimum(rows + 1 + step, alignment.last_row)]
            q, own_k, own_v = draft.project(draft.embed(tokens), hidden, draft.rope(positions + step))
            later_k.append(own_k)
            later_v.append(own_v)
        out = draft.finish(hidden, ttt_attention(q, k, v, later_k, later_v, alignment.runs))
        states.append(draft.norm(out))
        hidden = states[-1] if draft.config.norm_output else out
    return torch.stack(states)
