"""Attention on a GPU that gives a row of a tree the same bits as alone.

A row's sums are taken over parts of PART positions and blocks within them, both counted from the text's beginning, and
the parts are joined one after the other. What is computed beside it, the tree and how many keys the cache shows change
none of them: where a position lies in the tree, its key is that of the row's own ancestor there. All rows are computed
in blocks of one size, of which a single one fills a part. `attention_by_rows` is the slow twin.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.target import card
from fledge.target.card import found, power
from fledge.target.gpu import MOST_HEAD, cut

# B sequences, N nodes, h query heads, g key heads, d head_dim, K keys

PART = 256  # positions
BLOCK = 64  # rows of query heads that share a key head


@dataclass(frozen=True)
class Paths:
    """Where in the cache the texts of a tree's nodes lie: in its first rows and, behind them, where `nodes` says."""

    lengths: Tensor  # (B,) rows that all nodes of a sequence see
    levels: Tensor  # (B, N)
    nodes: Tensor  # (B, N, N): of a node's ancestor at each level, and of itself, the place in the tree

    @classmethod
    def of(cls, lengths: Tensor, levels: Tensor, ancestors: Tensor) -> "Paths":
        """levels (B, N), ancestors (B, N, N) bool, with every node its own ancestor."""
        num_nodes = levels.shape[1]
        slots = torch.where(ancestors, levels[:, None, :], num_nodes)
        places = torch.arange(num_nodes, device=levels.device).expand_as(slots)
        nodes = places.new_zeros(*slots.shape[:2], num_nodes + 1).scatter_(2, slots, places)
        return cls(lengths.contiguous(), levels.contiguous(), nodes[..., :num_nodes].contiguous())


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, paths: Paths, scale: float) -> Tensor:
    """query (B, h, N, d), key and value (B, g, K, d), mask (B or 1, 1, N, K) added to scores -> (B, N, h, d).

    Raises ValueError for heads of which it knows nothing.
    """
    (batch, heads, rows, size), (groups, keys) = query.shape, key.shape[1:3]
    shared = heads // groups
    one_kind = value.shape == key.shape and query.dtype is key.dtype is value.dtype and key.stride(3) == 1
    if not card.fits(query, key, value) or not one_kind or size > MOST_HEAD or shared > BLOCK:
        raise ValueError(f"heads of kinds {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}")
    query, value = (one if one.stride(3) == 1 else one.contiguous() for one in (query, value))
    at_a_time, stages = cut(max(16, power(size)), BLOCK, query.element_size())
    blocks, whole_parts = -(-rows * shared // BLOCK), keys // PART
    own_parts = 1 + -(-(rows - 1) // PART)  # those that a tree may reach into
    parts = -(-keys // PART)
    mixed = torch.empty(parts, batch, rows, heads, size, dtype=torch.float32, device=query.device)
    sums = torch.empty(mixed.shape[:-1], dtype=torch.float32, device=query.device)
    out = query.new_empty(batch, rows, heads, size)
    masked = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(2))
    operations, joint = found(), blocks * whole_parts
    operations.attend_exact[joint + rows * own_parts, batch * groups](
        query, key, value, mask, paths.lengths, paths.levels, paths.nodes, mixed, sums, scale, rows, blocks, joint,
        heads, groups, size, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *masked,
        HAS_MASK=mask is not None, PRECISION="ieee", PART=PART, SIZE=max(16, power(size)), BLOCK_M=BLOCK,
        BLOCK_N=at_a_time, num_warps=4, num_stages=stages,
    )  # fmt: skip
    lines = batch * rows * heads
    operations.join_exact[lines,](
        mixed, sums, paths.lengths, paths.levels, out, rows, heads, lines, size, PART=PART, SIZE=power(size),
        num_warps=2,
    )  # fmt: skip
    return out
