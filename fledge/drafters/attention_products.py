"""The step-0 part of TTT attention as blocked matrix products: for 16-bit numbers on a CPU.

PyTorch's flash kernel for CPUs reaches a tenth of what the machine's bf16 products do (docs/log.md, "Attention in bf16
on a CPU"). Here the query rows of a document are taken in order, so many at a time, and their scores are one product
per key head over all keys up to the last row; only keys from the first row on need a mask. Rows may have holes between
them: what they see is decided by their numbers. Chunks are filled up with queries of zeros, and with keys that nobody
sees, to few different shapes: the library behind the products keeps half a MiB for every shape it has met.

Everything between the products is one pass over 16-bit numbers. In the backward the products subtract, too: a query has
two columns more that hold its log-sum-exp, in two parts because one 16-bit number is too coarse for it, and a key has
ones there:

    [q | -lse] . [k | 1] = s - lse        p = exp(s - lse)
    [grad | -delta] . [v | 1] = dp - delta        ds = p (dp - delta)

The forward has these columns too, with zeros in the queries, so that all products are of three shapes. Scores are
rounded to 16 bits where a flash kernel keeps them in fp32: gradients are off by 0.7 % instead of 0.5 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.drafters.runs import Run

# N rows of all documents, S query rows, h = g * r query heads, g key heads, d head_dim; s queries and n keys of a chunk

ROWS = 128  # queries of a chunk
FULL = 128  # of which, and of keys, a chunk has a multiple
EXTRA = 8  # columns beside a head's own: two are used, and products like widths that are multiples of eight


@dataclass(frozen=True)
class Chunk:
    """Places of one document's queries, in the order of their rows, and the keys that any of them sees."""

    queries: slice
    keys: slice
    hidden: Tensor  # (s, m) bool: of the last m keys, those that a query does not see


@dataclass(frozen=True)
class Plan:
    """All chunks; `places` (S,) says where each query stands among the `num_places` of them."""

    chunks: tuple[Chunk, ...]
    places: Tensor
    num_places: int


def suits(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)


def plan(runs: Sequence[Run], window: int | None) -> Plan:
    documents: dict[int, list[int]] = {}  # numbers of a document's runs, in the order of their rows
    for number in sorted(range(len(runs)), key=lambda number: runs[number].start):
        documents.setdefault(runs[number].first, []).append(number)
    sizes = [run.stop - run.start for run in runs]
    places_of = list(torch.empty(sum(sizes), dtype=torch.int64).split(sizes))
    chunks, begin = [], 0
    for first, numbers in documents.items():
        rows = torch.cat([torch.arange(runs[number].start, runs[number].stop) for number in numbers])
        places = []
        for some in rows.split(ROWS):
            lowest, num_rows = int(some[0]), _full(len(some))
            oldest = first if window is None else max(first, lowest - window + 1)
            stop = oldest + _full(int(some[-1]) + 1 - oldest)
            key = torch.arange(lowest if window is None else oldest, stop)
            hidden = torch.zeros(num_rows, len(key), dtype=torch.bool)
            hidden[: len(some)] = key > some[:, None]
            if window is not None:
                hidden[: len(some)] |= key <= some[:, None] - window
            chunks.append(Chunk(slice(begin, begin + num_rows), slice(oldest, stop), hidden))
            places.append(torch.arange(begin, begin + len(some)))
            begin += num_rows
        for number, part in zip(numbers, torch.cat(places).split([sizes[number] for number in numbers]), strict=True):
            places_of[number] = part
    return Plan(tuple(chunks), torch.cat(places_of or [torch.empty(0, dtype=torch.int64)]), begin)


