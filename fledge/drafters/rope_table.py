"""cos and sin of every row of a cache: what a proposer looks up instead of computing it in every round."""

import torch
from torch import Tensor

from fledge.drafters.bound_head import BoundHead
from fledge.target.model import longrope_limit

# B sequences, S rows, R rotated dimensions


class RopeTable:
    """Positions of `batch` sequences: row plus the sequence's own offset (pictures of many tokens take few positions).

    Rows past the last position are never needed; clamped, they cannot switch a length-dependent rope either. The
    factors of a longrope follow the text, so a text that outgrows its limit is filled again.
    """

    def __init__(self, draft: BoundHead, batch: int) -> None:
        self.draft = draft
        self._limit = longrope_limit(draft.config.rope_parameters)
        self._last_position = draft.config.max_position_embeddings - 1
        self._offsets = torch.zeros(batch, dtype=torch.int64, device=draft.norm.weight.device)
        self._table: tuple[Tensor, Tensor] | None = None

    def reserve(self, capacity: int) -> None:
        """Tabulate so many rows."""
        positions = torch.arange(capacity, device=self._offsets.device)
        if capacity:
            self._table = self.draft.rope(positions.clamp(max=self._last_position))

    def fill(self, slot: int, positions: Tensor, capacity: int) -> None:
        """A text with these positions (P,) or (axes, P) enters the slot."""
        num_tokens = positions.shape[-1]
        if self._limit is not None:
            longer = num_tokens > self._limit
            self._last_position = (self.draft.config.max_position_embeddings if longer else self._limit) - 1
            self.reserve(capacity)
        self._offsets[slot] = positions[..., -1].max() + 1 - num_tokens

    def move(self, source: int, goal: int) -> None:
        self._offsets[goal] = self._offsets[source]

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, R) at these rows (B, S) of the first B sequences."""
        assert self._table is not None, "reserve comes first"
        positions = rows + self._offsets[: len(rows), None]
        cos, sin = self._table
        return cos[positions], sin[positions]
