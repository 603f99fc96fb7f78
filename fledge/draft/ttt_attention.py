"""Attention of training-time test (TTT): exact, linear in memory, no mask matrix.

At TTT step k, row t sees the step-0 keys of rows 0..t of its document and, of every later step j = 1..k, only the key
of its own row (EAGLE-3 paper, section 3.2):

                     step-0 keys      step-1     step-2
        row 0        1 . . .          1 . . .    1 . . .
        row 1        1 1 . .          . 1 . .    . 1 . .
        row 2        1 1 1 .          . . 1 .    . . 1 .
        row 3        1 1 1 1          . . . 1    . . . 1

The step-0 part is flash attention over a few rectangular blocks; the later steps are one score per row. The parts are
merged by their log-sum-exp. The trick is in the backward: a flash kernel's backward only uses the output and the
log-sum-exp of a row to know its softmax, so given the *merged* ones it returns the exact gradient of its own block
(ring attention does the same across devices), and the per-row part is elementwise.

Rows: only rows that are trained at some step need queries. They form a few contiguous runs per document, and a run
[start, stop) of a document beginning at `first` needs two blocks, neither of which has a mask:

        keys    first ........ start ........ stop
        queries start..stop    [  full   ][ causal ]

A sliding window cuts the run into chunks no longer than itself, each with one block more: the oldest keys, of which
every later query sees one less. Read backwards (both queries and keys), that triangle is a causal block, too:

        window = 3, chunk of rows 3 4 5      keys 1 2 | 3 4 5        read backwards    2 1
                                         3        1 1 | 1 . .                      4   1 .
                                         4        . 1 | 1 1 .                      3   1 1
                                         5        . . | 1 1 1

`dense_ttt_attention` is the slow twin: a materialised mask and an ordinary softmax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# N rows of all documents, S query rows, h query heads, g key heads, d head_dim, k later steps


@dataclass(frozen=True)
class Run:
    """Query rows [start, stop) of the flat batch, in the document whose first row is `first`."""

    first: int
    start: int
    stop: int


def runs_of(active: Tensor, lengths: Sequence[int]) -> tuple[Run, ...]:
    """Contiguous runs of True in `active` (N,), cut at document boundaries.

    active = 0 1 1 | 1 0 1, lengths = (3, 3)  ->  [1, 3) of the first document, [3, 4) and [5, 6) of the second
    """
    runs, first = [], 0
    flags = active.tolist()
    for length in lengths:
        start = None
        for row in range(first, first + length + 1):
            inside = row < first + length and flags[row]
            if inside and start is None:
                start = row
            elif not inside and start is not None:
                runs.append(Run(first, start, row))
                start = None
        first += length
    return tuple(runs)


def ttt_attention(
    q: Tensor, k: Tensor, v: Tensor, later_k: Sequence[Tensor], later_v: Sequence[Tensor], runs: Sequence[Run],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the S active rows at one TTT step.

    q (S, h, d); step-0 keys and values k, v (N, g, d); the own-row keys and values of steps 1..k: later_k, later_v,
    each (S, g, d). The query rows are those of `runs`, in order. With `window`, a row sees only so many step-0 keys,
    its own included. Returns (S, h, d).
    """
    assert sum(run.stop - run.start for run in runs) == q.shape[0], f"{q.shape=} {runs=}"
    assert window is None or window > 0, f"{window=}"
    return _TTTAttention.apply(q, k, v, tuple(blocks_of(runs, window)), *later_k, *later_v)


@dataclass(frozen=True)
class Block:
    """Queries (a slice of the query rows) that see a slice of the keys: all of them, or each one less than the next."""

    queries: slice
    keys: slice
    causal: bool = False
    backwards: bool = False  # causal when both are read backwards


