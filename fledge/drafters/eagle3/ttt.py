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
    teacher positions p   . . . 3 4 .
    rows at k = 0         . . 2 3 . .           row = p - 1 - k
    rows at k = 1         . 1 2 . . .
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fledge.drafters.alignment import Alignment, Pairs
from fledge.drafters.batch import Batch, sent
from fledge.drafters.cpu_kernels import linear, spare_rows
from fledge.drafters.depth import RandomDepth, num_rows, pieces_of, unrolled
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.ttt_attention import ttt_attention
from fledge.drafters.runs import QueryPlaces, Run, query_places, runs_of
from fledge.drafters.sequence_share import Piece, Share

# N rows of all documents, P teacher positions, S active rows, R of them trained, K TTT steps, M pairs, H hidden


def align(
    batch: Batch, ttt_steps: int, depth: RandomDepth | None = None, share: Share | None = None
) -> Alignment:  # fmt: skip
    """Apply the shift: teacher positions, active rows and the map between them. Without `depth`, all rows go all steps.
    With `share`, rows are unrolled and trained by this process or another one; averages are over all of them.

    Everything is worked out on the host, which knows the mask, and sent: rows, runs and pairs decide how much there is
    to compute, and nobody waits for the device to say so.
    """
    device = batch.input_ids.device
    lengths = torch.tensor(batch.lengths)
    stops = lengths.cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(batch.lengths)), lengths)
    first_row, last_row = (stops - lengths)[document], (stops - 1)[document]

    in_mask = batch.loss_mask
    row = torch.arange(len(in_mask))
    teaches = in_mask & in_mask.roll(-1) & (row < last_row)
    positions = teaches.nonzero()[:, 0]

    wanted = positions - 1 - torch.arange(ttt_steps)[:, None]  # (K, P)
    inside = wanted >= first_row[positions]
    active = torch.zeros_like(in_mask)
    active[wanted[inside]] = True
    whole = runs_of(active, batch.lengths)
    pieces: list[Piece]
    if depth is None:
        parts = whole if share is None else [piece for run in whole for piece in pieces_of(run)]
        pieces, odds = [(part, ttt_steps) for part in parts], [1.0] * ttt_steps
    else:
        sample_ids = dict(zip((stops - lengths).tolist(), batch.sample_ids, strict=True))
        pieces, odds = depth.pieces(whole, sample_ids, ttt_steps), depth.expected(ttt_steps)
    if share is not None:
        pieces = share.of(pieces)
    num_trained = torch.tensor(num_rows(pieces, ttt_steps))
    runs = unrolled([*pieces, *((run, 1) for run in spare_rows(batch, int(num_trained[0])))], ttt_steps)

    rows = torch.cat([torch.arange(run.start, run.stop) for run in runs[0]] or [row[:0]])
    index_of = torch.full_like(row, -1)
    index_of[rows] = torch.arange(len(rows))
    alive = torch.tensor([sum(run.stop - run.start for run in step_runs) for step_runs in runs])
    index = torch.where(inside, index_of[wanted.clamp_min(0)], -1)
    row_index = torch.where(index < num_trained[:, None], index, -1)
    return Alignment(
        positions=sent(positions, device),
        document=sent(document[positions], device),
        num_documents=len(batch.lengths),
        rows=sent(rows, device),
        row_index=sent(row_index, device),
        supervised=sent(inside, device),
        share=sent(torch.tensor(odds), device),
        runs=runs,
        last_row=sent(last_row[rows], device),
        places=query_places(rows, batch.lengths, device) if device.type == "cuda" else None,
        pairs=make_pairs(row_index, wanted, inside, alive, len(row), device),
    )


def make_pairs(
    row_index: Tensor, wanted: Tensor, inside: Tensor, alive: Tensor, num_rows: int, device: torch.device
) -> Pairs:
    """row_index, wanted, inside (K, P) as in `align`, alive (K,) rows unrolled at each step of N: all on the host."""
    num_steps = len(row_index)
    step, place = (row_index >= 0).nonzero().T
    count = torch.bincount(wanted[step, place], minlength=num_rows)  # (N,) pairs of each row
    taught = count > 0
    number, trained_index = count[taught], taught.cumsum(0) - 1
    row_of_pair = trained_index[wanted[step, place]]
    order = (row_of_pair * num_steps + step).argsort()
    step, place, row_of_pair = step[order], place[order], row_of_pair[order]
    ends = number.cumsum(0)
    supervised = torch.zeros(num_steps, len(number), dtype=torch.bool)
    where = wanted.clamp_min(0)
    known = inside & taught[where]  # not of rows that a draw leaves out altogether
    supervised[torch.arange(num_steps)[:, None].expand_as(wanted)[known], trained_index[where][known]] = True
    return Pairs(
        place=sent(place, device),
        step=sent(step, device),
        state=sent(row_index[step, place] + (alive.cumsum(0) - alive)[step], device),
        row=sent(row_of_pair, device),
        supervised=sent(supervised, device),
        ends=ends.tolist(),
        lowest=place[ends - number].tolist(),
        highest=place[ends - 1].tolist(),
    )


