"""Attention of training blocks: exact, linear in memory, without a mask over the whole batch.

A slot sees the context keys before its block's anchor and the slots of its own block:

                  context keys 0 1 2 3 4 5 ..    own block
    anchor 2             1 1 . . . .             1 1 1
    anchor 5             1 1 1 1 1 .             1 1 1

Blocks are taken a chunk of neighbours at a time: their keys are one slice of the context, of which only the edges need
a mask. Scores exist for one chunk; the backward computes them again. `dense_block_attention` is the slow twin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.drafters.batch import sent
from fledge.drafters.cpu_kernels import round_up
from fledge.drafters.dspark.blocks import Blocks

# N context rows, b blocks, c of a chunk, S slots, h = g * r query heads, g key heads, d head_dim, n keys of a chunk

QUERIES = {"cpu": 128, "cuda": 512}  # of a chunk


@dataclass(frozen=True)
class BlockChunk:
    """Consecutive blocks of one document, and the context keys that any of them sees."""

    blocks: slice
    keys: slice
    hidden: Tensor  # (c, n) bool: keys that a block does not see


def chunks_of(blocks: Blocks, slots: int, num_rows: int, window: int | None, device: torch.device) -> list[BlockChunk]:
    """All blocks in chunks. Numbers of keys are rounded up: few different shapes."""
    size = max(1, (QUERIES["cpu"] if device.type == "cpu" else QUERIES["cuda"]) // slots)
    oldest = blocks.first if window is None else torch.maximum(blocks.first, blocks.rows - window)
    chunks, begin = [], 0
    for count in torch.unique_consecutive(blocks.document, return_counts=True)[1].tolist():
        for start in range(begin, begin + count, size):
            part = slice(start, min(start + size, begin + count))
            low, high = int(oldest[part.start]), int(blocks.rows[part.stop - 1])
            stop = min(num_rows, low + round_up(high - low))
            key = torch.arange(low, stop)
            hidden = (key < oldest[part, None]) | (key >= blocks.rows[part, None])
            chunks.append(BlockChunk(part, slice(low, stop), sent(hidden, device)))
        begin += count
    return chunks


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, chunks: Sequence[BlockChunk], causal: bool
) -> Tensor:
    """q (b, S, h, d) over k, v (b, S, g, d) of its own block and the context's (N, g, d); returns (b, S, h, d)."""
    return _BlockAttention.apply(q, k, v, context_k, context_v, chunks, causal)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor,
        chunks: Sequence[BlockChunk], causal: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, context_k, context_v)
        ctx.chunks, ctx.causal = chunks, causal
        out = torch.empty_like(q)
        for chunk in chunks:
            out[chunk.blocks] = _attend(_parts(chunk, q, k, v, context_k, context_v), chunk.hidden, causal)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, context_k, context_v = ctx.saved_tensors
        of_blocks = [torch.zeros_like(part) for part in (q, k, v)]
        of_context = [torch.zeros_like(part, dtype=torch.float32) for part in (context_k, context_v)]
        for chunk in ctx.chunks:
            parts = [part.detach().requires_grad_() for part in _parts(chunk, q, k, v, context_k, context_v)]
            with torch.enable_grad():
                out = _attend(parts, chunk.hidden, ctx.causal)
            found = torch.autograd.grad(out, parts, grads[0][chunk.blocks])
            for total, grad in zip(of_blocks, found[:3], strict=True):
                total[chunk.blocks] = grad
            for total, grad in zip(of_context, found[3:], strict=True):
                total[chunk.keys] += grad
        return *of_blocks, *[total.to(context_k.dtype) for total in of_context], None, None


def _parts(
    chunk: BlockChunk, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor
) -> tuple[Tensor, ...]:
    return (*(part[chunk.blocks] for part in (q, k, v)), context_k[chunk.keys], context_v[chunk.keys])


def _attend(parts: Sequence[Tensor], hidden: Tensor, causal: bool) -> Tensor:
    """One chunk: q (c, S, h, d), k and v (c, S, g, d), the context's (n, g, d); hidden (c, n)."""
    q, k, v, context_k, context_v = parts
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5
        far = torch.einsum("csgrd,ngd->gcrsn", grouped, context_k).float()
        near = torch.einsum("csgrd,ctgd->gcrst", grouped, k).float()
        far = far.masked_fill(hidden[None, :, None, None], float("-inf"))
        if causal:
            later = torch.ones(near.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            near = near.masked_fill(later, float("-inf"))
        weights = torch.cat((far, near), dim=-1).softmax(-1).to(v.dtype)
        of_context, own = weights.split((far.shape[-1], near.shape[-1]), dim=-1)
        out = torch.einsum("gcrsn,ngd->csgrd", of_context, context_v) + torch.einsum("gcrst,ctgd->csgrd", own, v)
        return out.flatten(2, 3)


def dense_block_attention(
    q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, blocks: Blocks, window: int | None,
    causal: bool,
) -> Tensor:  # fmt: skip
    """The same attention with one mask of all queries and all keys, context and blocks; for tests."""
    num_blocks, slots, num_heads, head_dim = q.shape
    repeat = num_heads // k.shape[2]
    keys = torch.cat((context_k, k.flatten(0, 1))).repeat_interleave(repeat, dim=1)
    values = torch.cat((context_v, v.flatten(0, 1))).repeat_interleave(repeat, dim=1)
    sees = torch.zeros(num_blocks, slots, len(keys), dtype=torch.bool)
    for block, (anchor, first) in enumerate(zip(blocks.rows.tolist(), blocks.first.tolist(), strict=True)):
        sees[block, :, first if window is None else max(first, anchor - window) : anchor] = True
        own = len(context_k) + block * slots
        for slot in range(slots):
            sees[block, slot, own : own + (slot + 1 if causal else slots)] = True
    scores = torch.einsum("qhd,khd->hqk", q.flatten(0, 1), keys) * head_dim**-0.5
    weights = scores.masked_fill(~sees.flatten(0, 1), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).view_as(q)
