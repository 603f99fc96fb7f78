"""The head's side of a round: follow the accepted tokens, then grow a tree of candidates.

Knows the head, its cache and the tree's shape. Knows nothing of the target but its features.

Token x_j enters the head with the feature of token j - 1 at rope position j - 1, so after `extend` over all tokens up
to x_L the cache has L rows, and the last row predicts x_(L+1). Rows of the cache while a tree grows (top_k = 2):

    0 .. L-1                | L, L+1          | L+2, L+3
    tokens, target features | beam of level 1 | beam of level 2 ..      own feedback; dropped at the end of the round

A beam row sees all committed rows, its ancestors' rows and itself. The mask buffer is aligned to the right, so that
its view of any length is [zeros over the committed rows | tree part] without copying.
"""

from typing import Any

import torch
from torch import Tensor

from fledge.decoding.adaptive import Pace
from fledge.decoding.cache import DraftCache
from fledge.decoding.records import TreeShape
from fledge.decoding.tree import Tree, build, select
from fledge.draft.model import DraftModel

# S new tokens, H hidden size, k beam width, D draft vocabulary


class Drafter:
    """Drafts for one generation of at most `capacity` tokens."""

    def __init__(
        self, draft: DraftModel, shape: TreeShape, capacity: int, prompt_positions: Tensor | None = None
    ) -> None:
        """`prompt_positions` (P,) or (axes, P): the target's rope positions, where they are not the token's index."""
        config, weight = draft.config, draft.fc.weight
        self.draft = draft
        self.width = beam_width(shape, config.draft_vocab_size)
        self.num_nodes = shape.total_token - 1
        tree_rows = self.width * shape.levels
        self.capacity = capacity
        self.window = config.sliding_window
        self.cache = DraftCache(
            config.num_key_value_heads, config.head_dim, capacity + tree_rows, weight.dtype, weight.device
        )
        # Rows past the last position are never needed; clamped, they cannot switch a length-dependent rope either.
        positions = torch.arange(capacity + shape.levels, device=weight.device)
        if prompt_positions is not None:
            prompt_positions = prompt_positions.to(weight.device)
            after = positions[prompt_positions.shape[-1] :] - prompt_positions.shape[-1]
            after = after + prompt_positions[..., -1].max() + 1
            positions = torch.cat((prompt_positions, after.expand(*prompt_positions.shape[:-1], -1)), dim=-1)
        self.rope = draft.rope(positions.clamp(max=config.max_position_embeddings - 1))
        self._blocked = torch.finfo(weight.dtype).min
        self._mask = torch.zeros(self.width, capacity + tree_rows, dtype=weight.dtype, device=weight.device)
        self._itself = torch.zeros(self.width, self.width, dtype=weight.dtype, device=weight.device)
        self._itself.fill_(self._blocked).fill_diagonal_(0)
        self._beam_ids = torch.arange(self.width, device=weight.device)
        self._levels = candidate_levels(self.width, shape.levels).to(weight.device)

    def extend(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """New tokens (S,), each with the fused target feature (S, H) of the token before it: f'' of the last (1, H)."""
        start, end = self.cache.length, self.cache.length + token_ids.shape[0]
        rope = (self.rope[0][start:end], self.rope[1][start:end])
        mask = self._last_row(end) if self.window is not None and end > self.window else None
        hidden = self.draft.step(token_ids[None], features[None], None, self.cache, mask, rope=rope, last_only=True)
        self.cache.commit()
        return hidden[0]

    def _last_row(self, num_rows: int) -> Tensor:
        """(1, num_rows) mask of the last of so many rows under a sliding window."""
        mask = torch.zeros(1, num_rows, dtype=self._mask.dtype, device=self._mask.device)
        mask[:, : num_rows - self.window] = self._blocked  # type: ignore[operator]
        return mask

    def grow(self, root: Tensor, hidden: Tensor, num_levels: int, pace: Pace | None = None) -> Tree:
        """The tree of `num_levels` >= 1 levels below the root (1,), from the head's output (1, H) on the root's row.

        With a pace, that many levels and nodes at most.
        """
        scores, tokens, parents = self.candidates(hidden, num_levels, pace)
        num_nodes = min(self.num_nodes, scores.shape[0])
        chosen = select(scores, pace.num_nodes(scores, num_nodes) if pace else num_nodes)
        return build(root, tokens, parents, self._levels, chosen, num_levels)

    def candidates(self, hidden: Tensor, num_levels: int, pace: Pace | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, target ids and parents (C,) of all drafts, level by level; parent -1 is the root."""
        width = self.width
        log_probs, tokens = best_children(self.draft, hidden, width)  # (1, k)
        beam_scores, beam_tokens, beam_ids = log_probs[0], tokens[0], self._beam_ids
        beam_hidden = self.draft.feedback(hidden).expand(width, -1)
        all_scores, all_tokens = [beam_scores], [beam_tokens]
        all_parents = [torch.full_like(beam_ids, -1)]
        tree_part, num_candidates = self._itself, width
        for level in range(1, num_levels):
            if pace is not None and not pace.deeper(beam_scores):
                break
            hidden = self._forward_beam(beam_tokens, beam_hidden, tree_part, level)
            log_probs, tokens = best_children(self.draft, hidden, width)  # (k, k)
            scores = (beam_scores[:, None] + log_probs).flatten()
            all_scores.append(scores)
            all_tokens.append(tokens.flatten())
            all_parents.append(beam_ids.repeat_interleave(width))
            if level + 1 < num_levels:
                beam_scores, best = scores.topk(width)
                row = best // width
                beam_tokens, beam_ids = all_tokens[-1][best], best + num_candidates
                beam_hidden = self.draft.feedback(hidden)[row]
                tree_part = torch.cat((tree_part[row], self._itself), dim=-1)
            num_candidates += width * width
        self.cache.rewind()
        return torch.cat(all_scores), torch.cat(all_tokens), torch.cat(all_parents)

    def _forward_beam(self, tokens: Tensor, hidden: Tensor, tree_part: Tensor, level: int) -> Tensor:
        """The beam's tokens (k,) with their parents' feedback (k, H) -> f'' (k, H)."""
        position, seen = self.cache.length + level - 1, tree_part.shape[1]
        self._mask[:, self.capacity : self.capacity + seen] = tree_part
        mask = self._mask[:, self.capacity - self.cache.length : self.capacity + seen]
        if self.window is not None and position >= self.window:
            mask = mask.clone()
            mask[:, : min(position - self.window + 1, self.cache.length)] = self._blocked
        cos, sin = self.rope
        rope = (cos[position], sin[position])
        return self.draft.step(tokens[None], hidden[None], None, self.cache, mask, rope=rope)[0]


def candidate_levels(width: int, num_levels: int) -> Tensor:
    """Level of every candidate: `width` of level 1, then `width` squared per level."""
    levels: list[Any] = [1] * width
    for level in range(2, num_levels + 1):
        levels += [level] * width * width
    return torch.tensor(levels)


def beam_width(shape: TreeShape, draft_vocab_size: int) -> int:
    """Children per node: no more than the tree or the vocabulary can hold."""
    return min(shape.top_k, max(shape.total_token - 1, 1), draft_vocab_size)


def best_children(draft: DraftModel, hidden: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and target ids (.., k) of the k best next tokens, from f'' (.., H)."""
    logits = draft.logits(hidden).float()
    best = logits.topk(width, dim=-1)
    log_probs = best.values - logits.logsumexp(dim=-1, keepdim=True)
    # A head that overflows still gives a well-formed tree: NaN would break the order select() relies on.
    return log_probs.nan_to_num_(nan=float("-inf"), neginf=float("-inf")), draft.target_ids(best.indices)
