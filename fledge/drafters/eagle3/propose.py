"""Proposing with an EAGLE-3 head: follow the emitted tokens, then grow a tree level by level (EAGLE-2's dynamic tree).

Token x_j enters the head with the feature of token j - 1 at the rope position of token j - 1, in row j - 1 of its
cache. So a sequence of L committed tokens and its root x_L has L rows, and the last of them predicts what follows the
root. Each sequence brings up to E new tokens; the rows behind its own are computed all the same, from whatever the
slots hold, and land behind its rows, where the beam overwrites them or no mask shows them:

    E = 3, two new tokens     rows   0 .. L-3 | L-2  L-1  | L           output of row L - 1
                                     before   | x    y    | left over

Rows of the cache while a tree grows (top_k = 2). A beam row sees all committed rows, its ancestors' rows and itself:

    0 .. L-1                | L, L+1          | L+2, L+3
    tokens, target features | beam of level 1 | beam of level 2 ..      own feedback; overwritten in the next round

No shape depends on what was drafted or accepted unless a budget cuts levels or nodes.
"""

import torch
from torch import Tensor

from fledge.drafters.base import Budget, Emitted
from fledge.drafters.eagle3.fused_step import fused_step
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.layer_cache import KeysValues, LayerCache
from fledge.drafters.tree import Trees, TreeShape, best_scores, build_trees, candidate_levels
from fledge.target.model import longrope_limit
from fledge.target.products import accelerate

# B sequences, E slots of new tokens, k beam width, W rows of the beam so far, S rows, H hidden size, K keys,
# C candidates, D draft vocabulary


