"""Attention of training-time test (TTT): exact, linear in memory, no mask matrix.

At TTT step k, row t sees the step-0 keys of rows 0..t of its document and, of every later step j = 1..k, only the key
of its own row (EAGLE-3 paper, section 3.2):

                     step-0 keys      step-1     step-2
        row 0        1 . . .          1 . . .    1 . . .
        row 1        1 1 . .          . 1 . .    . 1 . .
        row 2        1 1 1 .          . . 1 .    . . 1 .
        row 3        1 1 1 1          . . . 1    . . . 1

The step-0 part is flash attention over a few rectangular blocks (attention_blocks.py) or, for 16-bit numbers, one
kernel for all documents on a GPU (varlen_attention.py) and blocked matrix products on a CPU
(`fledge.drafters.cpu_kernels`); the later steps are one score per row (on a GPU `kernels.py`). The parts are merged by
their log-sum-exp. The trick is in the backward: the backward of a block only uses the output and the log-sum-exp of a
row to know its softmax. Given the *merged* ones it returns the exact gradient of its own block (ring attention does the
same across devices), and the per-row part is elementwise.

`dense_ttt_attention` is the slow twin: a materialised mask and an ordinary softmax.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fledge.drafters import cpu_kernels
from fledge.drafters.eagle3 import varlen_attention
from fledge.drafters.eagle3.attention_blocks import BlockAttention
from fledge.drafters.eagle3.varlen_attention import VarlenAttention
from fledge.drafters.runs import QueryPlaces, Run
from fledge.target import card

# N rows of all documents, S query rows, h query heads, g key heads, d head_dim, k later steps


def ttt_attention(
    q: Tensor, k: Tensor, v: Tensor, later_k: Sequence[Tensor], later_v: Sequence[Tensor], runs: Sequence[Run],
    window: int | None = None, places: QueryPlaces | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the S active rows at one TTT step.

    q (S, h, d); step-0 keys and values k, v (N, g, d); the own-row keys and values of steps 1..k: later_k, later_v,
    each (S, g, d). The query rows are those of `runs`, in order. With `window`, a row sees only so many step-0 keys,
    its own included. `places`: where the rows stand in their documents, which a GPU's kernel asks. Returns (S, h, d).
    """
    assert sum(run.stop - run.start for run in runs) == q.shape[0], f"{q.shape=} {runs=}"
    assert window is None or window > 0, f"{window=}"
    of_step_0: StepZeroAttention
    if cpu_kernels.suits(q):
        of_step_0 = cpu_kernels.ProductAttention(runs, window)
    elif places is not None and varlen_attention.suits(q):
        of_step_0 = VarlenAttention(places, window, len(q))
    else:
        of_step_0 = BlockAttention(runs, window)
    return _TTTAttention.apply(q, k, v, of_step_0, *later_k, *later_v)


class StepZeroAttention(Protocol):
    """Attention of the query rows of some runs over the step-0 keys and values: what the kernels have in common."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (S, h, d) over k, v (N, g, d); returns out (S, h, d) and the log-sum-exp (S, h) in fp32."""
        ...

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in fp32, given the merged out and lse of all rows."""
        ...


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, of_step_0: StepZeroAttention, *later: Tensor) -> Tensor:
        num_later = len(later) // 2
        later_k, later_v = later[:num_later], later[num_later:]
        out, lse = of_step_0.attend(q, k, v)
        if num_later and card.fits(q, *later):
            from fledge.drafters.eagle3 import kernels

            q = q.contiguous()
            out, lse = kernels.merge(q, out.contiguous(), lse, torch.stack(later_k), torch.stack(later_v))
        elif num_later:
            scores = _own_scores(q, later_k)  # (S, h, k) fp32
            merged = torch.logsumexp(torch.cat((lse.unsqueeze(-1), scores), dim=-1), dim=-1)
            weights = torch.exp(scores - merged.unsqueeze(-1))
            total = out.float() * torch.exp(lse - merged).unsqueeze(-1)
            out = (total + _weighted(weights, later_v, q.shape[1])).to(q.dtype)
            lse = merged
        ctx.save_for_backward(q, k, v, out, lse, *later)
        ctx.of_step_0 = of_step_0
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_out,) = grads
        q, k, v, out, lse, *later = ctx.saved_tensors
        num_later = len(later) // 2
        later_k, later_v = later[:num_later], later[num_later:]
        grad_out = grad_out.contiguous()
        grad_q, grad_k, grad_v = ctx.of_step_0.attend_backward(grad_out, q, k, v, out, lse)
        grad_later: tuple[Tensor, ...] = ()
        if num_later and card.fits(q, *later):
            from fledge.drafters.eagle3 import kernels

            stacked = torch.stack(later_k), torch.stack(later_v)
            grad_q = grad_q.contiguous()
            grads_of_them = kernels.merge_backward(grad_out, q, out, lse, *stacked, grad_q)
            grad_later = tuple(one for part in grads_of_them for one in part)
        elif num_later:
            grad_later = _own_backward(grad_out, q, out, lse, later_k, later_v, grad_q)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, *grad_later


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