def blocks_of(runs: Sequence[Run], window: int | None) -> Iterator[tuple[slice, list[Block]]]:
    """For every run, or chunk of one: its slice of the query rows, and its blocks. The first block has every row."""
    row = 0
    for run in runs:
        length = run.stop - run.start
        for begin in range(run.start, run.stop, window or length):
            end = min(begin + (window or length), run.stop)
            rows = slice(row, row + end - begin)
            row = rows.stop
            whole = run.first if window is None else max(run.first, end - window)  # from here on, every query sees it
            blocks = [Block(rows, slice(begin, end), causal=True)]
            if whole < begin:
                blocks.append(Block(rows, slice(whole, begin)))
            oldest = whole if window is None else max(run.first, begin - window + 1)
            if oldest < whole:
                num_keys, num_queries = whole - oldest, end - begin - 1  # the last query sees none of them
                if num_keys < num_queries:  # cut short by the document's beginning: the earliest queries see them all
                    blocks.append(Block(slice(rows.start, rows.stop - 1 - num_keys), slice(oldest, whole)))
                edge = slice(rows.stop - 1 - num_keys, rows.stop - 1)
                blocks.append(Block(edge, slice(oldest, whole), causal=True, backwards=True))
            yield rows, blocks


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunks: tuple[tuple[slice, list[Block]], ...], *later: Tensor
    ) -> Tensor:
        num_later = len(later) // 2
        later_k, later_v = later[:num_later], later[num_later:]
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for rows, blocks in chunks:
            out[rows], lse[rows] = _merged(rows, [(block, *_block(q, k, v, block)) for block in blocks])
        if num_later:
            scores = _own_scores(q, later_k)  # (S, h, k) fp32
            merged = torch.logsumexp(torch.cat((lse.unsqueeze(-1), scores), dim=-1), dim=-1)
            weights = torch.exp(scores - merged.unsqueeze(-1))
            total = out.float() * torch.exp(lse - merged).unsqueeze(-1)
            out = (total + _weighted(weights, later_v, q.shape[1])).to(q.dtype)
            lse = merged
        ctx.save_for_backward(q, k, v, out, lse, *later)
        ctx.chunks = chunks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_out,) = grads
        q, k, v, out, lse, *later = ctx.saved_tensors
        num_later = len(later) // 2
        later_k, later_v = later[:num_later], later[num_later:]
        grad_out = grad_out.contiguous()
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for _, blocks in ctx.chunks:
            for block in blocks:
                dq, dk, dv = _block_backward(grad_out, q, k, v, out, lse, block)
                grad_q[block.queries] += dq
                grad_k[block.keys] += dk
                grad_v[block.keys] += dv
        grad_later = _own_backward(grad_out, q, out, lse, later_k, later_v, grad_q) if num_later else ()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, *grad_later


def _block(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block's queries, in their order."""
    q, k, v = q[block.queries], k[block.keys], v[block.keys]
    if not block.backwards:
        return _flash(q, k, v, block.causal)
    out, lse = _flash(q.flip(0), k.flip(0), v.flip(0), block.causal)
    return out.flip(0), lse.flip(0)


def _block_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the merged out and lse of all rows."""
    grad_out, q, out, lse = (part[block.queries] for part in (grad_out, q, out, lse))
    k, v = k[block.keys], v[block.keys]
    if not block.backwards:
        return _flash_backward(grad_out, q, k, v, out, lse, block.causal)
    grad_out, q, k, v, out, lse = (part.flip(0) for part in (grad_out, q, k, v, out, lse))
    dq, dk, dv = _flash_backward(grad_out, q, k, v, out, lse, block.causal)
    return dq.flip(0), dk.flip(0), dv.flip(0)


def _merged(rows: slice, parts: Sequence[tuple[Block, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key blocks; every part holds the rows of its block, the first one all `rows`."""
    (_, first, first_lse), *others = parts
    if not others:
        return first, first_lse
    lse = first_lse.clone()
    inside = [slice(block.queries.start - rows.start, block.queries.stop - rows.start) for block, _, _ in others]
    for where, (_, _, part_lse) in zip(inside, others, strict=True):
        lse[where] = torch.logaddexp(lse[where], part_lse)
    out = first.float() * torch.exp(first_lse - lse).unsqueeze(-1)
    for where, (_, part, part_lse) in zip(inside, others, strict=True):
        out[where] += part.float() * torch.exp(part_lse - lse[where]).unsqueeze(-1)
    return out.to(first.dtype), lse


# -- the own-row part: one score per row, head and later step ----------------------------------------------------------


def _grouped(q: Tensor, num_kv_heads: int) -> Tensor:
    """(S, h, d) -> (S, g, h // g, d): the query heads that share a key head."""
    return q.unflatten(1, (num_kv_heads, -1))


def _own_scores(q: Tensor, later_k: Sequence[Tensor]) -> Tensor:
    grouped = _grouped(q, later_k[0].shape[1]).float()
    scores = [(grouped * key.float().unsqueeze(2)).sum(-1).flatten(1) for key in later_k]
    return torch.stack(scores, dim=-1) * q.shape[-1] ** -0.5


def _weighted(weights: Tensor, later_v: Sequence[Tensor], num_heads: int) -> Tensor:
    """Sum over later steps of weight (S, h, k) times value (S, g, d) -> (S, h, d) fp32."""
    grouped = weights.unflatten(1, (later_v[0].shape[1], -1))  # (S, g, h // g, k)
    total = sum(grouped[..., step, None] * value.float().unsqueeze(2) for step, value in enumerate(later_v))
    return total.flatten(1, 2)  # type: ignore[union-attr]


def _own_backward(
    grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, later_k: Sequence[Tensor], later_v: Sequence[Tensor],
    grad_q: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of later_k and later_v; adds this part's share to grad_q in place."""
    num_kv_heads, scale = later_k[0].shape[1], q.shape[-1] ** -0.5
    weights = torch.exp(_own_scores(q, later_k) - lse.unsqueeze(-1))  # (S, h, k)
    delta = _grouped((grad_out.float() * out.float()).sum(-1, keepdim=True), num_kv_heads)  # (S, g, r, 1)
    queries, grads = _grouped(q, num_kv_heads).float(), _grouped(grad_out, num_kv_heads).float()
    grouped_grad_q = _grouped(grad_q, num_kv_heads)
    grad_keys, grad_values = [], []
    for step, (key, value) in enumerate(zip(later_k, later_v, strict=True)):
        weight = _grouped(weights[..., step, None], num_kv_heads)  # (S, g, r, 1)
        grad_score = weight * ((grads * value.float().unsqueeze(2)).sum(-1, keepdim=True) - delta) * scale
        grouped_grad_q += grad_score * key.float().unsqueeze(2)
        grad_keys.append((grad_score * queries).sum(2).to(key.dtype))
        grad_values.append((weight * grads).sum(2).to(value.dtype))
    return *grad_keys, *grad_values


# -- the step-0 part: a flash kernel and its own backward, or plain tensor algebra -------------------------------------


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of q (S, h, d) over k, v (K, g, d); returns out (S, h, d) and the log-sum-exp (S, h) in fp32."""
    q4, k4, v4 = _heads_first(q, k, v)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, causal)
    elif _cuda_flash(q):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q4, k4, v4, 0.0, causal)
    else:
        out, lse = _plain(q4, k4, v4, causal)
    return out[0].transpose(0, 1), lse[0, :, : q.shape[0]].transpose(0, 1)


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the *merged* out and lse of its rows."""
    q4, k4, v4 = _heads_first(q, k, v)
    grad4, out4 = grad_out.transpose(0, 1)[None], out.transpose(0, 1)[None].contiguous()
    lse3 = lse.transpose(0, 1)[None].contiguous()
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad4, q4, k4, v4, out4, lse3, 0.0, causal
        )
    elif _cuda_flash(q):
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad4, q4, k4, v4, out4, lse3, None, None, q.shape[0], k.shape[0], 0.0, causal, unused, unused
        )
    else:
        grads = _plain_backward(grad4, q4, k4, v4, out4, lse3, causal)
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
    return dq, _sum_groups(dk, k.shape[1]), _sum_groups(dv, v.shape[1])