def unroll(
    draft: DraftModel, batch: Batch, alignment: Alignment, ttt_steps: int, *, recompute: bool = False
) -> tuple[Tensor, ...]:
    """K draft forwards. Returns for each step (S_k, H): normed states of the rows unrolled so far, ready for `lm_head`.

    Prompt rows cost only their step-0 keys and values: nothing reads what the last layer would make of them. With
    `recompute`, a step keeps what the other steps need of it (its keys, values and output) and computes the rest again
    in the backward.
    """
    rows, last_row, alive = alignment.rows, alignment.last_row, alignment.alive
    features = draft.fuse(batch.tap_hidden)
    window = draft.config.sliding_window
    num_layers, every = draft.config.num_layers, every_row(batch) if draft.config.num_layers > 1 else None
    of_tokens, of_states = (weight.to(features.dtype) for weight in draft.split_projection())
    # The tokens' half of q, k and v: row r holds that of x_{r+1}, and step k of row t reads row t + k.
    next_tokens = draft.embed(batch.input_ids.roll(-1)).to(features.dtype)
    tokens = linear(draft.midlayer.input_layernorm(next_tokens), of_tokens)

    def step(number: int, hidden: Tensor, tokens: Tensor, *seen: Tensor) -> tuple[Tensor, ...]:
        """f'' (S_k, H), then keys and values of every layer. `seen`: those of all earlier steps."""
        mine, found = rows[: alive[number]], []
        reach = None if window is None else window - number  # of the step-0 rows; the row itself has moved on
        if number == 0:
            rope = draft.rope(batch.position_ids)
        else:
            hidden, rope = hidden[: len(mine)], draft.rope(batch.position_ids[..., mine] + number)
            tokens = tokens.index_select(0, torch.minimum(mine + number, last_row[: len(mine)] - 1))
        for layer in range(num_layers):
            queries, runs, places = None, alignment.runs[number], alignment.places
            if number == 0 and layer < num_layers - 1:  # the next layer has keys of every row
                assert every is not None
                runs, places = every
            elif number == 0:
                queries = mine
            if layer == 0:
                q, k, v = draft.project_sum(tokens, hidden, of_states, rope, queries=queries)
            else:
                q, k, v = draft.project_further(layer, hidden, rope, queries=queries)
            found += [k, v]
            keys, values = ([*seen[part + 2 * layer :: 2 * num_layers], found[part - 2]] for part in (0, 1))
            own_keys, own_values = ([own[: len(mine)] for own in part[1:]] for part in (keys, values))
            attended = ttt_attention(q, keys[0], values[0], own_keys, own_values, runs, reach, places)
            hidden = draft.finish(hidden if queries is None else hidden[mine], attended, layer)
        return hidden, *found

    hidden, states = features, []
    seen: list[Tensor] = []
    for number in range(ttt_steps):
        if recompute and torch.is_grad_enabled():
            out, *found = checkpoint(
                step, number, hidden, tokens, *seen, use_reentrant=False, preserve_rng_state=False
            )  # fmt: skip
        else:
            out, *found = step(number, hidden, tokens, *seen)
        seen += found
        states.append(draft.norm(out))
        hidden = states[-1] if draft.config.norm_output else out
    return tuple(states)


def every_row(batch: Batch) -> tuple[tuple[Run, ...], QueryPlaces | None]:
    """All rows of every document, as queries."""
    stops = list(accumulate(batch.lengths))
    runs = tuple(Run(stop - length, stop - length, stop) for stop, length in zip(stops, batch.lengths, strict=True))
    device = batch.input_ids.device
    return runs, query_places(torch.arange(stops[-1]), batch.lengths, device) if device.type == "cuda" else None
