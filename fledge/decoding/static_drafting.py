"""The head's side of a round for several sequences at once, in fixed shapes: the twin of `fledge.decoding.drafting`.

Each sequence brings up to E = levels + 1 new tokens; the rows behind its own are computed all the same, from whatever
the slots hold, and land behind its committed rows, where the beam overwrites them or no mask shows them.

    E = 3, two new tokens     rows   0 .. L-3 | L-2  L-1  | L
                                     before   | x    y    | left over       asked: the output on row L - 1
"""

from typing import Any

import torch
from torch import Tensor

from fledge.decoding.drafting import beam_width, best_children, candidate_levels
from fledge.decoding.records import TreeShape
from fledge.decoding.static_cache import BatchDraftCache
from fledge.decoding.static_tree import Trees, build_trees
from fledge.draft.model import DraftModel

# B sequences, E slots of new tokens, k beam width, W rows of the beam so far, S rows, H hidden size


class BatchDrafter:
    """Drafts for B sequences of at most `capacity` cached rows."""

    def __init__(self, draft: DraftModel, shape: TreeShape, batch: int, capacity: int) -> None:
        config, weight = draft.config, draft.fc.weight
        self.draft = draft
        self.width, self.num_levels = beam_width(shape, config.draft_vocab_size), shape.levels
        levels = candidate_levels(self.width, self.num_levels)
        self.num_drafted = min(shape.total_token - 1, len(levels))
        self.beam_rows = self.width * (self.num_levels - 1)
        self.window = config.sliding_window
        device: Any = weight.device
        self.cache = BatchDraftCache(
            batch, config.num_key_value_heads, config.head_dim, capacity, weight.dtype, device
        )  # fmt: skip
        positions = torch.arange(capacity, device=device).clamp(max=config.max_position_embeddings - 1)
        self._rope = draft.rope(positions)
        self._levels = levels.to(device)
        self._ids = torch.arange(self.width, device=device).expand(batch, -1)
        self._itself = torch.eye(self.width, dtype=torch.bool, device=device).expand(batch, -1, -1)
        self._blocked = torch.finfo(weight.dtype).min

    def fill(self, sequence: int, token_ids: Tensor, features: Tensor) -> None:
        """A prompt's tokens (S,) but its first, with the features (S, H) before them. A layer's keys and values need no
        attention, so nothing is computed that nobody reads."""
        rope = tuple(part[: len(token_ids)] for part in self._rope)
        _, keys, values = self.draft.project(self.draft.embed(token_ids), features, rope)  # type: ignore[arg-type]
        self.cache.fill(sequence, keys, values)

    def grow(self, lengths: Tensor, token_ids: Tensor, num_new: Tensor, features: Tensor, bucket: int) -> Trees:
        """Follow the new tokens (B, E) with their features (B, E, H), then draft.

        num_new (B,) of the slots are new; lengths (B,) count them.
        """
        root = token_ids.gather(1, num_new[:, None] - 1)
        self.cache.lengths = lengths
        hidden = self._extend(lengths, token_ids, num_new, features, bucket)
        scores, tokens, parents = self._candidates(lengths, hidden, bucket)
        return build_trees(root, tokens, parents, self._levels, scores, self.num_drafted, self.num_levels)

    def _extend(self, lengths: Tensor, token_ids: Tensor, num_new: Tensor, features: Tensor, bucket: int) -> Tensor:
        """f'' (B, 1, H) of the last new row of each sequence."""
        rows = (lengths - num_new)[:, None] + torch.arange(token_ids.shape[1], device=lengths.device)
        self.cache.open(rows, bucket)
        mask = self._mask(self._committed(lengths, lengths - 1, bucket)[:, None])
        return self.draft.step(
            token_ids, features, None, self.cache, mask, rope=self._rope_at(rows), asked=num_new - 1
        )  # fmt: skip

    def _candidates(self, lengths: Tensor, hidden: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, target ids and parents (B, C) of all drafts, level by level; parent -1 is the root."""
        width = self.width
        log_probs, tokens = best_children(self.draft, hidden, width)  # (B, 1, k)
        beam_scores, beam_tokens, beam_ids = log_probs[:, 0], tokens[:, 0], self._ids
        beam_hidden = self.draft.feedback(hidden).expand(-1, width, -1)
        scores, all_tokens, parents = [beam_scores], [beam_tokens], [torch.full_like(beam_ids, -1)]
        tree_part, num_candidates = self._itself, width
        for level in range(1, self.num_levels):
            hidden = self._forward_beam(lengths, beam_tokens, beam_hidden, tree_part, level, bucket)
            log_probs, tokens = best_children(self.draft, hidden, width)  # (B, k, k)
            scores.append((beam_scores[..., None] + log_probs).flatten(1))
            all_tokens.append(tokens.flatten(1))
            parents.append(beam_ids.repeat_interleave(width, dim=1))
            if level + 1 < self.num_levels:
                beam_scores, best = scores[-1].topk(width, dim=-1)
                row = best // width
                beam_tokens, beam_ids = all_tokens[-1].gather(1, best), best + num_candidates
                beam_hidden = gather_rows(self.draft.feedback(hidden), row)
                tree_part = torch.cat((gather_rows(tree_part, row), self._itself), dim=-1)
            num_candidates += width * width
        return torch.cat(scores, dim=1), torch.cat(all_tokens, dim=1), torch.cat(parents, dim=1)

    def _forward_beam(
        self, lengths: Tensor, tokens: Tensor, hidden: Tensor, tree_part: Tensor, level: int, bucket: int
    ) -> Tensor:
        """The beams' tokens (B, k) with their parents' feedback (B, k, H) -> f'' (B, k, H). tree_part (B, k, W)."""
        position = lengths + level - 1
        columns = lengths[:, None] + torch.arange(tree_part.shape[2], device=lengths.device)
        self.cache.open(columns[:, -self.width :], bucket)
        seen = self._committed(lengths, position, bucket)[:, None].expand(-1, self.width, -1)
        seen = seen.scatter(2, columns[:, None].expand_as(tree_part), tree_part)
        rope = self._rope_at(position[:, None].expand_as(tokens))
        return self.draft.step(tokens, hidden, None, self.cache, self._mask(seen), rope=rope)

    def _committed(self, lengths: Tensor, position: Tensor, bucket: int) -> Tensor:
        """(B, bucket) bool: the committed rows that a row at `position` (B,) sees."""
        rows = torch.arange(bucket, device=lengths.device)
        seen = rows < lengths[:, None]
        return seen if self.window is None else seen & (rows > position[:, None] - self.window)

    def _mask(self, seen: Tensor) -> Tensor:
        """(B, S, bucket) bool to the additive (B, 1, S, bucket)."""
        mask = torch.zeros(seen.shape, dtype=self._rope[0].dtype, device=seen.device)
        return mask.masked_fill_(~seen, self._blocked)[:, None]

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._rope[0][positions], self._rope[1][positions]


def gather_rows(states: Tensor, index: Tensor) -> Tensor:
    """states (B, S, X), index (B, k) -> (B, k, X)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))