def _cuda_flash(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, heads, d) -> (1, heads, rows, d), key heads repeated to the query heads."""
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def _sum_groups(grad: Tensor, num_kv_heads: int) -> Tensor:
    """(K, h, d) -> (K, g, d): the gradient of a repeated key head is the sum over its repeats."""
    return grad if grad.shape[1] == num_kv_heads else grad.unflatten(1, (num_kv_heads, -1)).sum(2)


def _plain_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _plain_scores(q, k, causal)
    lse = torch.logsumexp(scores, dim=-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) @ v.float()).to(q.dtype), lse


def _plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.exp(_plain_scores(q, k, causal) - lse.unsqueeze(-1))
    grad = grad_out.float()
    delta = (grad * out.float()).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ v.float().transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    return grad_scores @ k.float(), grad_scores.transpose(-1, -2) @ q.float(), weights.transpose(-1, -2) @ grad


# -- the slow twin -----------------------------------------------------------------------------------------------------


def dense_ttt_attention(
    q: Tensor, k: Tensor, v: Tensor, later_k: Sequence[Tensor], later_v: Sequence[Tensor], runs: Sequence[Run],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """The same attention with a materialised (S, N + k * S) mask; for tests."""
    num_rows, num_heads = q.shape[:2]
    repeat = num_heads // k.shape[1]
    keys = torch.cat((k, *later_k)).repeat_interleave(repeat, dim=1)
    values = torch.cat((v, *later_v)).repeat_interleave(repeat, dim=1)
    sees = torch.zeros(num_rows, k.shape[0], dtype=torch.bool)
    rows = [(run.first, row) for run in runs for row in range(run.start, run.stop)]
    for query, (first, row) in enumerate(rows):
        sees[query, first if window is None else max(first, row - window + 1) : row + 1] = True
    sees = torch.cat((sees, *[torch.eye(num_rows, dtype=torch.bool) for _ in later_k]), dim=1)
    scores = torch.einsum("shd,khd->hsk", q, keys) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hsk,khd->shd", weights, values)
