"""Preallocated key-value caches: rows are written in place, read as views, and compacted by one gather per block.

`TargetCache` is what a stock transformers model sees as its cache; all layers keep the full length (windows are the
mask's business, `fledge.decoding.masks`). `DraftCache` is the same for the one layer of the head. Both know rows, not
tokens: `length` rows are committed, the rows after them are the current round's.

    rows     0 .. length - 1 | length .. length + N - 1
             committed       | this round's tree nodes        keep([0, 2, 3]) moves these to length .. length + 2
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fledge.target.model import Target

# g kv heads, d head_dim, R rows (capacity), S new rows


@dataclass(frozen=True)
class Slab:
    """Shape and place of one key or value tensor of one layer."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


Layout = dict[int, tuple[Slab, Slab]]  # decoder layer -> keys, values; layers that share another's cache are absent


class _LayerView(CacheLayerMixin):
    """What transformers asks of a layer when it builds masks by itself: the cache answers."""

    is_sliding = False

    def __init__(self, cache: "TargetCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("allocated by TargetCache")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("updated through TargetCache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.length

    def get_max_length(self) -> int:
        return self._cache.capacity


class TargetCache(Cache):
    """Keys and values of all layers; layers of equal shape share one block, so that compaction is one gather."""

    def __init__(self, layout: Layout, num_layers: int, capacity: int, batch: int = 1) -> None:
        super().__init__(layers=[_LayerView(self) for _ in range(num_layers)])
        self.length, self.capacity = 0, capacity
        places: dict[Slab, list[tuple[int, int]]] = defaultdict(list)
        for layer, slabs in layout.items():
            for part, slab in enumerate(slabs):
                places[slab].append((layer, part))
        self._places = list(places.values())
        self._blocks = [
            torch.zeros(
                len(users), batch, slab.num_heads, capacity, slab.head_dim, dtype=slab.dtype, device=slab.device
            )
            for slab, users in places.items()
        ]
        self._write: dict[tuple[int, int], Tensor] = {}
        self._read: dict[tuple[int, int], Tensor] = {}

    def open(self, num_rows: int) -> None:
        """Make room for `num_rows` rows after the committed ones. The next forward writes them."""
        end = self.length + num_rows
        assert end <= self.capacity, f"{end=} {self.capacity=}"
        for block, users in zip(self._blocks, self._places, strict=True):
            self._write.update(zip(users, block.narrow(3, self.length, num_rows).unbind(0), strict=True))
            self._read.update(zip(users, block.narrow(3, 0, end).unbind(0), strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: store (1, g, S, d), return all rows in use (1, g, length + S, d)."""
        keys, values = (layer_idx, 0), (layer_idx, 1)
        self._write[keys].copy_(key_states)
        self._write[values].copy_(value_states)
        return self._read[keys], self._read[values]

    def keep(self, rows: list[int]) -> None:
        """Commit these of the open rows (ascending, counted from `length`)."""
        if rows[-1] >= len(rows):  # else they are 0, 1, 2 ... and lie where they belong
            for block in self._blocks:
                index = torch.tensor(rows, device=block.device) + self.length
                block.narrow(3, self.length, len(rows)).copy_(block.index_select(3, index))
        self.length += len(rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0


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


def layout_of(target: Target) -> Layout:
    """Ask the model what it stores, with one forward of one token: no config says it for every architecture."""
    recorder = _Recorder(target.num_layers)
    target.forward(torch.zeros(1, 1, dtype=torch.int64, device=target.device), past_key_values=recorder, taps=False)
    return recorder.layout


class DraftCache:
    """Keys and values of the head's one layer, as `DraftModel.step` wants them."""

    def __init__(self, num_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block = torch.zeros(2, 1, num_heads, capacity, head_dim, dtype=dtype, device=device)
        self.length = 0  # committed rows
        self.used = 0  # committed rows and this round's tree levels

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (1, g, S, d) behind the rows in use; returns all rows in use."""
        start, self.used = self.used, self.used + keys.shape[2]
        write = self._block.narrow(3, start, keys.shape[2])
        write[0].copy_(keys)
        write[1].copy_(values)
        read = self._block.narrow(3, 0, self.used)
        return read[0], read[1]

    def commit(self) -> None:
        """Keep the rows in use."""
        self.length = self.used

    def rewind(self) -> None:
        """Drop the rows after the committed ones: a new round begins."""
        self.used = self.length
