"""Triton kernels of training-time test: a row's later steps, one score each. `ttt_attention.py` has the slow twin.

A program takes one row and one key head with the query heads that share it. Operation by operation this part was a
third of the launches of a training step (7 steps, Qwen3-8B shapes), all of them over fp32 copies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# S rows, h query heads, g key heads, r = h / g, d head_dim, k later steps


@triton.jit(do_not_specialize=["rows", "steps"])
def _merge(
    query, out, lse, keys, values, merged, merged_lse, scale, rows, steps, groups, shared, size,
    SHARED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, SHARED), tl.arange(0, SIZE)
    inside, whole = head < shared, d < size
    heads = (row * groups + group) * shared + head
    at, there = heads[:, None] * size + d[None, :], inside[:, None] & whole[None, :]
    q = tl.load(query + at, mask=there, other=0.0).to(tl.float32)
    mixed = tl.load(out + at, mask=there, other=0.0).to(tl.float32)
    most = tl.load(lse + heads, mask=inside, other=0.0)
    total = tl.full((SHARED,), 1.0, tl.float32)
    for step in range(0, steps):
        place = ((step * rows + row) * groups + group) * size + d
        key = tl.load(keys + place, mask=whole, other=0.0).to(tl.float32)
        value = tl.load(values + place, mask=whole, other=0.0).to(tl.float32)
        score = tl.sum(q * key[None, :], 1) * scale
        more = tl.maximum(most, score)
        kept, weight = tl.exp(most - more), tl.exp(score - more)
        mixed = mixed * kept[:, None] + weight[:, None] * value[None, :]
        total, most = total * kept + weight, more
    tl.store(merged + at, (mixed / total[:, None]).to(merged.dtype.element_ty), mask=there)
    tl.store(merged_lse + heads, most + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _merge_backward(
    grad_out, query, out, lse, keys, values, grad_query, grad_keys, grad_values, scale, rows, steps, groups, shared,
    size, SHARED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, SHARED), tl.arange(0, SIZE)
    inside, whole = head < shared, d < size
    heads = (row * groups + group) * shared + head
    at, there = heads[:, None] * size + d[None, :], inside[:, None] & whole[None, :]
    q = tl.load(query + at, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + at, mask=there, other=0.0).to(tl.float32)
    delta = tl.sum(grad * tl.load(out + at, mask=there, other=0.0).to(tl.float32), 1)
    of_row = tl.load(lse + heads, mask=inside, other=float("inf"))  # heads that are none weigh nothing
    grad_q = tl.load(grad_query + at, mask=there, other=0.0)
    for step in range(0, steps):
        place = ((step * rows + row) * groups + group) * size + d
        key = tl.load(keys + place, mask=whole, other=0.0).to(tl.float32)
        value = tl.load(values + place, mask=whole, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(q * key[None, :], 1) * scale - of_row)
        grad_score = weight * (tl.sum(grad * value[None, :], 1) - delta) * scale
        grad_q += grad_score[:, None] * key[None, :]
        kind: tl.constexpr = grad_keys.dtype.element_ty
        tl.store(grad_keys + place, tl.sum(grad_score[:, None] * q, 0).to(kind), mask=whole)
        tl.store(grad_values + place, tl.sum(weight[:, None] * grad, 0).to(kind), mask=whole)
    tl.store(grad_query + at, grad_q, mask=there)


def merge(q: Tensor, out: Tensor, lse: Tensor, later_k: Tensor, later_v: Tensor) -> tuple[Tensor, Tensor]:
    """The attention out (S, h, d) and log-sum-exp (S, h) float32 of rows over step-0 keys, with the keys and values of
    their later steps (k, S, g, d) as well."""
    merged, merged_lse = torch.empty_like(q), torch.empty_like(lse)
    _launch(_merge, q, later_k, q, out, lse.contiguous(), later_k, later_v, merged, merged_lse)
    return merged, merged_lse


def merge_backward(
    grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, later_k: Tensor, later_v: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of later_k and later_v; adds this part's share to grad_q (S, h, d) float32 in place."""
    grad_k, grad_v = torch.empty_like(later_k), torch.empty_like(later_v)
    _launch(_merge_backward, q, later_k, grad_out, q, out, lse, later_k, later_v, grad_q, grad_k, grad_v)
    return grad_k, grad_v


def _launch(kernel: object, q: Tensor, later: Tensor, *tensors: Tensor) -> None:
    assert all(one.is_contiguous() for one in tensors)
    (rows, heads, size), (steps, _, groups, _) = q.shape, later.shape
    shared = heads // groups
    kernel[rows, groups](  # type: ignore[index]
        *tensors, size**-0.5, rows, steps, groups, shared, size,
        SHARED=triton.next_power_of_2(shared), SIZE=triton.next_power_of_2(size), num_warps=2,
    )  # fmt: skip
