"""The step-0 part of TTT attention as flash attention over rectangular blocks, or plain tensor algebra.

Only rows that are trained at some step need queries. They form a few contiguous runs per document, and a run
[start, stop) of a document beginning at `first` needs two blocks, neither of which has a mask:

        keys    first ........ start ........ stop
        queries start..stop    [  full   ][ causal ]

A sliding window cuts the run into chunks no longer than itself, each with one block more: the oldest keys, of which
every later query sees one less. Read backwards (both queries and keys), that triangle is a causal block, too:

        window = 3, chunk of rows 3 4 5      keys 1 2 | 3 4 5        read backwards    2 1
                                         3        1 1 | 1 . .                      4   1 .
                                         4        . 1 | 1 1 .                      3   1 1
                                         5        . . | 1 1 1
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.drafters.runs import Run

# N rows of all documents, S query rows, h query heads, g key heads, d head_dim; s queries and n keys of one block

PLAIN_BYTES = 256 * 2**20  # of scores that exist at a time where no flash kernel is used


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


class BlockAttention:
    """Attention of the query rows of `runs`, block by block. A row sees `window` keys at most, its own included."""

    def __init__(self, runs: Sequence[Run], window: int | None) -> None:
        self.chunks = tuple(blocks_of(runs, window))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (S, h, d) over k, v (N, g, d); returns out (S, h, d) and the log-sum-exp (S, h) in fp32."""
        queries, keys, values = _heads_first(q, k, v)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for rows, blocks in self.chunks:
            parts = [(block, *_block(queries, keys, values, block)) for block in blocks]
            merged, merged_lse = _merged(rows, parts)
            out[rows], lse[rows] = merged.transpose(0, 1), merged_lse.T
        return out, lse

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in fp32, given the merged out and lse of all rows."""
        num_kv_heads = k.shape[1]
        q, k, v = _heads_first(q, k, v)
        grad_out, out, lse = (part.transpose(0, 1).contiguous() for part in (grad_out, out, lse))
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        grad_k, grad_v = (k.new_zeros((num_kv_heads, *k.shape[1:]), dtype=torch.float32) for _ in range(2))
        for _, blocks in self.chunks:
            for block in blocks:
                dq, dk, dv = _block_backward(grad_out, out, lse, q, k, v, block)
                grad_q[:, block.queries] += dq
                grad_k[:, block.keys] += _sum_groups(dk, num_kv_heads)
                grad_v[:, block.keys] += _sum_groups(dv, num_kv_heads)
        return grad_q.transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, heads, d) -> (heads, rows, d), key heads repeated to the query heads."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    return (q, k, v) if repeat == 1 else (q, k.repeat_interleave(repeat, dim=0), v.repeat_interleave(repeat, dim=0))


def _sum_groups(grad: Tensor, num_kv_heads: int) -> Tensor:
    """(h, n, d) -> (g, n, d): the gradient of a repeated key head is the sum over its repeats."""
    return grad if len(grad) == num_kv_heads else grad.unflatten(0, (num_kv_heads, -1)).sum(1, dtype=torch.float32)


def _block(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Output (h, s, d) and log-sum-exp (h, s) of one block's queries, in their order."""
    q, k, v = q[:, block.queries], k[:, block.keys], v[:, block.keys]
    if not block.backwards:
        return _flash(q, k, v, block.causal)
    out, lse = _flash(q.flip(1), k.flip(1), v.flip(1), block.causal)
    return out.flip(1), lse.flip(1)


def _block_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the merged out and lse of all rows."""
    grad_out, out, lse, q = (part[:, block.queries] for part in (grad_out, out, lse, q))
    k, v = k[:, block.keys], v[:, block.keys]
    if not block.backwards:
        return _flash_backward(grad_out, q, k, v, out, lse, block.causal)
    grad_out, q, k, v, out, lse = (part.flip(1) for part in (grad_out, q, k, v, out, lse))
    dq, dk, dv = _flash_backward(grad_out, q, k, v, out, lse, block.causal)
    return dq.flip(1), dk.flip(1), dv.flip(1)


def _merged(rows: slice, parts: Sequence[tuple[Block, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key blocks; every part holds the rows of its block, the first one all `rows`."""
    (_, first, first_lse), *others = parts
    if not others:
        return first, first_lse
    lse = first_lse.clone()
    inside = [slice(block.queries.start - rows.start, block.queries.stop - rows.start) for block, _, _ in others]
    for where, (_, _, part_lse) in zip(inside, others, strict=True):
        lse[:, where] = torch.logaddexp(lse[:, where], part_lse)
    out = first.float() * torch.exp(first_lse - lse).unsqueeze(-1)
    for where, (_, part, part_lse) in zip(inside, others, strict=True):
        out[:, where] += part.float() * torch.exp(part_lse - lse[:, where]).unsqueeze(-1)
    return out.to(first.dtype), lse


# -- one block: a flash kernel and its own backward, or plain tensor algebra; all heads first --------------------------


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of q (h, s, d) over k, v (h, n, d); returns out (h, s, d) and the log-sum-exp (h, s) in fp32."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], 0.0, causal)
    elif _cuda_flash(q):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q[None], k[None], v[None], 0.0, causal)
    else:
        return _plain(q, k, v, causal)
    return out[0], lse[0, :, : q.shape[1]]


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the *merged* out and lse of its rows."""
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[None], q[None], k[None], v[None], out[None], lse[None], 0.0, causal
        )
    elif _cuda_flash(q):
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out[None], q[None], k[None], v[None], out[None], lse[None], None, None, q.shape[1], k.shape[1], 0.0,
            causal, unused, unused,
        )  # fmt: skip
    else:
        return _plain_backward(grad_out, q, k, v, out, lse, causal)
    return dq[0], dk[0], dv[0]


def _cuda_flash(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    parts = [_plain_part(q[:, rows], k[:, keys], v[:, keys], causal) for rows, keys in _plain_parts(q, k, causal)]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _plain_parts(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Rows of a block whose scores fit PLAIN_BYTES, and the keys they see: the whole matrix of 8192 rows and 32 heads
    has 8 GiB."""
    num_rows = max(1, PLAIN_BYTES // (4 * q.shape[0] * k.shape[1]))
    for start in range(0, q.shape[1], num_rows):
        stop = min(start + num_rows, q.shape[1])
        yield slice(start, stop), slice(0, stop if causal else k.shape[1])


def _plain_scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """(h, s, n); where causal, the last query sees the last key."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _plain_part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _plain_scores(q, k, causal)
    lse = torch.logsumexp(scores, dim=-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) @ v.float()).to(q.dtype), lse


def _plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q, dtype=torch.float32)
    grad_k, grad_v = (torch.zeros_like(part, dtype=torch.float32) for part in (k, v))
    for rows, keys in _plain_parts(q, k, causal):
        query, key, value, grad = q[:, rows].float(), k[:, keys].float(), v[:, keys].float(), grad_out[:, rows].float()
        weights = torch.exp(_plain_scores(query, key, causal) - lse[:, rows].unsqueeze(-1))
        delta = (grad * out[:, rows].float()).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ value.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
        grad_q[:, rows] = grad_scores @ key
        grad_k[:, keys] += grad_scores.transpose(-1, -2) @ query
        grad_v[:, keys] += weights.transpose(-1, -2) @ grad
    return grad_q, grad_k, grad_v