def _full(number: int) -> int:
    return -(-number // FULL) * FULL


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """q (S, h, d) over k, v (N, g, d); returns out (S, h, d) and the log-sum-exp (S, h) in fp32."""
    size = q.shape[-1]
    queries = _beside(_grouped(_placed(q, plan), k.shape[1]) * size**-0.5)
    keys, values = _keys(k), _keys(v)
    out = queries.new_empty((*queries.shape[:3], size))
    lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
    for chunk in plan.chunks:
        scores = _scores(queries, keys, chunk)
        highest = scores.amax(-1)
        weights = torch.softmax(scores, -1)
        lse[:, :, chunk.queries] = highest.float() - weights.amax(-1).float().log()
        out[:, :, chunk.queries] = (weights.flatten(1, 2) @ values[:, chunk.keys, :size]).unflatten(
            1, weights.shape[1:3]
        )
    return _back(_rows_first(out), plan), _back(lse.permute(2, 0, 1).flatten(1), plan)


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in fp32, given the merged out and lse of all rows."""
    (num_rows, groups, size), scale = k.shape, q.shape[-1] ** -0.5
    delta = (grad_out.float() * out.float()).sum(-1)
    queries = _beside(_grouped(_placed(q, plan), groups) * scale, _grouped(_placed(-lse, plan), groups))
    grads = _beside(_grouped(_placed(grad_out, plan), groups), _grouped(_placed(-delta, plan), groups))
    keys, values = _keys(k), _keys(v)
    grad_q = queries.new_empty((*queries.shape[:3], size))
    grad_k, grad_v = (k.new_zeros((groups, keys.shape[1], size), dtype=torch.float32) for _ in range(2))
    for chunk in plan.chunks:
        weights = _scores(queries, keys, chunk).exp_().flatten(1, 2)  # (g, r * s, n)
        asked, given = (part[:, :, chunk.queries].flatten(1, 2) for part in (queries, grads))
        grad_scores = (given @ values[:, chunk.keys].transpose(1, 2)).mul_(weights)
        grad_q[:, :, chunk.queries] = (grad_scores @ keys[:, chunk.keys, :size]).unflatten(1, (queries.shape[1], -1))
        grad_k[:, chunk.keys] += grad_scores.transpose(1, 2) @ asked[..., :size]
        grad_v[:, chunk.keys] += weights.transpose(1, 2) @ given[..., :size]
    grad_q = _back(_rows_first(grad_q.float().mul_(scale)), plan)
    return grad_q, grad_k[:, :num_rows].transpose(0, 1), grad_v[:, :num_rows].transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, chunk: Chunk) -> Tensor:
    """(g, r, s, n), minus infinity where a query does not see."""
    asked = queries[:, :, chunk.queries]
    scores = (asked.flatten(1, 2) @ keys[:, chunk.keys].transpose(1, 2)).unflatten(1, asked.shape[1:3])
    scores[..., scores.shape[-1] - chunk.hidden.shape[1] :].masked_fill_(chunk.hidden, float("-inf"))
    return scores


def _placed(rows: Tensor, plan: Plan) -> Tensor:
    """(S, ..) -> (places, ..), zeros where there is no query."""
    return rows.new_zeros((plan.num_places, *rows.shape[1:])).index_copy_(0, plan.places, rows)


def _back(rows: Tensor, plan: Plan) -> Tensor:
    """(places, ..) -> (S, ..)"""
    return rows[plan.places]


def _keys(states: Tensor) -> Tensor:
    """(N, g, d) -> (g, N + FULL, d + EXTRA): zeros behind the last row, two columns of ones behind the last one."""
    num_rows, groups, size = states.shape
    wider = states.new_zeros((groups, num_rows + FULL, size + EXTRA))
    wider[:, :num_rows, :size] = states.transpose(0, 1)
    wider[..., size : size + 2] = 1
    return wider


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """(S, h, ..) -> (g, r, S, ..): query heads beside the key head they share."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, *range(3, rows.dim() + 1))


def _rows_first(states: Tensor) -> Tensor:
    """(g, r, S, d) -> (S, h, d)"""
    return states.permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _beside(states: Tensor, number: Tensor | None = None) -> Tensor:
    """(g, r, S, d) and (g, r, S) fp32 -> (g, r, S, d + EXTRA), the number in two parts."""
    size = states.shape[-1]
    wider = states.new_zeros((*states.shape[:3], size + EXTRA))
    wider[..., :size] = states
    if number is not None:
        wider[..., size] = number
        wider[..., size + 1] = number - wider[..., size].float()
    return wider
