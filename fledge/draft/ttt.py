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
from torch.utils.checkpoint import checkpoint

from fledge.draft.batch import Batch
from fledge.draft.model import DraftModel
from fledge.draft.products import linear
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


def unroll(draft: DraftModel, batch: Batch, alignment: Alignment, ttt_steps: int, *, recompute: bool = False) -> Tensor:
    """K draft forwards. Returns (K, S, H): normed states of the active rows, ready for `lm_head`.

    Prompt rows cost only their step-0 keys and values: nothing reads their outputs. With `recompute`, a step keeps what
    the other steps need of it (its keys, values and output) and computes the rest again in the backward.
    """
    rows, last_row = alignment.rows, alignment.last_row
    features = draft.fuse(batch.tap_hidden)
    window = draft.config.sliding_window
    of_tokens, of_states = (weight.to(features.dtype) for weight in draft.split_projection())
    # The tokens' half of q, k and v: row r holds that of x_{r+1}, and step k of row t reads row t + k.
    next_tokens = draft.embed(batch.input_ids.roll(-1)).to(features.dtype)
    tokens = linear(draft.midlayer.input_layernorm(next_tokens), of_tokens)

    def step(number: int, hidden: Tensor, tokens: Tensor, *seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f'' (S, H), keys and values of one step. `seen`: keys of all earlier steps, then their values."""
        if number == 0:
            q, k, v = draft.project_sum(tokens, hidden, of_states, draft.rope(batch.position_ids), queries=rows)
            hidden, keys, values = hidden[rows], [k], [v]
        else:
            own = tokens.index_select(0, torch.minimum(rows + number, last_row - 1))
            q, k, v = draft.project_sum(own, hidden, of_states, draft.rope(batch.position_ids[..., rows] + number))
            keys, values = [*seen[:number], k], [*seen[number:], v]
        reach = None if window is None else window - number  # of the step-0 rows; the row itself has moved on
        attended = ttt_attention(q, keys[0], values[0], keys[1:], values[1:], alignment.runs, reach)
        return draft.finish(hidden, attended), k, v

    hidden, states = features, []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for number in range(ttt_steps):
        if recompute and torch.is_grad_enabled():
            out, k, v = checkpoint(
                step, number, hidden, tokens, *keys, *values, use_reentrant=False, preserve_rng_state=False
            )  # fmt: skip
        else:
            out, k, v = step(number, hidden, tokens, *keys, *values)
        keys.append(k)
        values.append(v)
        states.append(draft.norm(out))
        hidden = states[-1] if draft.config.norm_output else out
    return torch.stack(states)
