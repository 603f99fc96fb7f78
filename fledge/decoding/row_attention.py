"""Attention that gives a row the same bits alone, in a chain, in a tree and in a batch.

The order in which a stock kernel sums over keys depends on how many rows are asked and on where the keys lie. So the
logits of a token are other bits in a tree than in plain decoding, and where two tokens are nearly tied, another one
wins. Here a row's position t alone says how its sum is taken: in two parts, each by the same kernel, merged by their
log-sum-exp.

    BLOCK = 4, t = 13       keys  0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 . .
                                  prefix: < start   tail: start .. start + 2 BLOCK - 1, in the order of the text

start(t) is a multiple of BLOCK and BLOCK to 2 BLOCK - 1 positions before t. So no node of a tree of up to BLOCK levels
has another node in its prefix: the keys lie there as in plain decoding. The tail of a node is gathered, its ancestors
in the order of their levels; those of a chain lie in this order anyway.

A kernel also sums in another order when there are more keys, even if they are masked. So the number of keys that the
prefix's call reads depends on start(t) alone, too, and what lies behind the prefix is masked; nodes of a round that
differ in it take calls of their own. What is left to the kernel: a row must get the same bits however many rows are
computed, filled up to a multiple of ROWS. `exact.py` tries it out. Knows tensors and trees.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.decoding.masks import Kind, additive
from fledge.drafters.tree import Trees

# B sequences, N nodes, h query heads, g key heads, q query heads per key head, K keys that are read, P rows of the
# prefix, T rows of a tail, d head_dim, M packed rows: the q * N rows of a key head, filled up

BLOCK = 16
TAIL = 2 * BLOCK
ROWS = 4  # kernels of fewer rows sum in another order
SIZES = (0, 64, 128, 256, 512)  # of prefixes as they are read; then multiples of the last, which is the kernel's block

Part = tuple[Tensor, Tensor]  # attention over some of the keys (B, g, M, d), and its log-sum-exp (B, g, M) float32


def starts_of(positions: Tensor) -> Tensor:
    """Where the tails of rows at these positions start."""
    return ((positions // BLOCK - 1) * BLOCK).clamp_min(0)


def read_for(starts: Tensor) -> Tensor:
    """How many keys are read for prefixes that end there."""
    sizes = torch.tensor(SIZES)
    few = sizes[torch.bucketize(starts.clamp(max=SIZES[-1]), sizes)]
    return torch.where(starts > SIZES[-1], -(-starts // SIZES[-1]) * SIZES[-1], few)


@dataclass(frozen=True)
class Cut:
    """How the keys of all nodes of a round are cut, for one kind of attention layer."""

    prefix_masks: dict[
        int, Tensor
    ]  # by the number of keys read: (B, 1, N, P) additive, for the nodes that read so many
    tail_rows: Tensor  # cache rows: (B, 1, T) where all nodes of a sequence share them, else (B, N, T)
    tail_mask: Tensor  # (B, 1, N, T) additive
    first: int | None = None  # of the tail's rows, where they are the same neighbours for all sequences
    _packed: dict[object, Tensor] = field(default_factory=dict)  # made once for all layers

    @property
    def num_keys(self) -> int:
        """Cache rows that are read."""
        return max([int(self.tail_rows.max()) + 1, *self.prefix_masks])

    def prefix_mask(self, size: int, per_key_head: int) -> Tensor:
        """For the rows of so many query heads that share a key head: (B, 1, M, P)."""
        return self._once((size, per_key_head), lambda: _packed_mask(self.prefix_masks[size], per_key_head))

    def its_tail_mask(self, per_key_head: int) -> Tensor:
        """(B, 1, M, T), or (B N, 1, 1, T) where every node has its own tail."""
        if self.own_tails:
            return self.tail_mask.view(-1, 1, 1, TAIL)
        return self._once(per_key_head, lambda: _packed_mask(self.tail_mask, per_key_head))

    @property
    def own_tails(self) -> bool:
        return self.tail_rows.shape[1] > 1

    def tail_of(self, states: Tensor) -> Tensor:
        """Keys or values (B, g, K, d) of the tails: (B, g, T, d), or (B N, g, T, d) for tails of the nodes' own."""
        if self.first is not None:
            return states[:, :, self.first : self.first + TAIL]
        head_dim, strides = states.shape[-1], states.stride()
        if strides[2:] != (head_dim, 1) or strides[0] % head_dim or strides[1] % head_dim:
            states = states.contiguous()
            strides = states.stride()
        index = self._once(strides, lambda: self._matrix_rows(states))
        last = sum((size - 1) * stride for size, stride in zip(states.shape[:3], strides[:3], strict=True))
        return F.embedding(index, states.as_strided((last // head_dim + 1, head_dim), (head_dim, 1)))

    def _matrix_rows(self, states: Tensor) -> Tensor:
        """The tails' rows (B N, g, T) in states (B, g, K, d) seen as a matrix of rows."""
        batch, heads, _, head_dim = states.shape
        sequence = torch.arange(batch) * (states.stride(0) // head_dim)
        head = torch.arange(heads) * (states.stride(1) // head_dim)
        return (sequence[:, None, None, None] + head[:, None] + self.tail_rows[:, :, None]).flatten(0, 1)

    def _once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._packed:
            self._packed[key] = make()
        return self._packed[key]


def cut(kind: Kind, lengths: Tensor, trees: Trees, dtype: torch.dtype) -> Cut:
    """For trees behind prefixes of these lengths (B,). Trees that branch have at most BLOCK levels."""
    positions = lengths[:, None] + trees.levels
    starts = starts_of(positions)
    sizes, prefixes = read_for(starts), {}
    for size in sizes.unique().tolist():
        if size:
            keys = torch.arange(size)
            seen = (keys < starts[..., None]) & kind.visible(positions, keys) & (sizes == size)[..., None]
            prefixes[size] = additive(seen, dtype)
    tail = starts[..., None] + torch.arange(TAIL)
    its = (tail <= positions[..., None]) & kind.visible(positions[..., None], tail).squeeze(-2)
    nodes = torch.arange(trees.num_nodes)
    is_chain = torch.equal(trees.parents, (nodes - 1).clamp_min(0).expand_as(trees.parents))
    shared = is_chain and bool((starts == starts[:, :1]).all())
    rows = tail[:, :1]
    if not shared:
        rows = torch.where(tail < lengths[:, None, None], tail, _rows_of_ancestors(tail, lengths, trees))
    same = shared and bool((starts == starts[0, 0]).all())
    return Cut(
        prefix_masks=prefixes, tail_rows=rows,
        tail_mask=additive(its, dtype), first=int(starts[0, 0]) if same else None,
    )  # fmt: skip


def _rows_of_ancestors(positions: Tensor, lengths: Tensor, trees: Trees) -> Tensor:
    """The cache rows of each node's ancestors (itself included) at these positions (B, N, T); others are not seen."""
    num_levels = int(trees.levels.max()) + 1
    nodes = torch.arange(trees.num_nodes)
    level = torch.where(trees.ancestors, trees.levels[:, None, :], num_levels)  # the last column takes all others
    table = torch.zeros(*trees.ancestors.shape[:2], num_levels + 1, dtype=torch.int64)
    table.scatter_(2, level, nodes.expand_as(level))
    at = (positions - lengths[:, None, None]).clamp(0, num_levels - 1)
    return lengths[:, None, None] + table.gather(2, at)


def cut_attention(
    cut: Cut, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """query (B, h, N, d), key and value (B, g, K, d), sinks (h,): scores of a key without a value -> (B, N, h, d)."""
    nodes, per_key_head = query.shape[2], query.shape[1] // key.shape[1]
    packed = rows = _packed(query, key.shape[1])
    if cut.own_tails:
        rows = _packed_by_node(query, key.shape[1])
    output, total = attention_part(
        rows, cut.tail_of(key), cut.tail_of(value), cut.its_tail_mask(per_key_head), scale, softcap
    )
    if cut.own_tails:
        output, total = (_like_packed(part, nodes, per_key_head) for part in (output, total))
    for size in cut.prefix_masks:  # nodes that read another number of keys see none of these: their share is 0
        keys, values, mask = key[:, :, :size], value[:, :, :size], cut.prefix_mask(size, per_key_head)
        earlier, its_total = attention_part(packed, keys, values, mask, scale, softcap)
        output = output.float()
        output = (earlier - output).mul_(_share(its_total, total).unsqueeze(-1)).add_(output)
        if sinks is not None:
            total = torch.maximum(total, its_total) + (1 + (-(total - its_total).abs()).exp()).log()
    return _by_node(output, total, query, sinks)


def _share(total: Tensor, other: Tensor) -> Tensor:
    """exp(total) / (exp(total) + exp(other)). Not `sigmoid`, which rounds the last few numbers of a tensor another way
    than those before them; nor `lerp` or `logaddexp` for what follows."""
    return (other - total).exp_().add_(1).reciprocal_()


def attention_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Part:
    """query (B, g, M, d), key and value (B, g, T, d), mask (.., M, T) or (.., 1, T)."""
    if softcap is None and key.shape[-1] == value.shape[-1]:
        output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        return output, total
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    total = scores.amax(dim=-1) - weights.amax(dim=-1).log()
    return torch.matmul(weights.to(value.dtype), value), total


def _packed(query: Tensor, key_heads: int) -> Tensor:
    """(B, h, N, d) -> (B, g, M, d)"""
    batch, heads, nodes, head_dim = query.shape
    return _filled(query.reshape(batch, key_heads, heads // key_heads * nodes, head_dim))


def _packed_by_node(query: Tensor, key_heads: int) -> Tensor:
    """(B, h, N, d) -> (B N, g, q filled up, d)"""
    batch, heads, nodes, head_dim = query.shape
    by_node = query.transpose(1, 2).reshape(batch * nodes, key_heads, heads // key_heads, head_dim)
    return _filled(by_node)


def _like_packed(part: Tensor, nodes: int, per_key_head: int) -> Tensor:
    """(B N, g, q filled up, ..) -> (B, g, M, ..)"""
    by_node = part[:, :, :per_key_head].unflatten(0, (-1, nodes))
    rows = by_node.movedim(1, 3).flatten(2, 3)
    missing = -rows.shape[2] % ROWS
    return torch.cat((rows, rows[:, :, :missing]), dim=2) if missing else rows


def _by_node(output: Tensor, total: Tensor, query: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention (B, g, M, d) and its log-sum-exp (B, g, M) -> (B, N, h, d) like the query, less the sinks' share."""
    batch, heads, nodes, _ = query.shape
    rows = heads // output.shape[1] * nodes
    if sinks is not None:
        total = total[:, :, :rows].reshape(batch, heads, nodes)
        its = output[:, :, :rows].reshape(batch, heads, nodes, -1)
        return (its * _share(total, sinks.float()[:, None]).unsqueeze(-1)).transpose(1, 2).to(query.dtype).contiguous()
    if output.shape[2] != rows:
        output = output[:, :, :rows]
    output = output.to(query.dtype)
    return output.reshape(batch, heads, nodes, -1).transpose(1, 2).contiguous()


def _filled(rows: Tensor) -> Tensor:
    """(.., M, d) with M filled up to a multiple of ROWS."""
    missing = -rows.shape[-2] % ROWS
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _packed_mask(mask: Tensor, per_key_head: int) -> Tensor:
    """(B, 1, N, K) for the packed rows (B, 1, M, K)."""
    return _filled(mask.repeat(1, 1, per_key_head, 1))
