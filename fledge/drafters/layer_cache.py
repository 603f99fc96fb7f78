"""Keys and values of a draft's layers for several sequences at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fledge.drafters.layer_config import LayerConfig

# B sequences, E new rows, K rows that are read, S rows of a text, g key heads, d head_dim

KeysValues = tuple[Tensor, Tensor]


class LayerCache:
    """Rows of B sequences, in slots, for every layer."""

    def __init__(self, config: LayerConfig, batch: int, weight: Tensor) -> None:
        """In the dtype and on the device of `weight`. Room is taken by `reserve`."""
        size: Any = (config.num_layers, 2, batch, config.num_key_value_heads, 0, config.head_dim)
        self._block = torch.zeros(size, dtype=weight.dtype, device=weight.device)

    @property
    def capacity(self) -> int:
        return self._block.shape[4]

    def reserve(self, capacity: int) -> None:
        """Room for so many rows; what is there stays."""
        before = self._block
        self._block = before.new_zeros((*before.shape[:4], capacity, before.shape[5]))
        self._block[..., : before.shape[4], :] = before

    def move(self, source: int, goal: int) -> None:
        self._block[:, :, goal] = self._block[:, :, source]

    def fill(self, slot: int, keys_values: Sequence[KeysValues]) -> None:
        """The first rows of a sequence, (S, g, d) of every layer."""
        for block, pair in zip(self._block, keys_values, strict=True):
            for part, states in zip(block, pair, strict=True):
                part[slot, :, : len(states)] = states.transpose(0, 1)

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """These rows (B, E) of the sequences, one behind the other, (B, g, E, d)."""
        if len(rows) == 1 and rows.device.type == "cpu":  # a slice takes less time where its beginning is at hand
            begin = int(rows[0, 0])
            self._block[layer, 0, 0, :, begin : begin + rows.shape[1]] = keys[0]
            self._block[layer, 1, 0, :, begin : begin + rows.shape[1]] = values[0]
            return
        index = rows[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        for part, states in zip(self._block[layer], (keys, values), strict=True):
            part[: len(rows)].scatter_(2, index, states)

    def block(self, layer: int) -> KeysValues:
        """All rows of a layer (slots, g, R, d)."""
        keys, values = self._block[layer]
        return keys, values

    def read(self, layer: int, batch: int, num_keys: int) -> KeysValues:
        """The first rows of a layer (B, g, K, d)."""
        read = self._block[layer, :, :batch, :, :num_keys]
        return read[0], read[1]