class EagleProposer:
    """An EAGLE-3 (or 3.1) head that drafts for `batch` sequences."""

    needs_taps = True

    def __init__(self, draft: DraftModel, shape: TreeShape, batch: int, capacity: int) -> None:
        config, device = draft.config, draft.fc.weight.device
        self.draft = draft
        accelerate(draft)
        self._fused = fused_step(draft)
        self._step = self._fused or draft.step
        self.width, self.num_levels = beam_width(shape, config.draft_vocab_size), shape.levels
        levels = candidate_levels(self.width, self.num_levels)
        self.num_drafted = min(shape.total_token - 1, len(levels))
        self.rows_ahead = max(self.width * (self.num_levels - 1), self.num_levels + 1)
        self.window = config.sliding_window
        self.cache = DraftCache(draft, batch)
        self._rope_limit = longrope_limit(config.rope_parameters)
        self._last_position = config.max_position_embeddings - 1
        self.reserve(capacity)
        self._levels = levels.to(device)
        self._offsets = torch.zeros(batch, dtype=torch.int64, device=device)  # rope position minus row, per sequence
        self._ids = torch.arange(self.width, device=device)
        self._itself = torch.eye(self.width, dtype=torch.bool, device=device)
        self._blocked = torch.finfo(draft.fc.weight.dtype).min
        self._hidden: Tensor | None = None  # (B, 1, H) the head's output on the roots' rows

    def reserve(self, capacity: int) -> None:
        """Room for sequences of `capacity` rows."""
        self.cache.reserve(capacity)
        self._tabulate(capacity)

    def _tabulate(self, capacity: int) -> None:
        """cos and sin of every row. Rows past the last position are never needed; clamped, they cannot switch a
        length-dependent rope either."""
        positions = torch.arange(capacity, device=self.draft.fc.weight.device)
        if capacity:
            self._rope = self.draft.rope(positions.clamp(max=self._last_position))

    def move(self, source: int, goal: int) -> None:
        self.cache.move(source, goal)
        self._offsets[goal] = self._offsets[source]

    def fill(self, slot: int, token_ids: Tensor, taps: Tensor | None, positions: Tensor) -> None:
        assert taps is not None
        if self._rope_limit is not None:  # factors follow the text; one that outgrows them is filled again
            longer = len(token_ids) > self._rope_limit
            self._last_position = (self.draft.config.max_position_embeddings if longer else self._rope_limit) - 1
            self._tabulate(self.cache.capacity)
        self._offsets[slot] = positions[..., -1].max() + 1 - len(token_ids)
        cos, sin = self.draft.rope(positions.to(self._offsets.device))
        rope = (cos[:-1], sin[:-1])
        self.cache.fill(slot, self.draft.text_keys(token_ids[1:], self.draft.fuse(taps[:-1]), rope))

    def follow(self, emitted: Emitted, num_keys: int) -> None:
        assert emitted.taps is not None
        lengths, num_new = emitted.lengths, emitted.num_new
        rows = (lengths - num_new)[:, None] + torch.arange(emitted.token_ids.shape[1], device=lengths.device)
        mask = None
        if self.draft.config.num_layers > 1:  # the layers behind the first ask for every new row
            mask = self._mask(self._before(rows, num_keys))
        elif self._sees_all(lengths):
            num_keys = int(lengths)
        else:
            mask = self._mask(self._committed(lengths, lengths - 1, num_keys)[:, None])
        self.cache.open(rows, num_keys)
        features = self.draft.fuse(emitted.taps)
        if self._fused is not None:
            self._fused.refresh()
        self._hidden = self._step(
            emitted.token_ids, features, None, self.cache, mask, rope=self._rope_of(rows), output_row=num_new - 1
        )  # fmt: skip

    def propose(self, emitted: Emitted, num_levels: int, num_keys: int, budget: Budget | None = None) -> Trees:
        scores, tokens, parents = self.candidates(emitted.lengths, num_levels, num_keys, budget)
        num_drafted = min(self.num_drafted, scores.shape[1])
        if budget is not None:
            num_drafted = budget.num_nodes(scores[0], num_drafted)
        return build_trees(emitted.roots, tokens, parents, self._levels, scores, num_drafted, num_levels)

    def candidates(
        self, lengths: Tensor, num_levels: int, num_keys: int, budget: Budget | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, target ids and parents (B, C) of all drafts, level by level; parent -1 is the root."""
        assert self._hidden is not None, "follow comes before propose"
        batch, width = len(lengths), self.width
        log_probs, tokens, feedback = best_children(self.draft, self._hidden, width)  # (B, 1, k)
        beam_scores, beam_tokens, beam_ids = log_probs[:, 0], tokens[:, 0], self._ids.expand(batch, -1)
        beam_hidden = feedback.expand(-1, width, -1)
        scores, all_tokens, parents = [beam_scores], [beam_tokens], [torch.full_like(beam_ids, -1)]
        itself = self._itself.expand(batch, -1, -1)
        tree_part, num_candidates = itself, width
        for level in range(1, num_levels):
            if budget is not None and not budget.deeper(beam_scores[0]):
                break
            hidden = self._forward_beam(lengths, beam_tokens, beam_hidden, tree_part, level, num_keys)
            log_probs, tokens, feedback = best_children(self.draft, hidden, width)  # (B, k, k)
            scores.append((beam_scores[..., None] + log_probs).flatten(1))
            all_tokens.append(tokens.flatten(1))
            parents.append(beam_ids.repeat_interleave(width, dim=1))
            if level + 1 < num_levels:
                beam_scores, best = scores[-1].topk(width, dim=-1)
                row = best // width
                beam_tokens, beam_ids = all_tokens[-1].gather(1, best), best + num_candidates
                beam_hidden = gather_rows(feedback, row)
                tree_part = torch.cat((gather_rows(tree_part, row), itself), dim=-1)
            num_candidates += width * width
        return torch.cat(scores, dim=1), torch.cat(all_tokens, dim=1), torch.cat(parents, dim=1)

    def _forward_beam(
        self, lengths: Tensor, tokens: Tensor, hidden: Tensor, tree_part: Tensor, level: int, num_keys: int
    ) -> Tensor:
        """The beams' tokens (B, k) with their parents' feedback (B, k, H) -> f'' (B, k, H). tree_part (B, k, W)."""
        position = lengths + level - 1
        rope = self._rope_of(position[:, None].expand_as(tokens))
        if self.width == 1 and self._sees_all(lengths):
            self.cache.open(position[:, None], int(position) + 1)
            return self._step(tokens, hidden, None, self.cache, None, rope=rope)
        columns = lengths[:, None] + torch.arange(tree_part.shape[2], device=lengths.device)
        self.cache.open(columns[:, -self.width :], num_keys)
        seen = self._committed(lengths, position, num_keys)[:, None].expand(-1, self.width, -1)
        seen = seen.scatter(2, columns[:, None].expand_as(tree_part), tree_part)
        return self._step(tokens, hidden, None, self.cache, self._mask(seen), rope=rope)

    def _sees_all(self, lengths: Tensor) -> bool:
        """Whether a single row sees all rows before it, as many as can be known without waiting."""
        return len(lengths) == 1 and self.window is None and lengths.device.type == "cpu"

    def _committed(self, lengths: Tensor, position: Tensor, num_keys: int) -> Tensor:
        """(B, K) bool: the committed rows that a row at `position` (B,) sees."""
        rows = torch.arange(num_keys, device=lengths.device)
        seen = rows < lengths[:, None]
        return seen if self.window is None else seen & (rows > position[:, None] - self.window)

    def _before(self, rows: Tensor, num_keys: int) -> Tensor:
        """(B, E, K) bool: what the committed rows (B, E) see of each other."""
        keys = torch.arange(num_keys, device=rows.device)
        seen = keys <= rows[..., None]
        return seen if self.window is None else seen & (keys > rows[..., None] - self.window)

    def _mask(self, seen: Tensor) -> Tensor:
        """(B, S, K) bool to the additive (B, 1, S, K)."""
        mask = torch.zeros(seen.shape, dtype=self._rope[0].dtype, device=seen.device)
        return mask.masked_fill_(~seen, self._blocked)[:, None]

    def _rope_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at these rows (B, S) of the sequences."""
        positions = rows + self._offsets[: len(rows), None]
        return self._rope[0][positions], self._rope[1][positions]


class DraftCache(LayerCache):
    """What `DraftModel.step` writes to and reads from."""

    def __init__(self, draft: DraftModel, batch: int) -> None:
        super().__init__(draft.config, batch, draft.fc.weight)
        self.rows = torch.zeros(0, dtype=torch.int64, device=draft.fc.weight.device)  # (B, S) that the next step writes
        self._num_keys = 0

    def open(self, rows: Tensor, num_keys: int) -> None:
        """The next step writes these rows (B, S) and reads the first `num_keys`."""
        self.rows, self._num_keys = rows, num_keys

    def update(self, keys: Tensor, values: Tensor, layer: int = 0) -> KeysValues:
        """Store (B, g, S, d) of a layer; returns the rows read (B, g, K, d)."""
        self.write(layer, self.rows, keys, values)
        return self.rows_read(layer)

    def goal(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where `update` stores: keys and values (slots, g, R, d), rows (B, S)."""
        return *self.block(layer), self.rows.contiguous()

    def rows_read(self, layer: int) -> KeysValues:
        return self.read(layer, len(self.rows), self._num_keys)


def beam_width(shape: TreeShape, draft_vocab_size: int) -> int:
    """Children per node: no more than the tree or the vocabulary can hold."""
    return min(shape.top_k, max(shape.total_token - 1, 1), draft_vocab_size)


def best_children(draft: DraftModel, hidden: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and target ids (.., k) of the k best next tokens, and the feedback (.., H), of f'' (.., H)."""
    logits, feedback = draft.logits_and_feedback(hidden)
    log_probs, draft_ids = best_scores(logits, width)
    return log_probs, draft.target_ids(draft_ids), feedback


def gather_rows(states: Tensor, index: Tensor) -> Tensor:
    """states (B, S, X), index (B, k) -> (B, k, X)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))
