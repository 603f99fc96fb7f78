"""Additive attention masks over cached rows and tree nodes, one per kind of attention layer the target has.

Knows windows, positions and ancestors. Knows nothing of caches beyond their length. The mask of tree nodes sees the
whole prefix, then ancestors only; sliding windows and chunks cut it by *position*, since nodes of one level share one:

    prefix_len = 3, nodes root a b a.c at positions 3 4 4 5         sliding window of 3 positions

        root  1 1 1 | 1 . . .                                           root  . 1 1 | 1 . . .
        a     1 1 1 | 1 1 . .                                           a     . . 1 | 1 1 . .
        b     1 1 1 | 1 . 1 .                                           b     . . 1 | 1 . 1 .
        a.c   1 1 1 | 1 1 . 1                                           a.c   . . . | 1 1 . 1
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fledge.drafters.tree import Trees
from fledge.errors import UserError

# N query rows, K keys, B sequences


@dataclass(frozen=True)
class Kind:
    """How far a layer sees: everything, the last `size` positions, or its own chunk of `size` positions."""

    name: Literal["full_attention", "sliding_attention", "chunked_attention"]
    size: int = 0

    def reaches_back(self, last_position: int) -> bool:
        """True when every position up to `last_position` sees all before it: the kind then equals full attention."""
        return self.name == "full_attention" or last_position < self.size

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(.., N, K) bool from positions (.., N) and (.., K); causality is not checked here."""
        queries, keys = queries[..., :, None], keys[..., None, :]
        if self.name == "sliding_attention":
            return keys > queries - self.size
        if self.name == "chunked_attention":
            return keys // self.size == queries // self.size
        return torch.ones(torch.broadcast_shapes(queries.shape, keys.shape), dtype=torch.bool, device=keys.device)


FULL = Kind("full_attention")


def kinds_of(text_config: Any, name: str) -> list[Kind]:
    """The kinds of attention layers a target has, in a fixed order."""
    types = getattr(text_config, "layer_types", None)
    if types is None:
        window = getattr(text_config, "sliding_window", None)
        return [Kind("sliding_attention", window)] if window else [FULL]
    kinds = []
    for layer_type in sorted(set(types)):
        if layer_type == "full_attention":
            kinds.append(FULL)
        elif layer_type == "sliding_attention":
            kinds.append(Kind("sliding_attention", text_config.sliding_window))
        elif layer_type == "chunked_attention":
            kinds.append(Kind("chunked_attention", text_config.attention_chunk_size))
        else:
            raise UserError(
                f"{name}: layers of type {layer_type!r} keep a running state that cannot branch, so fledge cannot "
                f"decode this target yet. Needed: full, sliding-window or chunked attention in every layer."
            )
    return kinds


class Masks:
    """Builds what a model takes as `attention_mask`: one tensor, or a dict by layer type where there are several."""

    def __init__(self, kinds: list[Kind], dtype: torch.dtype, device: torch.device, *, causal_by_default: bool) -> None:
        """`causal_by_default`: the attention function reads None as a causal block (or as one row that sees all)."""
        self.kinds, self.dtype, self.device = kinds, dtype, device
        self.causal_by_default = causal_by_default

    def causal(self, num_rows: int) -> Any:
        """For a block of rows on an empty cache."""
        if self.causal_by_default and all(kind.reaches_back(num_rows - 1) for kind in self.kinds):
            return self._by_kind(lambda kind: None)
        positions = torch.arange(num_rows, device=self.device)
        lower = positions[None, :] <= positions[:, None]
        return self._by_kind(lambda kind: self._additive(lower & kind.visible(positions, positions)))

    def trees(self, lengths: Tensor, trees: Trees, num_keys: int, *, whole: bool) -> Any:
        """For the nodes of trees behind prefixes of their own lengths (B,), over the first `num_keys` rows.

        What lies behind a tree is not seen. `whole`: the host knows that every prefix ends where the trees begin, at
        row num_keys - N, so a tree of one node sees every row and needs no mask.
        """
        if whole and trees.num_nodes == 1 and all(kind.reaches_back(num_keys - 1) for kind in self.kinds):
            return self._by_kind(lambda kind: None)
        rows = torch.arange(num_keys, device=self.device)
        nodes = lengths[:, None] + torch.arange(trees.num_nodes, device=self.device)
        seen = (rows < lengths[:, None])[:, None, :].expand(-1, trees.num_nodes, -1)
        seen = seen.scatter(2, nodes[:, None, :].expand_as(trees.ancestors), trees.ancestors)
        full = self._additive(seen)
        if all(kind.reaches_back(num_keys - 1) for kind in self.kinds):
            return self._by_kind(lambda kind: full)
        positions = lengths[:, None] + trees.levels
        keys = rows.expand(len(lengths), -1).scatter(1, nodes, positions)
        return self._by_kind(
            lambda kind: (
                full if kind.reaches_back(num_keys - 1) else self._additive(seen & kind.visible(positions, keys))
            )
        )

    def _additive(self, visible: Tensor) -> Tensor:
        return additive(visible, self.dtype)

    def _by_kind(self, make: Any) -> Any:
        return make(self.kinds[0]) if len(self.kinds) == 1 else {kind.name: make(kind) for kind in self.kinds}


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) bool to (1, 1, N, K), (B, N, K) to (B, 1, N, K)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask = mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(-3)
    return mask if mask.dim() == 4 else mask[None]
