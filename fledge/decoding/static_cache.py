"""Caches of several sequences at once, written at rows that only the device knows and read at a fixed length.

In `fledge.decoding.cache` the committed length is a Python number, and a read is a view that ends there. Here every
sequence has a length of its own, in a tensor; a read is all rows of a *bucket*, a fixed number no sequence reaches, and
the mask hides what lies behind each length. No shape depends on what was decoded, so a round can be captured.

    bucket of 8, lengths 3 and 5        rows     0 1 2 3 4 5 6 7
                                        first    a b c r d e . .      r: the root of its tree, d, e: nodes
                                        second   f g h i j r k l      .: left over; masked

Seen as one tall matrix, a block has a row per (user, sequence, head, position); writing is one index_copy_ into it.
"""

from typing import Any

import torch
from torch import Tensor

from fledge.decoding.cache import Layout, TargetCache

# U users of a block (keys or values of a layer), B sequences, g kv heads, R rows (capacity), d head_dim, S new rows


def matrix_rows(shape: torch.Size, positions: Tensor) -> Tensor:
    """Rows of a block (.., B, g, R, d) seen as a matrix: those at positions (B, S), of every user and head.

    Ordered like the block itself, so a flattened (.., B, g, S, d) tensor lands where it belongs.
    """
    *outer, num_rows, _ = shape
    first = torch.arange(0, torch.Size(outer).numel() * num_rows, num_rows, device=positions.device)
    return (first.view(*outer, 1) + positions[:, None, :]).flatten()


class BatchCache(TargetCache):
    """Keys and values of B sequences; what the model sees as its cache."""

    def __init__(self, layout: Layout, num_layers: int, batch: int, capacity: int) -> None:
        super().__init__(layout, num_layers, capacity, batch)
        self._matrices: dict[tuple[int, int], Tensor] = {}
        for block, users in zip(self._blocks, self._places, strict=True):
            self._matrices.update(zip(users, block.flatten(1, 3).unbind(0), strict=True))
        self._rows: dict[int, Tensor] | None = None  # by number of heads; None: the write views of one sequence

    def open_sequence(self, sequence: int, num_rows: int) -> None:
        """The next forward is the first of this sequence alone: a prompt of `num_rows` tokens."""
        self._rows = None
        for block, users in zip(self._blocks, self._places, strict=True):
            views = block[:, sequence : sequence + 1, :, :num_rows].unbind(0)
            self._write.update(zip(users, views, strict=True))
            self._read.update(zip(users, views, strict=True))

    def open_behind(self, lengths: Tensor, num_rows: int, bucket: int) -> None:
        """The next forward writes `num_rows` rows behind the lengths (B,) and sees the first `bucket` rows."""
        positions = lengths[:, None] + torch.arange(num_rows, device=lengths.device)
        self._rows = {}
        for block, users in zip(self._blocks, self._places, strict=True):
            self._rows.setdefault(block.shape[2], matrix_rows(block.shape[1:], positions))
            self._read.update(zip(users, block[:, :, :, :bucket].unbind(0), strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: store (B, g, S, d), return the bucket (B, g, bucket, d)."""
        if self._rows is None:
            return super().update(key_states, value_states, layer_idx)
        for part, states in enumerate((key_states, value_states)):
            matrix = self._matrices[layer_idx, part]
            matrix.index_copy_(0, self._rows[states.shape[1]], states.reshape(-1, states.shape[-1]))
        return self._read[layer_idx, 0], self._read[layer_idx, 1]

    def compact(self, lengths: Tensor, path: Tensor) -> None:
        """Move the accepted nodes (B, E), counted from the lengths, together. What lies behind them is left over."""
        step = torch.arange(path.shape[1], device=lengths.device)
        for block in self._blocks:
            matrix = block.flatten(0, 3)
            source = matrix_rows(block.shape, lengths[:, None] + path)
            goal = matrix_rows(block.shape, (lengths[:, None] + step).expand_as(path))
            matrix.index_copy_(0, goal, matrix.index_select(0, source))


class BatchDraftCache:
    """Keys and values of the head's one layer for B sequences, as `DraftModel.step` wants them."""

    def __init__(
        self, batch: int, num_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._block = torch.zeros(2, batch, num_heads, capacity, head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # committed rows
        self._rows = torch.zeros(0, dtype=torch.int64, device=device)
        self._bucket = 0

    def fill(self, sequence: int, keys: Tensor, values: Tensor) -> None:
        """The first rows of a sequence (S, g, d)."""
        self._block[0, sequence, :, : keys.shape[0]] = keys.transpose(0, 1)
        self._block[1, sequence, :, : keys.shape[0]] = values.transpose(0, 1)

    def open(self, positions: Tensor, bucket: int) -> None:
        """The next step writes these rows (B, S) and sees the first `bucket` rows."""
        self._rows, self._bucket = matrix_rows(self._block.shape[1:], positions), bucket

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, g, S, d); returns the bucket (B, g, bucket, d)."""
        for block, states in zip(self._block, (keys, values), strict=True):
            block.flatten(0, 2).index_copy_(0, self._rows, states.reshape(-1, states.shape[-1]))
        read = self._block[:, :, :, : self._bucket]
        return read[0], read[1]
