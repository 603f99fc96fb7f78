"""The preallocated key-value cache that a stock transformers model sees while fledge decodes.

Knows rows, not tokens. All layers keep the full length (windows are the mask's business, `fledge.decoding.masks`).
Sequences lie in slots, each with a length of its own. A read is the first K rows of the slots in use; the mask hides
what lies behind each sequence's own rows. A write goes to one block of rows (a prompt, or sequences of equal length) or
to rows of each sequence's own:

    K = 8, lengths 3 and 5              rows     0 1 2 3 4 5 6 7
                                        first    a b c r d e . .      r: the root of its tree, d, e: nodes
                                        second   f g h i j r k l      .: left over; masked

`compact` moves the accepted nodes together. Seen as one tall matrix, a block has a row per (user, slot, head, row);
writing to scattered rows is one index_copy_ into it. Nothing here depends on values the host would have to read.
"""

import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fledge.target.model import Target

# U users of a block (keys or values of a layer), B sequences, g kv heads, R rows (capacity), d head_dim, S new rows,
# K rows that are read, E slots of a path


@dataclass(frozen=True)
class Slab:
    """Shape and place of one key or value tensor of one layer."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


Layout = dict[int, tuple[Slab, Slab]]  # decoder layer -> keys, values; layers that share another's cache are absent

_layouts: "weakref.WeakKeyDictionary[Target, Layout]" = weakref.WeakKeyDictionary()


def layout_of(target: Target) -> Layout:
    """Ask the model what it stores, with one forward of one token: no config says it for every architecture."""
    if target not in _layouts:
        recorder = _Recorder(target.num_layers)
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
        target.forward(one_token, past_key_values=recorder, taps=False)
        _layouts[target] = recorder.layout
    return _layouts[target]


class TargetCache(Cache):
    """Keys and values of all layers; layers of equal shape share one block, so that compaction is one gather."""

    def __init__(self, layout: Layout, num_layers: int, batch: int, capacity: int) -> None:
        super().__init__(layers=[_LayerView(self) for _ in range(num_layers)])
        self.batch, self.capacity = batch, capacity
        self._length = 0  # rows before those that the next forward writes, where it writes one block
        users: dict[Slab, list[tuple[int, int]]] = defaultdict(list)  # of (layer, 0 for keys or 1 for values)
        for layer, slabs in layout.items():
            for part, slab in enumerate(slabs):
                users[slab].append((layer, part))
        self._slabs, self._users = list(users), list(users.values())
        self._blocks = [self._allocated(slab, len(its), capacity) for slab, its in users.items()]
        self._write: dict[tuple[int, int], Tensor] = {}
        self._read: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[int, Tensor] | None = None  # by number of heads: matrix rows to write; None: `_write`
        self._positions: Tensor | None = None  # (B, S) of the rows to write, where each sequence has its own

    @property
    def num_bytes(self) -> int:
        return sum(block.numel() * block.element_size() for block in self._blocks)

    def _allocated(self, slab: Slab, num_users: int, capacity: int) -> Tensor:
        size = (num_users, self.batch, slab.num_heads, capacity, slab.head_dim)
        return torch.zeros(size, dtype=slab.dtype, device=slab.device)

    def reserve(self, capacity: int) -> None:
        """Room for so many rows; what is there stays."""
        for index, (slab, users) in enumerate(zip(self._slabs, self._users, strict=True)):
            before, after = self._blocks[index], self._allocated(slab, len(users), capacity)
            after[:, :, :, : self.capacity] = before
            self._blocks[index] = after
        self.capacity = capacity

    def open_block(self, slots: slice, start: int, num_rows: int) -> None:
        """The next forward writes rows start .. start + num_rows - 1 of these slots and reads all up to them."""
        end = start + num_rows
        assert end <= self.capacity, f"{end=} {self.capacity=}"
        self._rows, self._positions, self._length = None, None, start
        for block, users in zip(self._blocks, self._users, strict=True):
            part = block[:, slots, :, :end]
            self._read.update(zip(users, part.unbind(0), strict=True))
            self._write.update(zip(users, part[:, :, :, start:end].unbind(0), strict=True))

    def open_rows(self, lengths: Tensor, num_rows: int, num_keys: int) -> None:
        """The next forward writes `num_rows` rows behind the lengths (B,) and reads the first `num_keys` rows."""
        positions = lengths[:, None] + torch.arange(num_rows, device=lengths.device)
        self._rows, self._positions, self._length = {}, positions, 0
        for block, users in zip(self._blocks, self._users, strict=True):
            self._rows.setdefault(block.shape[2], matrix_rows(block.shape[1:], positions))
            self._read.update(zip(users, block[:, : len(lengths), :, :num_keys].unbind(0), strict=True))
            self._write.update(zip(users, block.unbind(0), strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: store (B, g, S, d), return the rows read (B, g, K, d)."""
        for part, states in enumerate((key_states, value_states)):
            goal = self._write[layer_idx, part]
            if self._rows is None:
                goal.copy_(states)
            else:
                rows = self._rows[states.shape[1]]
                goal.view(-1, goal.shape[-1]).index_copy_(0, rows, states.reshape(-1, states.shape[-1]))
        return self._read[layer_idx, 0], self._read[layer_idx, 1]

    def goal(self, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the next forward writes: keys and values (slots, g, R, d) of a layer and the rows (B, S). None: a
        block, which `update` writes."""
        if self._positions is None:
            return None
        return self._write[layer, 0], self._write[layer, 1], self._positions

    def rows_read(self, layer: int) -> tuple[Tensor, Tensor]:
        """What `update` returns."""
        return self._read[layer, 0], self._read[layer, 1]

    def compact(self, lengths: Tensor, path: Tensor) -> None:
        """Move the accepted nodes (B, E), counted from the lengths, together. What lies behind them is left over."""
        step = torch.arange(path.shape[1], device=lengths.device)
        for block in self._blocks:
            matrix = block.view(-1, block.shape[-1])
            source = matrix_rows(block.shape, lengths[:, None] + path)
            goal = matrix_rows(block.shape, (lengths[:, None] + step).expand_as(path))
            matrix.index_copy_(0, goal, matrix.index_select(0, source))

    def move(self, source: int, goal: int) -> None:
        """The sequence of slot `source` goes on in slot `goal`."""
        for block in self._blocks:
            block[:, goal] = block[:, source]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length + query_length, 0


def matrix_rows(shape: torch.Size, positions: Tensor) -> Tensor:
    """Rows of a block (.., slots, g, R, d) seen as a matrix: those at positions (B, S) of its first B slots.

    Ordered like the block itself, so a flattened (.., B, g, S, d) tensor lands where it belongs.
    """
    *outer, num_rows, _ = shape
    first = torch.arange(0, torch.Size(outer).numel() * num_rows, num_rows, device=positions.device)
    used = first.view(*outer).narrow(-2, 0, len(positions))
    return (used[..., None] + positions[:, None, :]).flatten()


class _LayerView(CacheLayerMixin):
    """What transformers asks of a layer when it builds masks by itself: the cache answers."""

    is_sliding = False

    def __init__(self, cache: TargetCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("allocated by TargetCache")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("updated through TargetCache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        return self._cache.capacity


class _Recorder(Cache):
    """Notes the shapes a model stores, and stores nothing."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.layout: Layout = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (Slab(s.shape[1], s.shape[3], s.dtype, s.device) for s in (key_states, value_states))
        self.layout[layer_idx] = (keys, values)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0
